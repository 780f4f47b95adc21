"""CSV, JSON and Markdown reports, read back."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from rooflight.report import to_csv, to_json, to_markdown
from rooflight.report.units import format_bytes, format_seconds
from rooflight.workload.explanation import Explanation


def _refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_csv_reads_back_to_the_rows(explanation: Explanation) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(explanation))))
    assert len(lines) == len(explanation.rows)
    for line, row in zip(lines, explanation.rows, strict=True):
        assert (line["component"], line["phase"], line["formula"]) == (row.component, row.phase, row.formula)
        for name in ("count", "flops", "bytes_read", "bytes_written", "roof_seconds", "expected_seconds"):
            assert float(line[name]) == getattr(row, name)
        assert (line["measured_seconds"] == "") == (row.measured_seconds is None)
        assert line["movement"].split(";") == (row.movement or [""])
        precisions = dict(part.split("=") for part in line["flops_by_precision"].split(";"))
        assert {name: float(flops) for name, flops in precisions.items()} == row.flops_by_precision


def test_csv_keeps_commas_quotes_and_lines_inside_a_cell(decode: Explanation) -> None:
    decode.rows[0].path = 'a,"b"\nc'
    assert next(csv.DictReader(io.StringIO(to_csv(decode))))["path"] == 'a,"b"\nc'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_json_and_empty_in_csv(decode: Explanation, value: float) -> None:
    decode.rows[0].intensity = value
    decode.totals.intensity = value
    decode.settings["threshold"] = [value, {"deep": value}]
    data = json.loads(to_json(decode), parse_constant=_refuse)
    assert data["rows"][0]["intensity"] is None
    assert data["totals"]["intensity"] is None
    assert data["settings"]["threshold"] == [None, {"deep": None}]
    assert next(csv.DictReader(io.StringIO(to_csv(decode))))["intensity"] == ""


def test_json_has_the_stable_keys(explanation: Explanation) -> None:
    data = json.loads(to_json(explanation), parse_constant=_refuse)
    assert {"model", "machine", "phase", "batch", "context", "advice", "provenance"} <= data.keys()
    assert {"total", "active", "embedding"} <= data["params"].keys()
    timed = {"flops", "bytes_read", "bytes_written", "intensity"}
    timed |= {"roof_seconds", "expected_seconds", "measured_seconds"}
    assert timed <= data["totals"].keys()
    named = {"path", "op", "count", "bound", "primitive", "access", "movement", "formula"}
    assert timed | named <= data["rows"][0].keys()
    assert {"weights", "gradients", "optimizer", "activations_peak", "kv_cache", "total"} <= data["memory"].keys()
    assert {"change", "saves_seconds", "saves_bytes", "why"} <= data["advice"][0].keys()
    assert data["machine"] == explanation.machine.name
    assert [row["expected_seconds"] for row in data["rows"]] == [row.expected_seconds for row in explanation.rows]
    assert data["memory"]["fits"] == explanation.memory.fits


def test_markdown_holds_every_row_and_section(explanation: Explanation) -> None:
    text = to_markdown(explanation)
    lines = text.splitlines()
    for row in explanation.rows:
        figures = [
            f"| {row.component} |",
            format_seconds(row.expected_seconds),
            format_bytes(row.bytes_read + row.bytes_written),
        ]
        assert any(all(figure in line for figure in figures) for line in lines), figures
        assert row.formula.replace("*", "\\*") in text
    for advice in explanation.advice:
        assert advice.change in text
    for part in (*explanation.primitives, *explanation.access, *explanation.movement):
        assert any(line.startswith(f"| {part.name} |") for line in lines)
    for note in explanation.notes:
        assert f"- {note}" in lines


def test_every_markdown_table_is_rectangular(explanation: Explanation) -> None:
    explanation.rows[0].component = "a|b\nc<script>`x`"
    text = to_markdown(explanation)
    assert "<script>" not in text
    width = 0
    for line in text.splitlines():
        cells = line.replace("\\|", "").count("|") if line.startswith("|") else 0
        assert cells in (0, width) or width == 0, line
        width = cells
