"""The report as one HTML page that opens without a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from rooflight.errors import InvalidValue
from rooflight.report import figures, units
from rooflight.report.charts import memory_over_time, where_time_goes
from rooflight.report.columns import columns
from rooflight.report.files import finite
from rooflight.report.roofline import placeless, roofline
from rooflight.workload.explanation import Explanation


@dataclass(frozen=True, slots=True)
class Headline:
    """One large figure with what it is and what to hold it against."""

    name: str
    figure: str
    detail: str
    tone: str = ""


def to_html(explanation: Explanation) -> str:
    """One self-contained page: styles, script, data and plotly.js are inside, and nothing is fetched.

    Every name from the model is escaped, in the markup, in the embedded data and in the charts' own strings.
    """
    # Importing plotly takes a good part of a second, which the other reports need not pay.
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise InvalidValue("the HTML report needs plotly, which is not installed here; pip install plotly") from error

    charts = {
        "roofline": roofline(explanation),
        "time": where_time_goes(explanation),
        "memory": memory_over_time(explanation),
    }
    hidden = placeless(explanation)
    return _template().render(
        explanation=explanation,
        columns=columns(explanation),
        largest_share=max(figures.time_shares(explanation.rows), default=0.0),
        headlines=_headlines(explanation),
        machine=explanation.machine.title or explanation.machine.name,
        memory_lines=figures.memory_lines(explanation.memory),
        fit=figures.fit_text(explanation.memory),
        divisions=figures.divisions(explanation),
        bounds=figures.bound_shares(explanation),
        sources=figures.provenance_shares(explanation),
        program=figures.program_text(explanation),
        fused=figures.fused_text(explanation),
        gain=figures.gain_text,
        hidden_names=sorted({row.op for row in hidden}),
        hidden_share=_part(sum(row.expected_seconds for row in hidden), explanation),
        units=units,
        charts=finite(charts),
        style=_asset("report.css"),
        script=_asset("report.js"),
        plotly=Markup(get_plotlyjs()),
    )


def _headlines(explanation: Explanation) -> list[Headline]:
    totals, facts, memory = explanation.totals, explanation.machine, explanation.memory
    seconds = totals.expected_seconds if totals.measured_seconds is None else totals.measured_seconds
    out = [
        Headline("Roof", units.format_seconds(totals.roof_seconds), "what physics allows"),
        Headline(
            "Expected",
            units.format_seconds(totals.expected_seconds),
            f"{units.format_ratio(figures.headroom(totals.roof_seconds, totals.expected_seconds))} the roof",
        ),
    ]
    if totals.measured_seconds is not None:
        error = figures.prediction_error(totals)
        gap = figures.headroom(totals.roof_seconds, totals.expected_seconds, totals.measured_seconds)
        told = f"; prediction {100 * error:+.1f}%" if error is not None else ""
        detail = f"{units.format_ratio(gap)} the roof{told}"
        out.append(Headline("Measured", units.format_seconds(totals.measured_seconds), detail))
    shares = figures.bound_shares(explanation)
    if shares:
        others = ", ".join(f"{share.name} {units.format_percent(share.fraction)}" for share in shares[1:])
        detail = f"{units.format_percent(shares[0].fraction)} of the time" + (f"; {others}" if others else "")
        out.append(Headline("Bound by", shares[0].name, detail))
    precision = next(iter(figures.flops_by_precision(figures.finest(explanation))), "")
    if seconds > 0 and facts.peaks.get(precision, 0) > 0:
        rate, peak = totals.flops / seconds, facts.peaks[precision]
        detail = f"{units.format_percent(rate / peak)} of {units.format_flop_rate(peak)} {precision}"
        out.append(Headline("Arithmetic", units.format_flop_rate(rate), detail))
    if seconds > 0 and facts.memory_bandwidth > 0:
        rate, most = (totals.bytes_read + totals.bytes_written) / seconds, facts.memory_bandwidth
        detail = f"{units.format_percent(rate / most)} of {units.format_bandwidth(most)}"
        out.append(Headline("Memory traffic", units.format_bandwidth(rate), detail))
    tone = "good" if memory.fits else "bad"
    detail = f"of {units.format_bytes(memory.capacity)}: {figures.fit_text(memory)}"
    out.append(Headline("Memory", units.format_bytes(memory.total), detail, tone))
    return out


def _part(seconds: float, explanation: Explanation) -> float:
    whole = sum(row.expected_seconds for row in figures.finest(explanation))
    return seconds / whole if whole > 0 else 0.0


def _asset(name: str) -> Markup:
    return Markup(files("rooflight.report").joinpath("assets", name).read_text(encoding="utf-8"))


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("rooflight.report").joinpath("assets", "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
