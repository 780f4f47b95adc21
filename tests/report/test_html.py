"""The HTML report: parsed, with every figure in it, nothing to fetch and nothing to inject."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.report import to_html
from rooflight.report.charts import memory_over_time
from rooflight.report.roofline import gather, placeless, roofline
from rooflight.report.units import format_bytes, format_seconds
from rooflight.workload.explanation import Explanation, Row

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text by element, and whether tags match."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def visible(self) -> str:
        return " ".join(" ".join(texts) for tag, texts in self.texts.items() if tag not in ("script", "style"))

    @property
    def charts(self) -> dict[str, Any]:
        return json.loads(next(text for text in self.texts["script"] if text.startswith("{")))


def test_the_page_holds_every_row_and_figure(explanation: Explanation) -> None:
    page = Page(to_html(explanation))
    assert page.open == []
    for row in explanation.rows:
        figures = (row.component, row.formula, format_seconds(row.expected_seconds), format_seconds(row.roof_seconds))
        for figure in figures:
            assert figure in page.visible
    for size in (explanation.memory.total, explanation.memory.capacity, *(b for _, b in explanation.memory.at_peak)):
        assert format_bytes(size) in page.visible
    for part in (*explanation.primitives, *explanation.access, *explanation.movement):
        assert part.name in page.visible
    for advice in explanation.advice:
        assert advice.change in page.visible
        assert advice.why in page.visible
    for text in (*explanation.notes, *explanation.provenance.values()):
        assert text in page.visible


def test_nothing_is_fetched(explanation: Explanation) -> None:
    page = Page(to_html(explanation))
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = next(
        attributes["content"] for tag, attributes in page.elements if "content-security" in str(attributes).lower()
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize("where", ["model", "machine", "path", "advice", "note", "legend", "moment", "setting"])
def test_an_evil_name_stays_text(train: Explanation, where: str) -> None:
    plain = Page(to_html(train))
    match where:
        case "model":
            train.model = EVIL
        case "machine":
            train.machine.title = EVIL
        case "path":
            for row in (*train.rows, *train.points):
                row.path = row.op = row.component = row.formula = EVIL
        case "advice":
            train.advice[0].change = train.advice[0].why = EVIL
        case "note":
            train.notes = [*train.notes[:-1], EVIL]
        case "legend":
            train.legend["B"] = EVIL
        case "moment":
            train.memory.timeline[0].label = EVIL
            train.memory.timeline[0].bytes[EVIL] = 1.0
        case "setting":
            train.settings["attention"] = EVIL
    page = Page(to_html(train))
    assert page.open == []
    kinds = [{"script", "img"} & {tag} for tag, _ in page.elements]
    assert sum(map(len, kinds)) == sum(tag in ("script", "img") for tag, _ in plain.elements)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # Plotly reads its strings as a small HTML of their own, so they must come escaped a second time.
    assert "<script" not in json.dumps(page.charts)
    assert "<img" not in json.dumps(page.charts)
    if where != "moment":
        assert "alert(1)" in page.visible


def test_the_roofline_has_every_operation_with_arithmetic(explanation: Explanation) -> None:
    plotted = [name for point in gather(explanation.points) for name in point.names]
    absent = {row.path for row in placeless(explanation)}
    assert {row.path for row in explanation.points} == set(plotted) | absent
    for row in placeless(explanation):
        assert row.flops == 0 or math.isinf(row.intensity)
    calls = sum(point.calls for point in gather(explanation.points))
    assert calls == sum(row.count for row in explanation.points if row.flops > 0 and math.isfinite(row.intensity))


def test_marks_lie_where_their_figures_say_and_under_the_roof(explanation: Explanation) -> None:
    facts = explanation.machine
    chart = roofline(explanation)
    marks = [trace for trace in chart["traces"] if trace.get("name") in ("compute", "memory", "launch")]
    assert marks
    for trace in marks:
        for x, y, text in zip(trace["x"], trace["y"], trace["text"], strict=True):
            assert y <= min(max(facts.peaks.values()), x * facts.memory_bandwidth) * (1 + 1e-9)
            assert all(word in text for word in ("roof", "expected", "FLOP/B", "of the time"))
    ridges = [trace for trace in chart["traces"] if "ridge point" in str(trace.get("text"))]
    used = {name for row in explanation.points for name, flops in row.flops_by_precision.items() if flops}
    assert {trace["x"][0] for trace in ridges} == {facts.peaks[name] / facts.memory_bandwidth for name in used}


def test_a_machine_without_measured_ceilings_has_no_dashed_roof(decode: Explanation) -> None:
    def dashed() -> int:
        return sum(trace.get("line", {}).get("dash") == "dash" for trace in roofline(decode)["traces"])

    assert dashed() > 0
    decode.machine.measured_peaks, decode.machine.measured_bandwidth = {}, None
    assert dashed() == 0


def test_the_charts_embed_every_component_and_category(explanation: Explanation) -> None:
    charts = Page(to_html(explanation)).charts
    bars = charts["time"]["traces"]
    assert bars[0]["y"]
    for row in explanation.components:
        small = row.expected_seconds < 0.01 * sum(r.expected_seconds for r in explanation.components)
        assert row.component in bars[0]["y"] or (small and any("others" in name for name in bars[0]["y"]))
    names = {trace["name"] for trace in bars}
    assert names == {"roof", "expected"} | ({"measured"} if explanation.totals.measured_seconds else set())
    shown = {trace["name"] for trace in charts["memory"]["traces"]}
    if explanation.memory.timeline:
        ever = {name for moment in explanation.memory.timeline for name, size in moment.bytes.items() if size > 0}
        assert ever <= shown
    else:
        assert {"weights", "KV cache"} <= shown
    assert "capacity" in json.dumps(charts["memory"]["layout"])


def test_what_is_not_finite_does_not_reach_the_page(decode: Explanation) -> None:
    for row in (*decode.rows, *decode.points):
        row.intensity = math.nan
    decode.components[0].roof_seconds = math.nan
    page = Page(to_html(decode))
    assert "NaN" not in json.dumps(page.charts)
    assert "nan" not in page.visible.split()


def test_an_explanation_of_nothing_still_renders(decode: Explanation) -> None:
    decode.rows, decode.components, decode.points, decode.advice, decode.notes = [], [], [], [], []
    decode.primitives, decode.access, decode.movement = [], [], []
    assert Page(to_html(decode)).open == []


def _fused(decode: Explanation) -> list[Row]:
    """The three parts of attention in layer 0, as they come out of one kernel: one path, one operation."""
    parts = [row for row in decode.points if row.path.startswith("layers.0.") and row.op == "flash_attention"]
    for row in parts:
        row.path = "layers.0.attention"
    return parts


def test_parts_of_a_fused_operation_are_one_mark(decode: Explanation) -> None:
    parts = _fused(decode)
    assert {row.component for row in parts} == {"scores", "softmax", "context"}
    (point,) = [point for point in gather(parts) if point.row.op == "flash_attention"]
    assert point.row.flops == sum(row.flops for row in parts)
    assert point.expected_seconds == pytest.approx(sum(row.expected_seconds for row in parts))
    moved = sum(row.bytes_read + row.bytes_written for row in parts)
    assert point.row.intensity == pytest.approx(point.row.flops / moved)
    decode.points = parts
    assert placeless(decode) == []


def test_fused_parts_are_told_under_the_table(decode: Explanation) -> None:
    assert "run as one operation" not in Page(to_html(decode)).visible
    _fused(decode)
    assert "scores, softmax and context run as one operation (flash_attention)" in Page(to_html(decode)).visible


def test_the_memory_axis_has_the_unit_of_its_sizes(train: Explanation) -> None:
    for moment in train.memory.timeline:
        moment.bytes = {name: size / 2**20 for name, size in moment.bytes.items()}
    chart = memory_over_time(train)
    assert chart["layout"]["yaxis"]["title"]["text"].startswith("KiB")
    total = next(trace for trace in chart["traces"] if trace["name"] == "total")
    most = max(sum(moment.bytes.values()) for moment in train.memory.timeline)
    assert max(total["y"]) == pytest.approx(most / 2**10)


def test_phases_are_named_along_the_memory_axis(train: Explanation) -> None:
    names = ["before the run", *["forward: a (op)"] * 30, *["backward: a (op)"] * 60, "optimizer:  (adamw)"]
    train.memory.timeline = [replace(train.memory.timeline[0], label=name) for name in names]
    axis = memory_over_time(train)["layout"]["xaxis"]
    assert axis["ticktext"] == ["forward", "backward"]
    assert axis["tickvals"] == [(1 + 30) / 2, (31 + 90) / 2]


def test_without_plotly_one_line_says_so(decode: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InvalidValue, match="pip install plotly"):
        to_html(decode)
