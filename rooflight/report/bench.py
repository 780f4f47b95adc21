"""The report of a benchmark: a table on a terminal, plain text in a pipe, JSON and Markdown."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.text import Text

from rooflight.report import units
from rooflight.report.files import finite
from rooflight.report.ink import Ink
from rooflight.report.layout import plain_table
from rooflight.report.terminal import PIPED_WIDTH
from rooflight.serve.bench.result import Result, Row

_INDENT = "  "


def render(result: Result, console: Console) -> None:
    """Print the report; plain text without trailing blanks where the console is no terminal."""
    if console.is_terminal:
        _print(result, console)
        return
    with console.capture() as capture:
        _print(result, console)
    console.out("\n".join(line.rstrip() for line in capture.get().splitlines()), highlight=False)


def to_text(result: Result) -> str:
    """The terminal's report as plain text."""
    out = io.StringIO()
    render(result, Console(file=out, width=PIPED_WIDTH, no_color=True, highlight=False))
    return out.getvalue()


def to_json(result: Result, detailed: bool = False) -> str:
    """The figures as strict JSON under vLLM's names; detailed: with every request's."""
    return json.dumps(finite(result.to_json(detailed)), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def to_markdown(result: Result) -> str:
    """The report as GitHub-flavoured Markdown."""
    titles = _titles(result)
    lines = [f"# bench {result.command}: {_escape(_subject(result))}", ""]
    lines += [_escape(" · ".join(result.facts)), ""] if result.facts else []
    lines += [_line(titles), _line(["---"] + ["---:"] * (len(titles) - 1))]
    for group, label, cells in _rows(result):
        lines.append(_line([_escape(f"{group}, {label}" if group else label), *cells]))
    if result.notes:
        lines += ["", *(f"- {_escape(note)}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def _print(result: Result, console: Console) -> None:
    ink = Ink(console)
    titles = _titles(result)
    table = plain_table(ink, (titles[0], False), *((title, True) for title in titles[1:]))
    last = ""
    for group, label, cells in _rows(result):
        if group and group != last:
            table.add_section()
            table.add_row(ink.text(group, "bold"), *("" for _ in cells))
        last = group
        table.add_row(ink.text((_INDENT if group else "") + label), *map(ink.text, cells))
    head = ink.text(f"bench {result.command}: ", "bold")
    head.append(ink.clean(_subject(result)))
    sections: list[RenderableType] = [Group(head, ink.flow(result.facts, console.width, "dim")), table]
    if result.notes:
        sections.append(Group(Text("Notes", style="bold"), *(ink.text(f"- {note}") for note in result.notes)))
    for index, section in enumerate(sections):
        if index:
            console.print()
        console.print(section, highlight=False, markup=False)


def _subject(result: Result) -> str:
    return f"{result.model} on {', '.join(dict.fromkeys(run.machine for run in result.runs))}"


def _titles(result: Result) -> list[str]:
    shares = [any(row.of_roof is not None for row in run.rows) for run in result.runs]
    titles = [""]
    for run, shared in zip(result.runs, shares, strict=True):
        titles += [run.name, "of the roof"] if shared else [run.name]
    return [*titles, "dry / wet"] if len(result.runs) > 1 else titles


def _rows(result: Result) -> Iterator[tuple[str, str, list[str]]]:
    """(group, label, cells) of each row of the first run, the others' beside it."""
    shares = [any(row.of_roof is not None for row in run.rows) for run in result.runs]
    ratios = result.ratios
    for row in result.runs[0].rows:
        cells: list[str] = []
        for run, shared in zip(result.runs, shares, strict=True):
            own = next((each for each in run.rows if each.key == row.key), None)
            cells.append(figure(own) if own is not None else units.MISSING)
            if shared:
                cells.append(units.format_percent(own.of_roof) if own is not None and own.of_roof is not None else "")
        if ratios:
            cells.append(units.format_ratio(ratios[row.key]))
        yield row.group, row.label, cells


def figure(row: Row) -> str:
    """A row's value with its unit: counts, and what is 1000 or more, whole; all else with four digits."""
    if row.value is None:
        return units.MISSING
    if row.unit == "count":
        return f"{row.value:,.0f}"
    return f"{row.value:,.0f} {row.unit}" if abs(row.value) >= 999.95 else f"{row.value:.4g} {row.unit}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Names and notes that can break neither the table nor the page."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\|*_`[]":
        flat = flat.replace(character, f"\\{character}")
    return flat


__all__ = ["figure", "render", "to_json", "to_markdown", "to_text"]
