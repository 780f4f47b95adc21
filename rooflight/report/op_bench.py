"""The report of `bench ops`: a table as wide as the terminal allows, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.text import Text

from rooflight.report.columns import Cell, Column
from rooflight.report.files import escape, finite, markdown_table
from rooflight.report.ink import Ink
from rooflight.report.layout import fit, plain_table
from rooflight.report.units import (
    MISSING,
    format_bandwidth,
    format_flop_rate,
    format_percent,
    format_ratio,
    format_seconds,
)
from rooflight.workload.op_bench import Measured, Result, Row

# In the order in which they stand in the table; others follow.
_PEERS = ("eager", "compile", "cudnn", "flash", "efficient", "math", "flex", "fa2", "fa3", "liger", "fused")
_PASSES = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}
_NAME_WIDTH = 60


def render(result: Result, console: Console) -> None:
    """Print the report; plain text without trailing blanks where the console is no terminal."""
    if console.is_terminal:
        _print(result, console)
        return
    with console.capture() as capture:
        _print(result, console)
    console.out("\n".join(line.rstrip() for line in capture.get().splitlines()), highlight=False)


def to_json(result: Result) -> str:
    """All figures as strict JSON: seconds, bytes, FLOPs, shares as fractions."""
    return json.dumps(finite(result.to_json()), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def to_markdown(result: Result) -> str:
    """The report as GitHub-flavoured Markdown."""
    shown = columns(result)
    cells = [[column.cells[index].text for column in shown] for index in range(len(result.rows))]
    numeric = [index for index, column in enumerate(shown) if column.numeric]
    lines = [f"# bench ops: {escape(_subject(result))}", "", escape(" · ".join(result.facts)), ""]
    lines += markdown_table([column.title for column in shown], cells, numeric)
    if result.notes:
        lines += ["", *(f"- {escape(note)}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def columns(result: Result) -> list[Column]:
    """The columns in reading order; those of a roof, and of peers, only where there are any."""
    rows = result.rows

    def column(
        key: str, title: str, write: Callable[[Row], str], expendable: int = 0, *, numeric: bool = True
    ) -> Column:
        return Column(key, title, [Cell(write(row), None) for row in rows], "", numeric, expendable)

    shown = [
        column("name", "operation", lambda row: f"{row.operation} {row.shape}", numeric=False),
        column("pass", "pass", lambda row: _PASSES[row.which], numeric=False),
        column("seconds", "time", lambda row: told(row.ours)),
        column("rate", "rate", rate),
    ]
    if any(row.roof_seconds is not None for row in rows):
        shown.append(column("roof", "of the roof", lambda row: _share(row, row.share_of_roof)))
    if any(row.ceiling_seconds is not None for row in rows):
        shown.append(column("ceiling", "of measured", lambda row: _share(row, row.share_of_ceiling), 2))
    if any(row.bound is not None for row in rows):
        shown.append(column("bound", "bound", lambda row: row.bound or "", 4, numeric=False))
    names = {peer.name for row in rows for peer in row.peers}
    if names:
        shown.append(column("best", "against the best peer", _best))
    for place, name in enumerate(sorted(names, key=_order)):
        shown.append(column(name, name, lambda row, name=name: _peer(row, name), 10 + place))
    shown.append(column("error", "error", _error, 3))
    return shown


def told(one: Measured) -> str:
    """A candidate's time, or why there is none to rely on."""
    if one.state == "wrong":
        return "WRONG"
    return "failed" if one.seconds is None else format_seconds(one.seconds) + ("?" if one.state == "unchecked" else "")


def rate(row: Row) -> str:
    """FLOP/s where arithmetic binds, else bytes a second; nothing for what is wrong."""
    if row.ours.state == "wrong":
        return MISSING
    return format_flop_rate(row.flop_per_s) if row.by_compute else format_bandwidth(row.bytes_per_s)


def _share(row: Row, share: float | None) -> str:
    return MISSING if row.ours.state == "wrong" else format_percent(share)


def _order(name: str) -> tuple[int, str]:
    return (_PEERS.index(name) if name in _PEERS else len(_PEERS)), name


def _best(row: Row) -> str:
    best = row.best_peer
    if best is None or row.ours.state == "wrong":
        return ""
    return f"{format_ratio(row.speed_up)} {best.name}"


def _peer(row: Row, name: str) -> str:
    return next((told(peer) for peer in row.peers if peer.name == name), "")


def _error(row: Row) -> str:
    return MISSING if row.ours.verdict is None else f"{row.ours.verdict.error:.1e}"


def _subject(result: Result) -> str:
    return f"{result.device}, against the roof of {result.machine}" if result.machine else result.device


def _print(result: Result, console: Console) -> None:
    ink = Ink(console)
    head = ink.text("bench ops: ", "bold")
    head.append(ink.clean(_subject(result)))
    sections: list[RenderableType] = [Group(head, ink.flow(result.facts, console.width, "dim"))]
    kept, left_out = fit(columns(result), console.width, _NAME_WIDTH)
    table = plain_table(ink)
    for column in kept:
        name = column.key == "name"
        table.add_column(
            Text(ink.clean(column.title)),
            justify="right" if column.numeric else "left",
            overflow="fold",
            no_wrap=not name,
            max_width=_NAME_WIDTH if name else None,
        )
    for index, row in enumerate(result.rows):
        style = "bold red" if row.ours.state in ("wrong", "failed") else None
        table.add_row(*(ink.text(column.cells[index].text) for column in kept), style=style)
    sections.append(table)
    if left_out:
        titles = ", ".join(column.title for column in left_out)
        sections[-1] = Group(table, ink.text(f"not shown at this width: {titles}", "dim"))
    if result.notes:
        sections.append(Group(Text("Notes", style="bold"), *(ink.text(f"- {note}") for note in result.notes)))
    for index, section in enumerate(sections):
        if index:
            console.print()
        console.print(section, highlight=False, markup=False)


__all__ = ["columns", "rate", "render", "to_json", "to_markdown", "told"]
