"""The terminal report: every row at every width, no line too wide, nothing lost without being named."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from rooflight.report import console_for, render
from rooflight.report.columns import columns
from rooflight.report.units import format_bytes, format_seconds
from rooflight.workload.explanation import Explanation


def _rendered(explanation: Explanation, width: int) -> str:
    out = io.StringIO()
    render(explanation, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_console(explanation: Explanation, width: int) -> None:
    explanation.rows[0].component = explanation.rows[0].path = "a" * 150
    lines = _rendered(explanation, width).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert "a" * 150 in "".join(line.split(" ")[0] for line in lines)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_row_stands_on_one_line_with_its_time(explanation: Explanation, width: int) -> None:
    lines = _rendered(explanation, width).splitlines()
    for row in explanation.rows:
        figures = [row.component, format_seconds(row.expected_seconds), format_seconds(row.roof_seconds)]
        assert any(all(figure in line for figure in figures) for line in lines), figures


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_column_that_is_left_out_is_named(explanation: Explanation, width: int) -> None:
    text = _rendered(explanation, width)
    head = next(line for line in text.splitlines() if line.startswith(explanation.by))
    left_out = " ".join(text.split("not shown at this width:")[1:])
    for column in columns(explanation):
        assert column.title in head or column.title in left_out or column.key == "formula"


@pytest.mark.parametrize("width", [80, 200])
def test_formulas_memory_divisions_advice_and_sources_are_there(explanation: Explanation, width: int) -> None:
    text = _rendered(explanation, width)
    for row in explanation.rows:
        assert row.formula in text
    memory = explanation.memory
    for size in (memory.weights, memory.total, memory.capacity, *(size for _, size in memory.at_peak)):
        assert format_bytes(size) in text
    for part in (*explanation.primitives, *explanation.access, *explanation.movement):
        assert part.name in text
        assert format_seconds(part.expected_seconds) in text
    for advice in explanation.advice:
        assert advice.change in text
        assert format_seconds(abs(advice.saves_seconds)) in text
    for note in explanation.notes:
        assert note in text
    assert ("does not fit" in text) == (not memory.fits)


def test_a_wide_console_leaves_nothing_out(explanation: Explanation) -> None:
    assert "not shown" not in _rendered(explanation, 200)


def test_measured_appears_only_where_it_was_run(decode: Explanation, train: Explanation) -> None:
    head = next(line for line in _rendered(decode, 200).splitlines() if line.startswith("component"))
    assert " measured " not in head
    assert train.totals.measured_seconds is not None
    assert f"measured {format_seconds(train.totals.measured_seconds)}" in _rendered(train, 200)


def test_names_are_not_read_as_markup_or_as_escape_codes(decode: Explanation) -> None:
    decode.model = "[bold red]x[/]\x1b[31mred\nnext"
    decode.rows[0].component = "[link=evil]row[/link]"
    text = _rendered(decode, 120)
    assert "[bold red]x[/]" in text
    assert "[link=evil]row[/link]" in text
    assert "\x1b" not in text


def test_an_ascii_console_gets_ascii_alone(explanation: Explanation) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    render(explanation, Console(file=stream, width=120))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "feed-forward" in text
    assert " us" in text
    assert "?" not in text


def test_a_pipe_is_plain_and_wide(explanation: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    render(explanation, console_for(out))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "not shown" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_columns_of_the_environment_decide_a_pipes_width(decode: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    out = io.StringIO()
    render(decode, console_for(out))
    assert max(map(cell_len, out.getvalue().splitlines())) <= 90


def test_a_terminal_gets_colour(decode: Explanation) -> None:
    out = io.StringIO()
    render(decode, Console(file=out, width=120, force_terminal=True, color_system="standard"))
    assert "\x1b[" in out.getvalue()


def test_an_explanation_without_rows_still_renders(decode: Explanation) -> None:
    decode.rows, decode.components, decode.points, decode.advice, decode.notes = [], [], [], [], []
    decode.primitives, decode.access, decode.movement = [], [], []
    assert "no operations" in _rendered(decode, 80)
