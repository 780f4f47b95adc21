"""The report for other programs and for documents: CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rooflight.report import figures
from rooflight.report.columns import columns
from rooflight.report.units import format_bytes, format_count, format_seconds
from rooflight.workload.explanation import Explanation, Row

CSV_FIELDS = (
    "path",
    "op",
    "component",
    "phase",
    "count",
    "flops",
    "flops_by_precision",
    "bytes_read",
    "bytes_written",
    "traffic",
    "intensity",
    "bound",
    "primitive",
    "access",
    "movement",
    "roof_seconds",
    "expected_seconds",
    "measured_seconds",
    "formula",
    "provenance",
)


def to_csv(explanation: Explanation) -> str:
    """A line of names, then one a row; bytes and seconds; lists joined by `;`; empty where there is no figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for row in explanation.rows:
        writer.writerow([_csv_cell(row, name) for name in CSV_FIELDS])
    return out.getvalue()


def _csv_cell(row: Row, name: str) -> Any:
    value = getattr(row, name)
    if name == "flops_by_precision":
        return ";".join(f"{precision}={flops!r}" for precision, flops in value.items())
    if name == "movement":
        return ";".join(value)
    return finite(value)


def to_json(explanation: Explanation) -> str:
    """`Explanation.to_json()` as strict JSON: what is infinite or not a number is null."""
    return json.dumps(finite(explanation.to_json()), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """The same data with every infinite float and NaN replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def to_markdown(explanation: Explanation) -> str:
    """The whole report as GitHub-flavoured Markdown; names are escaped, so that none can break a table or add HTML."""
    totals, memory = explanation.totals, explanation.memory
    facts = [
        ("phase", explanation.phase),
        ("program", " · ".join(figures.program_text(explanation))),
        ("roof", format_seconds(totals.roof_seconds)),
        ("expected", format_seconds(totals.expected_seconds)),
    ]
    if totals.measured_seconds is not None:
        facts.append(("measured", format_seconds(totals.measured_seconds)))
    title = explanation.machine.title or explanation.machine.name
    lines = [f"# {escape(explanation.model)} on {escape(title)}", "", *markdown_table(["", ""], facts), ""]

    shown = columns(explanation)
    body = [[column.cells[index].text for column in shown] for index in range(len(explanation.rows))]
    numeric = {index for index, column in enumerate(shown) if column.numeric}
    lines += ["## Where the time goes", ""]
    lines += markdown_table([column.title for column in shown], [*body, [column.total for column in shown]], numeric)
    for told in figures.fused_text(explanation):
        lines += ["", escape(f"{told}.")]
    if explanation.legend:
        lines += ["", escape("; ".join(f"{name}: {meaning}" for name, meaning in explanation.legend.items()))]

    sizes = [(line.name, format_bytes(line.most), format_bytes(line.at_peak)) for line in figures.memory_lines(memory)]
    sizes.append(("total", "", format_bytes(memory.total)))
    if memory.measured_peak is not None:
        sizes.append(("measured peak", "", format_bytes(memory.measured_peak)))
    sizes.append(("capacity", "", format_bytes(memory.capacity)))
    lines += ["", "## Memory", "", *markdown_table(["", "most", "at the peak"], sizes, {1, 2})]
    where = f"; the peak is at {memory.peak_label}" if memory.peak_label else ""
    lines += ["", escape(f"It {figures.fit_text(memory)}{where}.")]

    for _, name, parts in figures.divisions(explanation):
        slices = [
            (part.name, format_count(part.flops), format_bytes(part.bytes), format_seconds(part.expected_seconds))
            for part in parts
        ]
        lines += ["", f"## {name}", "", *markdown_table(["", "FLOPs", "bytes", "expected"], slices, {1, 2, 3})]

    if explanation.advice:
        gains = [
            (advice.change, figures.gain_text(advice, totals.expected_seconds), advice.why)
            for advice in explanation.advice
        ]
        lines += ["", "## What would win most", "", *markdown_table(["change", "gain", "why"], gains)]
    if explanation.notes:
        lines += ["", "## Notes", "", *(f"- {escape(note)}" for note in explanation.notes)]
    lines += ["", "## Where the figures come from", ""]
    lines += [f"- {escape(name)}: {escape(source)}" for name, source in explanation.provenance.items()]
    return "\n".join(lines) + "\n"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> list[str]:
    right = set(numeric)
    rule = ["---:" if index in right else "---" for index in range(len(titles))]
    return [_line(escape(title) for title in titles), _line(rule), *(_line(map(escape, row)) for row in rows)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text that Markdown shows as it stands: formulas keep their stars, and a name adds no cell, line or tag."""
    flat = html.escape(" ".join(text.split()), quote=False).replace("\\", "\\\\")
    for character in "|*_`[]":
        flat = flat.replace(character, f"\\{character}")
    return flat
