"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;

  // Charts name colours as the stylesheet does, so that light and dark are decided in one place.
  const painted = (value, styles) => {
    if (typeof value === "string" && value.startsWith("var(--")) return styles.getPropertyValue(value.slice(4, -1)).trim();
    if (Array.isArray(value)) return value.map((item) => painted(item, styles));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, styles)]));
    }
    return value;
  };

  const axis = (own, narrow) => ({
    gridcolor: "var(--rule)", linecolor: "var(--muted)", zeroline: false, 
    tickfont: { size: narrow ? 10 : 12 }, ...own, title: { standoff: 8, font: { size: narrow ? 10 : 12, color: "var(--muted)" }, ...(own && own.title) },
  });

  const family = getComputedStyle(document.body).fontFamily;

  const draw = (place) => {
    const chart = charts[place.dataset.chart];
    const narrow = place.clientWidth < 560;
    const { xaxis, yaxis, legend, ...rest } = chart.layout;
    const layout = {
      height: narrow ? Math.max(Math.min(chart.height, 430), chart.height * 0.8) : chart.height,
      margin: { l: narrow ? 44 : 64, r: narrow ? 10 : 24, t: 24, b: 48 },
      font: { family, size: narrow ? 11 : 13, color: "var(--ink)" },
      paper_bgcolor: "var(--paper)", plot_bgcolor: "var(--paper)",
      hoverlabel: { bgcolor: "var(--wash)", bordercolor: "var(--rule)", align: "left", namelength: -1, font: { family, color: "var(--ink)", size: narrow ? 11 : 13 } },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", itemsizing: "constant", ...legend },
      xaxis: axis(xaxis, narrow), yaxis: axis(yaxis, narrow), dragmode: narrow ? false : "zoom", ...rest,
    };
    const traces = chart.traces.map((trace) => (
      narrow && trace.meta && trace.meta.label ? { ...trace, text: [trace.meta.short], textfont: { ...trace.textfont, size: 10 } } : trace
    ));
    const styles = getComputedStyle(root);
    Plotly.react(place, painted(traces, styles), painted(layout, styles), {
      responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  };

  const number = (text) => (text === "inf" ? Infinity : Number(text));

  const places = [...document.querySelectorAll("[data-chart]")];
  const drawAll = () => places.forEach(draw);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    table.tHead.addEventListener("click", (event) => {
      const head = event.target.closest("th");
      if (!head) return;
      const at = head.cellIndex;
      const numeric = head.classList.contains("number");
      const previous = head.getAttribute("aria-sort");
      const up = previous ? previous === "descending" : !numeric;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sign = up ? 1 : -1;
      const compare = (left, right) => {
        const [a, b] = [left.cells[at].dataset.value, right.cells[at].dataset.value];
        // A figure that is missing stands last in either order.
        if (a === "" || b === "") return (a === "") - (b === "");
        if (!numeric) return sign * a.localeCompare(b);
        // Two infinities are equal, though their difference is not a number.
        return a === b ? 0 : sign * (number(a) - number(b));
      };
      body.append(...[...body.rows].sort(compare));
    });
  }
})();
