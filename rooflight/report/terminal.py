"""The report on a terminal: tables that read well at any width, and plain text when piped."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rooflight.report import figures
from rooflight.report.columns import Column, columns
from rooflight.report.ink import Ink
from rooflight.report.layout import fit, plain_table, readable, rows_table
from rooflight.report.units import format_bytes, format_count, format_percent, format_ratio, format_seconds
from rooflight.workload.explanation import Explanation

PIPED_WIDTH = 200
NARROW = 100


def console_for(stream: TextIO | None = None) -> Console:
    """A console as wide as the terminal; a pipe gets 200 columns without colour, unless COLUMNS says otherwise."""
    out: TextIO = sys.stdout if stream is None else stream
    if out.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return Console(file=out, highlight=False)
    return Console(file=out, highlight=False, width=PIPED_WIDTH, no_color=True)


def render(explanation: Explanation, console: Console) -> None:
    """Print the whole report: header, table, memory, divisions, advice, notes and provenance.

    No line is wider than the console: columns that do not fit are left out and named, and formulas move below.
    """
    ink = Ink(console)
    sections = [
        _header(explanation, ink, console.width),
        _table(explanation, ink, console.width),
        _memory_and_divisions(explanation, ink, console.width),
        _advice(explanation, ink),
        _notes(explanation, ink),
        _provenance(explanation, ink),
    ]
    shown = [section for section in sections if section is not None]
    if console.is_terminal:
        _print(shown, console)
        return
    with console.capture() as capture:
        _print(shown, console)
    # Tables pad their last column; in a file those blanks are noise.
    plain = "\n".join(line.rstrip() for line in capture.get().splitlines())
    console.out(plain, highlight=False)


def _print(sections: list[RenderableType], console: Console) -> None:
    for index, section in enumerate(sections):
        if index:
            console.print()
        console.print(section, highlight=False, markup=False)


def _header(explanation: Explanation, ink: Ink, width: int) -> RenderableType:
    totals, facts = explanation.totals, explanation.machine
    title = ink.text(explanation.model, "bold")
    title.append(ink.clean(f" on {facts.title or facts.name} · {explanation.phase}"))
    gap = figures.headroom(totals.roof_seconds, totals.expected_seconds)
    times = [
        f"roof {format_seconds(totals.roof_seconds)}",
        f"expected {format_seconds(totals.expected_seconds)}" + (f" ({format_ratio(gap)} the roof)" if gap else ""),
    ]
    if totals.measured_seconds is not None:
        error = figures.prediction_error(totals)
        told = f" (prediction {100 * error:+.1f}%)" if error is not None else ""
        times.append(f"measured {format_seconds(totals.measured_seconds)}{told}")
    shares = [f"{share.name} {format_percent(share.fraction)}" for share in figures.bound_shares(explanation)]
    lines: list[RenderableType] = [
        title,
        ink.flow(figures.program_text(explanation), width, "dim"),
        ink.flow(times, width, "bold"),
    ]
    if shares:
        lines.append(ink.flow([f"bound by {shares[0]}", *shares[1:]], width))
    return Group(*lines)


def _table(explanation: Explanation, ink: Ink, width: int) -> RenderableType:
    if not explanation.rows:
        return ink.text("no operations")
    name_width = max(16, width * 3 // 10)
    kept, left_out = fit(readable(columns(explanation), ink, short=width < NARROW), width, name_width)
    parts: list[RenderableType] = [rows_table(kept, name_width, ink)]
    titles = [column.title for column in left_out if column.title and column.key != "formula"]
    if titles:
        parts.append(ink.text(f"not shown at this width: {', '.join(titles)}", "dim"))
    parts += [ink.text(told, "dim") for told in figures.fused_text(explanation)]
    if any(column.key == "formula" for column in left_out):
        parts += _formulas(explanation, left_out, ink)
    if explanation.legend:
        parts.append(Text())
        parts.append(ink.flow([f"{name} {meaning}" for name, meaning in explanation.legend.items()], width, "dim"))
    return Group(*parts)


def _formulas(explanation: Explanation, left_out: list[Column], ink: Ink) -> list[RenderableType]:
    formulas = next(column for column in left_out if column.key == "formula")
    written: dict[str, list[str]] = {}
    for row, cell in zip(explanation.rows, formulas.cells, strict=True):
        names = written.setdefault(cell.text, [])
        name = figures.label(row, explanation.by)
        if cell.text and name not in names:
            names.append(name)
    if not any(written.values()):
        return []
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", ratio=2)
    for formula, names in written.items():
        if formula:
            table.add_row(ink.text(", ".join(names)), Text(formula))
    return [Text(), Text("FLOPs as a formula", style="bold"), table]


def _memory_and_divisions(explanation: Explanation, ink: Ink, width: int) -> RenderableType:
    blocks = [_memory(explanation, ink), *_divisions(explanation, ink)]
    if width < NARROW:
        spaced: list[RenderableType] = []
        for block in blocks:
            spaced += [block, Text()]
        return Group(*spaced[:-1])
    return Columns(blocks, padding=(1, 4), expand=False)


def _memory(explanation: Explanation, ink: Ink) -> RenderableType:
    memory = explanation.memory
    table = plain_table(ink, ("Memory", False), ("most", True), ("at the peak", True), ("capacity", True))

    def add(name: str, size: float, style: str = "", most: str = "") -> None:
        fraction = size / memory.capacity if memory.capacity > 0 else None
        cells = (name, most, format_bytes(size), format_percent(fraction))
        table.add_row(*map(ink.text, cells), style=style or None)

    for line in figures.memory_lines(memory):
        add(line.name, line.at_peak, most=format_bytes(line.most))
    table.add_section()
    add("total", memory.total, "bold")
    if memory.measured_peak is not None:
        add("measured peak", memory.measured_peak)
    add("capacity", memory.capacity)
    lines: list[RenderableType] = [
        table,
        ink.text(figures.fit_text(memory), "bold green" if memory.fits else "bold red"),
    ]
    if memory.peak_label:
        lines.append(ink.text(f"peak at {memory.peak_label}"))
    return Group(*lines)


def _divisions(explanation: Explanation, ink: Ink) -> list[RenderableType]:
    out: list[RenderableType] = []
    for _, title, parts in figures.divisions(explanation):
        table = plain_table(ink, (title, False), ("FLOPs", True), ("bytes", True), ("expected", True))
        for part in parts:
            sizes = format_count(part.flops), format_bytes(part.bytes), format_seconds(part.expected_seconds)
            table.add_row(*(ink.text(cell) for cell in (part.name, *sizes)))
        out.append(table)
    return out


def _advice(explanation: Explanation, ink: Ink) -> RenderableType | None:
    if not explanation.advice:
        return None
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for index, advice in enumerate(explanation.advice, start=1):
        head = ink.text(advice.change, "bold")
        gain = figures.gain_text(advice, explanation.totals.expected_seconds)
        head.append(ink.clean(f": {gain}"), style="not bold")
        table.add_row(Text(f"{index}."), Group(head, ink.text(advice.why, "dim")))
    return Group(Text("What would win most", style="bold"), table)


def _notes(explanation: Explanation, ink: Ink) -> RenderableType | None:
    if not explanation.notes:
        return None
    lines = [_hanging("-", ink.text(note)) for note in explanation.notes]
    return Group(Text("Notes", style="bold"), *lines)


def _provenance(explanation: Explanation, ink: Ink) -> RenderableType:
    lines: list[RenderableType] = [Text("Where the figures come from", style="bold")]
    lines += [_hanging("-", ink.text(f"{name}: {source}")) for name, source in explanation.provenance.items()]
    return Group(*lines)


def _hanging(mark: str, text: Text) -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark), text)
    return grid
