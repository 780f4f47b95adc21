"""The columns of the table of rows, which the terminal, Markdown and HTML reports show in one order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rooflight.report import figures
from rooflight.report.units import (
    format_bytes,
    format_count,
    format_intensity,
    format_percent,
    format_ratio,
    format_seconds,
)
from rooflight.workload.explanation import Explanation, Row


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of one row: what is read, and what it sorts by."""

    text: str
    value: str | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """One column with its cells, a row each, and its total.

    expendable: in a narrow place the columns with the largest number go first; 0 stays.
    """

    key: str
    title: str
    cells: list[Cell]
    total: str
    numeric: bool
    expendable: int
    hint: str = ""


def columns(explanation: Explanation) -> list[Column]:
    """Columns of `explanation.rows`, in reading order; measured and phase only where there is something to tell."""
    rows, totals = explanation.rows, explanation.totals
    shares = figures.time_shares(rows)

    def text(key: str, title: str, of: Callable[[Row], str], expendable: int, hint: str = "") -> Column:
        return Column(key, title, [Cell(of(row), of(row)) for row in rows], "", False, expendable, hint)

    def number(
        key: str,
        title: str,
        values: list[float | None],
        total: float | None,
        write: Callable[[float | None], str],
        expendable: int,
        hint: str,
    ) -> Column:
        cells = [Cell(write(value), None if value is None or math.isnan(value) else value) for value in values]
        return Column(key, title, cells, write(total) if total is not None else "", True, expendable, hint)

    out = [text("name", explanation.by, lambda row: figures.label(row, explanation.by), 0)]
    out[0] = Column("name", explanation.by, out[0].cells, "total", False, 0)
    if figures.has_phases(rows):
        out.append(text("phase", "phase", lambda row: row.phase, 9))
    out += [
        number("count", "calls", [row.count for row in rows], None, format_count, 11, "times that it runs in a step"),
        number("flops", "FLOPs", [row.flops for row in rows], totals.flops, format_count, 6, "a multiply-add is 2"),
        number(
            "bytes",
            "bytes",
            [row.bytes_read + row.bytes_written for row in rows],
            totals.bytes_read + totals.bytes_written,
            format_bytes,
            5,
            "unique bytes read and written",
        ),
        number(
            "intensity",
            "FLOP/B",
            [figures.intensity(row) for row in rows],
            totals.intensity,
            format_intensity,
            8,
            "arithmetic intensity: FLOPs a byte",
        ),
        text("bound", "bound", lambda row: row.bound, 4, "the largest term of the expected time"),
        number(
            "roof",
            "roof",
            [row.roof_seconds for row in rows],
            totals.roof_seconds,
            format_seconds,
            3,
            "time that physics allows",
        ),
        number(
            "expected",
            "expected",
            [row.expected_seconds for row in rows],
            totals.expected_seconds,
            format_seconds,
            0,
            "time at this machine's efficiency",
        ),
    ]
    if figures.is_measured(explanation):
        measured = [row.measured_seconds for row in rows]
        out.append(
            number("measured", "measured", measured, totals.measured_seconds, format_seconds, 1, "time when it was run")
        )
    gaps = [figures.headroom(row.roof_seconds, row.expected_seconds, row.measured_seconds) for row in rows]
    whole = figures.headroom(totals.roof_seconds, totals.expected_seconds, totals.measured_seconds)
    out += [
        number("share", "share", list(shares), 1.0 if rows else None, format_percent, 2, "of the rows' expected time"),
        number("headroom", "headroom", gaps, whole, format_ratio, 7, "measured time, else expected, over roof"),
        Column(
            "source",
            "source",
            [Cell(source, source) for source in figures.sources(explanation)],
            "",
            False,
            10,
            "where most of the expected time comes from, and how much of it",
        ),
    ]
    if any(row.formula for row in rows):
        out.append(text("formula", "formula", lambda row: row.formula, 10, "FLOPs as a formula"))
    return out
