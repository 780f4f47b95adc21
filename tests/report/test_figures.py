"""Figures that all reports share: sources, memory lines, intensity, what a program is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rooflight.report import figures
from rooflight.report.columns import columns
from rooflight.workload.explanation import Explanation


def test_a_source_says_how_much_of_the_time_it_accounts_for(decode: Explanation) -> None:
    row = next(row for row in decode.rows if row.component == "feed-forward")
    mine = [point for point in decode.points if point.component == "feed-forward"]
    assert {point.provenance for point in mine} == {"interpolated", "datasheet"}
    linears = sum(point.expected_seconds for point in mine if point.provenance == "interpolated")
    share = linears / sum(point.expected_seconds for point in mine)
    assert 0.5 < share < 0.995
    assert figures.sources(decode)[decode.rows.index(row)] == f"interpolated {100 * share:.0f}%"


def test_a_source_of_all_the_time_stands_alone(decode: Explanation) -> None:
    for point in decode.points:
        point.provenance = "measured"
    assert set(figures.sources(decode)) == {"measured"}


def test_without_points_a_source_is_the_rows_own(decode: Explanation) -> None:
    decode.points = []
    assert figures.sources(decode) == [row.provenance for row in decode.rows]


def test_memory_lines_show_the_most_of_each_and_what_stands_at_the_peak(train: Explanation) -> None:
    memory = train.memory
    memory.at_peak = [("weights", memory.weights), ("kv cache", 3.0), ("inputs", 5.0)]
    memory.total = memory.weights + 8.0
    lines = {line.name: line for line in figures.memory_lines(memory)}
    assert lines["activations"].most == memory.activations_peak
    assert lines["activations"].at_peak == 0
    assert lines["KV cache"].at_peak == 3.0
    assert lines["inputs"].most == lines["inputs"].at_peak == 5.0
    assert sum(line.at_peak for line in lines.values()) == memory.total
    assert "other" not in lines
    assert "gradients" in lines


def test_what_the_categories_leave_is_other(decode: Explanation) -> None:
    decode.memory.at_peak = []
    decode.memory.total += 2**30
    assert figures.memory_lines(decode.memory)[-1] == figures.MemoryLine("other", 2**30, 2**30)


def test_arithmetic_without_bytes_has_no_intensity(decode: Explanation) -> None:
    row = replace(decode.rows[0], flops=8.0, bytes_read=0.0, bytes_written=0.0, intensity=0.0)
    assert figures.intensity(row) is None
    assert figures.intensity(replace(row, bytes_read=4.0, intensity=2.0)) == 2.0
    assert figures.intensity(replace(row, flops=0.0)) == 0.0


def test_a_module_of_ones_own_shows_its_arguments_and_no_batch(decode: Explanation) -> None:
    assert any("batch" in word for word in figures.program_text(decode))
    decode.settings = {"arguments": "int64 [2, 64]"}
    words = figures.program_text(decode)
    assert "arguments int64 [2, 64]" in words
    assert not any("batch" in word for word in words)


@pytest.mark.parametrize("formula", ["", "2·B"])
def test_the_formula_column_is_there_only_with_formulas(decode: Explanation, formula: str) -> None:
    for row in decode.rows:
        row.formula = formula
    assert ("formula" in {column.key for column in columns(decode)}) == bool(formula)
