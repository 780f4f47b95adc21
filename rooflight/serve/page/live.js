"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const say = (id, text) => { byId(id).textContent = text; };

  // Three digits with a unit, as the reports of rooflight write them; what is unknown is a dash.
  const digits = (x) => (x >= 999.5 ? Math.round(x).toLocaleString("en") : x >= 99.95 ? x.toFixed(0) : x >= 9.995 ? x.toFixed(1) : x >= 0.9995 ? x.toFixed(2) : String(Number(x.toPrecision(3))));
  const scaled = (value, units) => {
    if (value === null) return ["–", ""];
    let at = 0;
    while (value >= 999.5 && at < units.length - 1) { value /= 1000; at += 1; }
    return [at === 0 && Number.isInteger(value) ? String(value) : digits(value), units[at]];
  };
  const time = (seconds) => (seconds === 0 ? "0 s" : scaled(seconds === null ? null : seconds * 1e9, ["ns", "µs", "ms", "s"]).join(" ").trim());
  const count = (value) => scaled(value, ["", "K", "M", "G"]).join(" ").trim();
  const whole = (value) => value.toLocaleString("en");
  const times = (value) => (value === null ? "–" : `${digits(value)}×`);
  const percent = (share) => (share === null ? "–" : share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`);
  const plural = (n, one, many) => `${whole(n)} ${n === 1 ? one : many}`;
  const duration = (seconds) => {
    const [d, h, m, s] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
    return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
  };
  const figure = (id, text, unit) => {
    const small = document.createElement("span");
    small.className = "unit";
    small.textContent = unit;
    byId(id).replaceChildren(text, ...(unit ? [small] : []));
  };

  let shown = null;      // the last snapshot
  let pointed = null;    // where the pointer or the arrow keys stand, as a step's place in what is drawn
  let drawn = null;      // how the chart was laid out, for the pointer

  const words = {
    serving: ["serving", "state good"],
    draining: ["draining: takes no new requests", "state bad"],
    stopped: ["the engine has stopped; see the server's log", "state bad"],
  };

  const setState = (text, kind) => {
    // A status that is written anew each second would be read aloud each second.
    if (byId("state").textContent !== text) say("state", text);
    byId("state").className = kind;
  };

  const showFigures = (now) => {
    document.title = `${now.model} · Rooflight`;
    say("model", now.model);
    say("machine", now.machine ? `on ${now.machine}` : "");
    say("uptime", `up ${duration(now.uptime_seconds)}`);
    setState(...words[now.state]);
    const any = now.steps.number.length > 0;
    const span = now.window_seconds;
    figure("running", whole(now.running), `of ${whole(now.max_num_seqs)}`);
    say("waiting", now.waiting ? `${whole(now.waiting)} waiting` : "none waiting");
    const { used, total, tokens } = now.blocks;
    figure("blocks", percent(total ? used / total : null), "");
    byId("blocks-bar").style.width = `${total ? (100 * used) / total : 0}%`;
    say("blocks-detail", `${whole(used)} of ${whole(total)}, ${tokens} tokens each`);
    for (const [id, rate] of [["out", now.tokens_per_second.generated], ["in", now.tokens_per_second.prefill]]) figure(id, count(any ? rate : null), any && rate !== null ? "tokens/s" : "");
    for (const [id, spread, what] of [["ttft", now.ttft_seconds, "first token"], ["itl", now.itl_seconds, "second token"]]) {
      figure(id, time(spread.p50), spread.count ? "p50" : "");
      say(`${id}-detail`, spread.count ? `p99 ${time(spread.p99)}` : any ? `no ${what} lately` : "no requests yet");
    }
    const cache = now.prefix_cache;
    figure("hits", percent(cache.hit_rate), "");
    say("hits-detail", cache.queried_tokens ? `${count(cache.hit_tokens)} of ${count(cache.queried_tokens)} tokens` : any ? "no prompt lately" : "no requests yet");
    figure("ended", any ? whole(now.requests_ended) : "–", "");
    say("ended-detail", any ? `${digits(span > 0 ? now.requests_ended / span : 0)} a second` : "no requests yet");
    say("window", any ? `Rates and times are over the last ${duration(span)}.` : "");
    const { predicted_over_measured: accuracy, measured_over_roof: headroom } = now.against_prediction;
    byId("ratios").hidden = headroom === null && accuracy === null;
    say("accuracy", times(accuracy));
    say("headroom", times(headroom));
    say("share", percent(headroom === null ? null : Math.max(0, 1 - 1 / headroom)));
    byId("empty").hidden = any;
    byId("chart").hidden = byId("legend").hidden = !any;
  };

  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, attributes, text) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const at = (x) => x.toFixed(1);

  // 1, 2 and 5 of each power of ten in a range; only powers of ten where those would crowd.
  const ticks = (low, high) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const digit of high / low > 300 ? [1] : [1, 2, 5]) {
        const value = digit * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found;
  };

  const draw = () => {
    const place = byId("chart");
    if (!shown || place.hidden) return;
    const width = place.clientWidth;
    const narrow = width < 560;
    const [left, right, top, plot, gap, strip, foot] = [narrow ? 46 : 56, 6, 8, narrow ? 210 : 280, 14, narrow ? 44 : 56, 22];
    const height = top + plot + gap + strip + foot;
    const all = shown.steps;
    const skip = Math.max(0, all.number.length - (narrow ? 100 : 240));
    const steps = Object.fromEntries(Object.entries(all).map(([key, values]) => [key, values.slice(skip)]));
    const many = steps.number.length;
    const slots = Math.max(many, 40);
    const step = (width - left - right) / slots;
    const x = (index) => left + (slots - many + index) * step;

    const seconds = [steps.measured_seconds, steps.predicted_seconds, steps.roof_seconds].flat().filter((value) => value > 0);
    const low = (seconds.length ? Math.min(...seconds) : 1e-3) / 1.7;
    const high = (seconds.length ? Math.max(...seconds) : 1) * 1.6;
    const y = (value) => top + plot * (1 - Math.log(value / low) / Math.log(high / low));
    const bottom = top + plot;
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Seconds of each step, measured, predicted and roof, over its tokens" });

    for (const value of ticks(low, high)) {
      svg.append(shape("path", { class: "grid", d: `M${left} ${at(y(value))}H${width - right}` }));
      svg.append(shape("text", { x: left - 6, y: at(y(value) + 4), "text-anchor": "end" }, time(value).replace(".00", "").replace(/\.0(?= )/, "")));
    }
    // Level over each step and without risers, which would stand before the measured dots.
    const levels = (values) => values.map((value, index) => (value > 0 ? `M${at(x(index))} ${at(y(value))}H${at(x(index + 1))}` : "")).join("");
    const columns = (values) => values.map((value, index) => (value > 0 ? `M${at(x(index))} ${at(bottom)}V${at(y(value))}H${at(x(index + 1))}V${at(bottom)}Z` : "")).join("");
    const size = Math.min(6, Math.max(3, step * 0.8));
    const dots = steps.measured_seconds.map((value, index) => (value > 0 ? `M${at(x(index + 0.5))} ${at(y(value))}h0` : "")).join("");
    svg.append(
      shape("path", { class: "area-roof", d: columns(steps.roof_seconds) }),
      shape("path", { class: "line-roof", d: levels(steps.roof_seconds) }),
      shape("path", { class: "line-predicted", d: levels(steps.predicted_seconds) }),
      shape("path", { class: "dots-measured", "stroke-width": at(size), d: dots }),
    );

    const floor = bottom + gap + strip;
    const most = Math.max(2, ...steps.tokens);
    const tall = (tokens) => Math.max(1.5, (strip * Math.log1p(tokens)) / Math.log1p(most));
    const bars = (wanted) => steps.tokens.map((tokens, index) => ((steps.prefill_tokens[index] > 0) === wanted ? `M${at(x(index))} ${at(floor)}v${at(-tall(tokens))}h${at(Math.max(0.6, step - (step > 3 ? 1 : 0.2)))}V${at(floor)}z` : "")).join("");
    svg.append(
      shape("path", { class: "bars-decode", d: bars(false) }),
      shape("path", { class: "bars-prefill", d: bars(true) }),
      shape("path", { class: "grid", d: `M${left} ${at(floor)}H${width - right}` }),
      shape("text", { x: left - 6, y: at(floor - strip + 8), "text-anchor": "end" }, count(most)),
      shape("text", { x: left - 6, y: at(floor), "text-anchor": "end" }, "tokens"),
      shape("text", { x: at(x(0)), y: height - 6, "text-anchor": many > slots * 0.9 ? "start" : "middle" }, `step ${whole(steps.number[0])}`),
    );
    if (many > 8) svg.append(shape("text", { x: width - right, y: height - 6, "text-anchor": "end" }, `step ${whole(steps.number[many - 1])}`));
    const guide = shape("path", { class: "guide", d: "", visibility: "hidden" });
    svg.append(guide);
    const tip = place.querySelector(".tip") || Object.assign(document.createElement("div"), { className: "tip", hidden: true, role: "status" });
    place.replaceChildren(svg, tip);
    drawn = { steps, many, x, step, guide, tip, top, floor, width, height };
    const priced = steps.roof_seconds.some((value) => value > 0);
    for (const key of document.querySelectorAll(".forecast")) key.hidden = !priced;
    byId("lead").hidden = !priced;
    say("chart-text", priced
      ? `The last ${plural(many, "step", "steps")}; both scales are logarithmic. Point at a step, or use the arrow keys, for its figures.`
      : "These steps have no prediction: the engine was given no machine to predict for.");
    point();
  };

  const line = (name, value, note) => {
    const row = document.createElement("div");
    row.append(...[["dt", name], ["dd", value], ["dd", note || ""]].map(([kind, text]) => Object.assign(document.createElement(kind), { textContent: text })));
    return row;
  };

  const point = () => {
    if (!drawn) return;
    const { steps, many, x, step, guide, tip, top, floor, width, height } = drawn;
    tip.hidden = pointed === null;
    guide.setAttribute("visibility", pointed === null ? "hidden" : "visible");
    if (pointed === null) return;
    const index = Math.min(many - 1, Math.max(0, pointed));
    const middle = x(index) + step / 2;
    guide.setAttribute("d", `M${at(middle)} ${top}V${floor}`);
    const of = (key) => steps[key][index];
    const [measured, predicted, roof] = [of("measured_seconds"), of("predicted_seconds"), of("roof_seconds")];
    const list = document.createElement("dl");
    list.append(line("measured", time(measured)));
    if (predicted !== null) list.append(line("predicted", time(predicted), measured > 0 ? `${times(predicted / measured)} of measured` : ""));
    if (roof !== null) list.append(line("roof", time(roof), roof > 0 ? `measured is ${times(measured / roof)}` : ""));
    if (of("bound")) list.append(line("bound by", of("bound")));
    const longer = of("sequences") - of("decodes");
    list.append(line("sequences", whole(of("sequences")), longer ? `${plural(longer, "prefill", "prefills")}, ${plural(of("decodes"), "decode", "decodes")}` : "decode alone"));
    list.append(line("tokens", whole(of("tokens")), of("prefill_tokens") ? `${whole(of("prefill_tokens"))} of prefill` : ""));
    const title = Object.assign(document.createElement("strong"), { textContent: `Step ${whole(of("number"))}` });
    tip.replaceChildren(title, list);
    const wide = tip.offsetWidth;
    const beside = middle + 14 + wide <= width ? middle + 14 : middle - 14 - wide;
    tip.style.left = `${Math.max(0, Math.min(width - wide, beside))}px`;
    // On a phone it stands below what it tells of.
    tip.style.top = width < 560 ? `${height}px` : `${top}px`;
  };

  const chart = byId("chart");
  chart.addEventListener("pointermove", (event) => {
    if (!drawn) return;
    const from = chart.getBoundingClientRect().left;
    pointed = Math.floor((event.clientX - from - drawn.x(0)) / drawn.step);
    point();
  });
  chart.addEventListener("pointerleave", () => { pointed = null; point(); });
  chart.addEventListener("blur", () => { pointed = null; point(); });
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!drawn || (!by && event.key !== "Escape")) return;
    event.preventDefault();
    pointed = by ? Math.min(drawn.many - 1, Math.max(0, pointed === null ? drawn.many - 1 : pointed + by)) : null;
    point();
  });
  new ResizeObserver(draw).observe(chart);

  const events = new EventSource("live/events");
  events.onmessage = (event) => {
    shown = JSON.parse(event.data);
    document.body.classList.remove("lost");
    showFigures(shown);
    draw();
  };
  events.onerror = () => {
    document.body.classList.add("lost");
    setState(shown ? "no answer from the server; trying again" : "no answer yet; trying again", "state bad");
  };
})();
