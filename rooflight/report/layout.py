"""Tables that fit a terminal's width by leaving whole columns out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from rooflight.report.columns import Cell, Column
from rooflight.report.ink import Ink

GAP = 2
_SHORT = {"communication": "comm", "extrapolated": "extrapol.", "interpolated": "interpol."}
# Lines above and below the body alone; the order of the rows is that of rich.box.Box.
_LINES = box.Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")
_ASCII_LINES = box.Box("    \n    \n -- \n    \n -- \n    \n    \n    \n", ascii=True)
_BOUND_STYLES = {"compute": "blue", "memory": "yellow", "launch": "magenta", "communication": "cyan", "comm": "cyan"}


def plain_table(ink: Ink, *titles: tuple[str, bool]) -> Table:
    """A table without a frame; each title says whether its column holds numbers."""
    table = Table(
        box=_ASCII_LINES if ink.ascii else _LINES,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for title, numeric in titles:
        table.add_column(Text(title), justify="right" if numeric else "left", overflow="fold")
    return table


def fit(columns: Sequence[Column], width: int, name_width: int) -> tuple[list[Column], list[Column]]:
    """(kept, left out): the most expendable columns go until the rest fits; a column of zero never goes."""
    kept = list(columns)
    while sum(_width(column, name_width) for column in kept) + GAP * (len(kept) - 1) > width:
        expendable = max(kept, key=lambda column: column.expendable)
        if expendable.expendable == 0:
            break
        kept.remove(expendable)
    return kept, [column for column in columns if column not in kept]


def _width(column: Column, name_width: int) -> int:
    natural = max(cell_len(text) for text in (column.title, column.total, *(cell.text for cell in column.cells)))
    return min(natural, name_width) if column.key == "name" else natural


def readable(columns: Sequence[Column], ink: Ink, *, short: bool) -> list[Column]:
    """The columns as this console can show them, a bar beside the share; `short` cuts the longest words down."""
    out: list[Column] = []
    for column in columns:
        cells = [
            Cell(ink.clean(_SHORT.get(cell.text, cell.text) if short else cell.text), cell.value)
            for cell in column.cells
        ]
        out.append(replace(column, title=ink.clean(column.title), cells=cells, total=ink.clean(column.total)))
        if column.key == "share":
            shares = [cell.value if isinstance(cell.value, float) else 0.0 for cell in column.cells]
            bars = [Cell(ink.bar(share / max(shares)) if share else "", share) for share in shares]
            out.append(Column("bar", "", bars, "", False, 8))
    return out


def rows_table(kept: Sequence[Column], name_width: int, ink: Ink) -> Table:
    """The kept columns as a table, with the totals under a line."""
    table = plain_table(ink)
    for column in kept:
        name = column.key == "name"
        table.add_column(
            Text(column.title),
            justify="right" if column.numeric else "left",
            overflow="fold",
            no_wrap=not name,
            max_width=name_width if name else None,
        )
    for index in range(len(kept[0].cells)):
        table.add_row(*(_cell(column, column.cells[index].text) for column in kept))
    table.add_section()
    table.add_row(*(Text(column.total) for column in kept), style="bold")
    return table


def _cell(column: Column, text: str) -> Text:
    return Text(text, style=_BOUND_STYLES.get(text, "") if column.key == "bound" else "")
