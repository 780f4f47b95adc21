"""The report of a dry training run: for a terminal, as JSON, and as one HTML page."""

from __future__ import annotations

import io
import json
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rooflight.errors import InvalidValue
from rooflight.report import figures, units
from rooflight.report.charts import memory_over_time, where_time_goes
from rooflight.report.columns import columns
from rooflight.report.files import finite
from rooflight.report.html import Headline
from rooflight.report.ink import Ink
from rooflight.report.layout import fit, plain_table, readable, rows_table
from rooflight.report.memory_text import memory_chart
from rooflight.report.roofline import roofline
from rooflight.report.terminal import NARROW, PIPED_WIDTH
from rooflight.train.dry import DryRun
from rooflight.workload.explanation import Explanation


def render(run: DryRun, console: Console) -> None:
    """Print the report; plain text without trailing blanks where the console is no terminal."""
    if console.is_terminal:
        _print(run, console)
        return
    with console.capture() as capture:
        _print(run, console)
    console.out("\n".join(line.rstrip() for line in capture.get().splitlines()), highlight=False)


def to_text(run: DryRun) -> str:
    """The terminal's report as plain text."""
    out = io.StringIO()
    render(run, Console(file=out, width=PIPED_WIDTH, no_color=True, highlight=False))
    return out.getvalue()


