"""The benchmark's report: every figure in it, dry beside wet with the ratio, plain in a pipe, safe in Markdown."""

from __future__ import annotations

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console

from rooflight.report.bench import figure, render, to_json, to_markdown, to_text
from rooflight.serve.bench.result import Result, Row, Run, failures, run_rows
from rooflight.serve.bench.roof import Roof
from rooflight.serve.bench.statistics import Outcome, statistics

EVIL = "<b>|*evil*\n[x]\x1b[31m"


def run_of(name: str, slow: float, roof: Roof) -> Run:
    """Four requests of three tokens: the first after `slow` s, the next ones after `slow`/2 each."""
    outcomes = [Outcome(index, 10, 3, 0.0, 0.0, slow, 2 * slow, [slow / 2] * 2) for index in range(4)]
    stats = statistics(outcomes, 2 * slow, percentiles=(90, 99), limits={"ttft": 10.0})
    return Run(name, "NVIDIA H200", run_rows(stats, roof), outcomes)


WET = run_of("wet", 0.5, Roof(0.25, 0.8, 0.7, 0.1, 0.05, 0.2))
DRY = run_of("dry", 0.4, Roof(0.25, 0.8, 0.7, 0.1, 0.05, 0.2))
ONE = Result("serve", "tiny", ["random: 10 in, 3 out", "4 requests"], [WET], ["a note"])
TWO = Result("serve", EVIL, ["4 requests"], [WET, DRY], [EVIL])


def rendered(result: Result, width: int) -> str:
    out = io.StringIO()
    render(result, Console(file=out, width=width))
    return out.getvalue()


def test_rows_hold_the_figures_and_their_share_of_the_roof() -> None:
    rows = {row.key: (row.value, row.of_roof) for row in WET.rows}
    assert rows["duration"] == (1.0, 0.25)
    assert rows["step_seconds"] == (0.8, pytest.approx(0.3125))
    assert rows["output_throughput"] == (12.0, 0.25)
    assert rows["total_token_throughput"] == (52.0, 0.25)
    assert rows["request_goodput"] == (4.0, None)
    assert rows["mean_ttft_ms"] == (500.0, pytest.approx(0.2))
    assert rows["median_tpot_ms"] == (250.0, pytest.approx(0.2))
    assert rows["mean_itl_ms"] == (250.0, pytest.approx(0.2))
    assert rows["mean_e2el_ms"] == (1000.0, pytest.approx(0.2))
    assert rows["p99_ttft_ms"] == (500.0, None)


def test_without_a_roof_there_is_no_share() -> None:
    assert all(row.of_roof is None for row in run_of("wet", 0.5, Roof()).rows)
    assert "of the roof" not in to_text(Result("serve", "tiny", [], [run_of("wet", 0.5, Roof())]))


def test_every_figure_is_told() -> None:
    for text in (to_text(ONE), to_markdown(ONE)):
        for row in WET.rows:
            assert row.label in text and figure(row) in text
        for title in ("Time to first token", "Inter-token latency", "of the roof", "tiny", "NVIDIA H200", "a note"):
            assert title in text
        assert "dry / wet" not in text


def test_wet_and_dry_stand_beside_each_other() -> None:
    assert TWO.ratios["mean_ttft_ms"] == pytest.approx(0.8)
    assert TWO.ratios["output_throughput"] == pytest.approx(1.25)
    line = next(line for line in to_text(TWO).splitlines() if line.startswith("Output tokens  ") and "tok/s" in line)
    assert line.split()[2:] == ["12", "tok/s", "25%", "15", "tok/s", "31%", "1.25×"]
    assert "| Output tokens | 12 tok/s | 25% | 15 tok/s | 31% | 1.25× |" in to_markdown(TWO)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_line_is_wider_than_the_console(width: int) -> None:
    for result in (ONE, TWO):
        assert max(cell_len(line) for line in rendered(result, width).splitlines()) <= width


def test_piped_text_is_plain() -> None:
    text = to_text(TWO)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_markdown_is_safe() -> None:
    text = to_markdown(TWO)
    assert "<b>" not in text and "*evil*" not in text.replace("\\*evil\\*", "")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {7}


def test_json_has_vllms_names() -> None:
    found = json.loads(to_json(TWO))
    wet, dry = found["runs"]
    assert (wet["name"], dry["name"], wet["mean_ttft_ms"], dry["mean_ttft_ms"]) == ("wet", "dry", 500.0, 400.0)
    names = "completed duration total_input_tokens total_output_tokens request_throughput request_goodput"
    names += " output_throughput total_token_throughput median_ttft_ms p99_tpot_ms std_itl_ms max_concurrent_requests"
    assert set(names.split()) <= set(wet)
    assert wet["share_of_roof"]["output_throughput"] == 0.25
    assert found["ratio_dry_to_wet"]["mean_ttft_ms"] == pytest.approx(0.8)
    assert "requests" not in wet
    assert json.loads(to_json(ONE, detailed=True))["runs"][0]["requests"][0]["ttft"] == 0.5


def test_figures_with_their_units() -> None:
    told = {
        Row("", "", "count", 12345.0): "12,345",
        Row("", "", "ms", 0.012342): "0.01234 ms",
        Row("", "", "ms", 5.0519): "5.052 ms",
        Row("", "", "tok/s", 23800.4): "23,800 tok/s",
        Row("", "", "tok/s", 999.96): "1,000 tok/s",
        Row("", "", "ms", None): "–",
    }
    for row, text in told.items():
        assert figure(row) == text


def test_failures_are_counted_by_reason() -> None:
    outcomes = [Outcome(index, 1, error=f"reason {index % 7}" if index % 8 else "") for index in range(64)]
    notes = failures(outcomes, most=3)
    assert len(notes) == 4 and notes[3] == "and 4 other reasons"
    assert all("of 64 requests failed: reason" in note for note in notes[:3])
    assert failures(outcomes[:1]) == []
