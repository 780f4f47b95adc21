"""The dry run's report: every figure in it, no line too wide, a chart that shows the moments, a page that is safe."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from rooflight.report.ink import Ink
from rooflight.report.memory_text import HEIGHT, LOOKS, memory_chart
from rooflight.report.training import as_explanation, render, to_html, to_json, to_text
from rooflight.report.units import format_bytes, format_count, format_percent, format_seconds
from rooflight.train.dry import DryRun, dry_run
from rooflight.train.settings import TrainSettings
from rooflight.workload.explanation import Moment
from rooflight.workload.memory import CATEGORIES
from tests.report.test_html import EVIL, Page
from tests.workload.machines import GPU, changed
from tests.workload.setups import llama

CONFIG = llama(3, width=64, vocab_size=128)


def made(memory: float = 80e9, **given: Any) -> DryRun:
    at = replace(TrainSettings(batch_size=8, context=64, dtype="bf16", steps=5), **given).check()
    return dry_run("small", CONFIG, at, changed(GPU, memory_bytes=memory), usd_per_hour=2.5)


FITS = made(micro_batch_size=2)
OVER = made(memory=0.8 * made().memory.total)


@pytest.fixture(params=["fits", "over"])
def run(request: pytest.FixtureRequest) -> DryRun:
    return {"fits": FITS, "over": OVER}[request.param]


def rendered(run: DryRun, width: int) -> str:
    out = io.StringIO()
    render(run, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_line_is_wider_than_the_console(run: DryRun, width: int) -> None:
    assert max(cell_len(line) for line in rendered(run, width).splitlines()) <= width


@pytest.mark.parametrize("width", [60, 200])
def test_every_figure_is_told(run: DryRun, width: int) -> None:
    text = " ".join(rendered(run, width).split())
    assert f"step roof {format_seconds(run.totals.roof_seconds)}" in text
    assert f"expected {format_seconds(run.totals.expected_seconds)}" in text
    assert f"{format_count(run.tokens_per_second)} tokens/s" in text
    assert f"MFU {format_percent(run.mfu)}" in text
    assert f"{format_percent(run.mfu_full)} (counted whole)" in text
    assert "$2.50 an hour" in text
    for size in (run.memory.total, run.memory.capacity, *(size for _, size in run.memory.at_peak)):
        assert format_bytes(size) in text
    for row in run.components:
        assert row.component in text
        assert format_seconds(row.expected_seconds) in text
    assert run.verdict in text
    for note in (*run.notes, *run.provenance):
        assert note in text


def test_piped_text_is_plain() -> None:
    text = to_text(FITS)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "4 micro-batches of 2" in text


def chart(moments: list[Moment], capacity: float, width: int = 60, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, no_color=True)
    return memory_chart(moments, capacity, 1.0, Ink(console), width).plain.splitlines()


def test_the_chart_shows_the_bytes_of_each_moment() -> None:
    # A ramp of activations on constant weights: the height of a column is its bytes, the peak reaches the top.
    moments = [Moment("forward: a (b)", {"weights": 12.0, "activations": float(i)}) for i in range(49)]
    lines = chart(moments, 1000.0)
    body = [line[10:] for line in lines[:HEIGHT]]
    columns = ["".join(line.ljust(49)[at] for line in body) for at in range(49)]
    step = 60.0 / HEIGHT
    for at, column in enumerate(columns):
        filled = len(column.strip())
        assert filled == sum((row + 0.5) * step < 12 + at for row in range(HEIGHT))
        assert column.count("█") == sum((row + 0.5) * step < 12 for row in range(HEIGHT))
    assert columns[-1][0] == "░"
    assert lines[0].strip().startswith("60 B")
    assert "█ weights" in lines[-1] and "░ activations" in lines[-1] and "optimizer" not in lines[-1]


def test_a_column_shows_the_highest_of_its_moments() -> None:
    moments = [Moment("forward: a (b)", {"weights": 1.0}) for _ in range(500)]
    moments[333] = Moment("forward: a (b)", {"weights": 1.0, "activations": 99.0})
    lines = chart(moments, 1000.0)
    assert lines[0].count("░") == 1


def test_the_capacity_is_drawn_where_it_is_near() -> None:
    moments = [Moment("forward: a (b)", {"weights": 100.0})] * 10
    for capacity, drawn in ((90.0, True), (120.0, True), (1000.0, False)):
        assert any("capacity" in line for line in chart(moments, capacity)) == drawn


def test_phases_stand_under_their_columns() -> None:
    moments = [
        Moment(f"{phase}: a (b)", {"weights": 1.0})
        for phase in ["forward"] * 20 + ["backward"] * 10 + ["recompute"] * 10 + ["optimizer"] * 2
    ]
    line = chart(moments, 9.0)[HEIGHT + 1][10:]
    assert line[:20].strip("| ") == "forward"
    assert line[20:40].strip("| ") == "backward"
    assert len(line) <= 42


def test_letters_where_there_are_only_letters() -> None:
    lines = chart([Moment("forward: a (b)", {"weights": 1.0, "optimizer": 1.0})] * 10, 9.0, encoding="ascii")
    text = "\n".join(lines)
    assert text.isascii()
    assert "W" in text and "O" in text


def test_every_category_has_a_look_of_its_own() -> None:
    assert set(CATEGORIES) == set(LOOKS)
    assert len({look[0] for look in LOOKS.values()}) == len({look[1] for look in LOOKS.values()}) == len(LOOKS)


def test_an_empty_chart_is_nothing() -> None:
    assert chart([], 1.0) == []


def test_json_is_strict_and_whole(run: DryRun) -> None:
    found = json.loads(to_json(run), parse_constant=lambda name: pytest.fail(name))
    assert found["totals"]["expected_seconds"] == run.totals.expected_seconds
    assert len(found["memory"]["timeline"]) == len(run.memory.timeline)
    assert [offer["flags"] for offer in found["alternatives"]] == [offer.flags for offer in run.alternatives]
    assert found["budget"]["steps"] == 5


def test_the_page_holds_the_figures_and_fetches_nothing(run: DryRun) -> None:
    page = Page(to_html(run))
    assert page.open == []
    for row in run.components:
        assert row.component in page.visible
    assert run.verdict in page.visible
    for offer in run.alternatives:
        assert offer.flags in page.visible
    for _, attributes in page.elements:
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), target
    assert set(page.charts) == {"memory", "time", "roofline"}
    total = next(trace for trace in page.charts["memory"]["traces"] if trace["name"] == "total")
    assert len(total["y"]) == len(run.memory.timeline)
    assert page.charts["memory"]["layout"]["xaxis"]["title"]["text"].startswith("time: ")


def test_a_name_cannot_break_the_page() -> None:
    page = Page(to_html(replace(FITS, model=EVIL, verdict=EVIL, notes=[EVIL])))
    assert page.open == []
    assert "img" not in [tag for tag, _ in page.elements]
    assert EVIL in page.visible


def test_both_reports_share_their_tables() -> None:
    found = as_explanation(OVER)
    assert found.rows is OVER.components
    assert found.memory.fits == OVER.fits is False