def to_json(run: DryRun) -> str:
    """The run's fields as strict JSON; bytes and seconds."""
    return json.dumps(finite(run.to_json()), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_explanation(run: DryRun) -> Explanation:
    """The run as what `rooflight explain` would tell of it, for the tables and charts that both reports share."""
    return Explanation(
        model=run.model,
        machine=run.machine,
        phase="train",
        batch=run.batch_size,
        context=run.context,
        dtype=run.dtype,
        settings=_settings(run),
        params=run.params,
        totals=run.totals,
        rows=run.components,
        by="component",
        components=run.components,
        points=run.points,
        primitives=[],
        access=[],
        movement=[],
        memory=run.memory,
        advice=[],
        provenance=run.provenance,
        notes=run.notes,
    )


def _settings(run: DryRun) -> dict[str, object]:
    told: dict[str, object] = {}
    if run.micro_batches > 1:
        told["in"] = f"{run.micro_batches} micro-batches of {run.micro_batch_size}"
    for name, value in run.settings.items():
        if name == "master_weights":
            told["masters"] = "fp32" if value else "none"
        else:
            told[name] = value
    return told


def _print(run: DryRun, console: Console) -> None:
    ink, width = Ink(console), console.width
    seconds = run.timeline_seconds
    sections: list[RenderableType] = [
        _header(run, ink, width),
        ink.text(run.verdict, "bold green" if run.fits else "bold red"),
        _memory(run, ink),
        Group(
            Text("Memory over the step", style="bold"),
            memory_chart(run.memory.timeline, run.memory.capacity, seconds, ink, width),
            *(ink.text(note, "dim") for note in run.notes),
        ),
        _components(run, ink, width),
        Group(Text("Where the figures come from", style="bold"), _sources(run, ink)),
    ]
    for index, section in enumerate(sections):
        if index:
            console.print()
        console.print(section, highlight=False, markup=False)


def _header(run: DryRun, ink: Ink, width: int) -> RenderableType:
    title = ink.text(run.model, "bold")
    title.append(ink.clean(f" on {run.machine.title or run.machine.name} · train, dry"))
    gap = figures.headroom(run.totals.roof_seconds, run.totals.expected_seconds)
    times = [
        f"step roof {units.format_seconds(run.totals.roof_seconds)}",
        f"expected {units.format_seconds(run.totals.expected_seconds)} ({units.format_ratio(gap)} the roof)",
        f"{units.format_count(run.tokens_per_second)} tokens/s",
        f"{units.format_parameters(run.tokens_per_day)} tokens a day",
    ]
    lines: list[RenderableType] = [
        title,
        ink.flow(figures.program_text(as_explanation(run)), width, "dim"),
        ink.flow(times, width, "bold"),
        ink.flow(_shares(run), width),
    ]
    if run.budget is not None:
        lines.append(ink.flow(_budget(run), width))
    return Group(*lines)


def _shares(run: DryRun) -> list[str]:
    """MFU in both conventions, and the share of the ceiling where that was measured."""
    told = [f"MFU {units.format_percent(run.mfu)} (causal attention counted half)"]
    told.append(f"{units.format_percent(run.mfu_full)} (counted whole)")
    if run.of_ceiling is not None:
        told.append(f"{units.format_percent(run.of_ceiling)} of the measured GEMM ceiling")
    return told


def _budget(run: DryRun) -> list[str]:
    """What the budget of tokens takes."""
    budget = run.budget
    if budget is None:
        return []
    told = [
        f"{units.format_parameters(budget.tokens)} tokens",
        f"{budget.steps:,} steps",
        units.format_seconds(budget.days * 86400) if budget.days < 1 else f"{_figure(budget.days)} days",
        f"{_figure(budget.gpu_hours)} {'machine' if run.kind == 'cpu' else 'GPU'}-hours",
    ]
    if budget.usd is not None:
        told.append(f"${budget.usd:,.2f} at ${budget.usd_per_hour:,.2f} an hour ({budget.source})")
    return told


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(run: DryRun, ink: Ink) -> RenderableType:
    memory = run.memory
    table = plain_table(ink, ("Memory", False), ("most", True), ("at the peak", True), ("of capacity", True))

    def add(name: str, most: str, size: float, style: str = "") -> None:
        share = units.format_percent(size / memory.capacity if memory.capacity else None)
        table.add_row(*map(ink.text, (name, most, units.format_bytes(size), share)), style=style or None)

    for line in figures.memory_lines(memory):
        add(line.name, units.format_bytes(line.most), line.at_peak)
    table.add_section()
    add("total", "", memory.total, "bold")
    add("capacity", "", memory.capacity)
    return Group(table, ink.text(f"peak at {memory.peak_label}", "dim"))


def _components(run: DryRun, ink: Ink, width: int) -> RenderableType:
    explanation = as_explanation(run)
    name_width = max(16, width * 3 // 10)
    kept, left_out = fit(readable(columns(explanation), ink, short=width < NARROW), width, name_width)
    parts: list[RenderableType] = [rows_table(kept, name_width, ink)]
    titles = [column.title for column in left_out if column.title]
    if titles:
        parts.append(ink.text(f"not shown at this width: {', '.join(titles)}", "dim"))
    return Group(*parts)


def _sources(run: DryRun, ink: Ink) -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, source in run.provenance.items():
        grid.add_row(Text("-"), ink.text(f"{name}: {source}"))
    return grid


def to_html(run: DryRun) -> str:
    """One self-contained page: headline figures, memory over time, where the time goes, the table; nothing is fetched.

    Every name from the model is escaped, in the markup, in the embedded data and in the charts' own strings.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise InvalidValue("the HTML report needs plotly, which is not installed here; pip install plotly") from error

    explanation = as_explanation(run)
    over_time = memory_over_time(explanation)
    over_time["layout"]["xaxis"]["title"]["text"] = f"time: {units.format_seconds(run.timeline_seconds)} in all"
    charts = {"memory": over_time, "time": where_time_goes(explanation), "roofline": roofline(explanation)}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("training.html.j2")).render(
        run=run,
        machine=run.machine.title or run.machine.name,
        program=figures.program_text(explanation),
        headlines=_headlines(run),
        memory_lines=figures.memory_lines(run.memory),
        columns=columns(explanation),
        largest_share=max(figures.time_shares(run.components), default=0.0),
        sources=figures.provenance_shares(explanation),
        units=units,
        charts=finite(charts),
        style=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
        plotly=Markup(get_plotlyjs()),
    )


def _headlines(run: DryRun) -> list[Headline]:
    gap = figures.headroom(run.totals.roof_seconds, run.totals.expected_seconds)
    out = [
        Headline("Step", units.format_seconds(run.totals.expected_seconds), f"{units.format_ratio(gap)} the roof"),
        Headline(
            "Tokens a second",
            units.format_count(run.tokens_per_second),
            f"{units.format_parameters(run.tokens_per_day)} a day",
        ),
        Headline(
            "MFU",
            units.format_percent(run.mfu),
            f"{units.format_percent(run.mfu_full)} with attention counted whole"
            + (f"; {units.format_percent(run.of_ceiling)} of the GEMM ceiling" if run.of_ceiling is not None else ""),
        ),
    ]
    if run.budget is not None:
        what, _, days, *rest = _budget(run)
        out.append(Headline(what, days, "; ".join(rest)))
    tone = "good" if run.fits else "bad"
    detail = f"of {units.format_bytes(run.memory.capacity)}: {figures.fit_text(run.memory)}"
    out.append(Headline("Memory", units.format_bytes(run.memory.total), detail, tone))
    return out


def _asset(name: str) -> str:
    return files("rooflight.report").joinpath("assets", name).read_text(encoding="utf-8")


__all__ = ["as_explanation", "render", "to_html", "to_json", "to_text"]
