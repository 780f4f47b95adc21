"""The roofline chart: every operation by intensity and FLOP/s, under the roofs of the machine."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rooflight.report import figures
from rooflight.report.units import (
    format_bandwidth,
    format_bytes,
    format_count,
    format_flop_rate,
    format_flops,
    format_intensity,
    format_percent,
    format_ratio,
    format_seconds,
)
from rooflight.workload.explanation import Explanation, MachineFacts, Row

Chart = dict[str, Any]
SMALLEST_MARKER, MARKER_SPAN = 7.0, 34.0
LONGEST_TEXT = 90


@dataclass(frozen=True, slots=True)
class Point:
    """Operations that fall on one spot, as the same one does in every layer of a model."""

    row: Row
    names: tuple[str, ...]
    calls: float
    expected_seconds: float
    measured_seconds: float | None


def put_together(rows: list[Row]) -> list[Row]:
    """Rows with the parts of a fused operation put together again: on the machine it is one kernel and one point."""
    calls: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        calls.setdefault((row.path, row.op, row.phase), []).append(row)
    return [_together(parts) if len(parts) > 1 else parts[0] for parts in calls.values()]


def _together(parts: list[Row]) -> Row:
    longest = max(parts, key=lambda row: row.expected_seconds)
    flops = sum(row.flops for row in parts)
    read, written = sum(row.bytes_read for row in parts), sum(row.bytes_written for row in parts)
    precisions: dict[str, float] = {}
    for row in parts:
        for precision, count in row.flops_by_precision.items():
            precisions[precision] = precisions.get(precision, 0.0) + count
    measured = [row.measured_seconds for row in parts if row.measured_seconds is not None]
    return replace(
        longest,
        component=", ".join(dict.fromkeys(row.component for row in parts)),
        flops=flops,
        flops_by_precision=precisions,
        bytes_read=read,
        bytes_written=written,
        intensity=flops / (read + written) if read + written else 0.0,
        roof_seconds=sum(row.roof_seconds for row in parts),
        expected_seconds=sum(row.expected_seconds for row in parts),
        measured_seconds=sum(measured) if len(measured) == len(parts) else None,
        formula="",
    )


def gather(rows: list[Row]) -> list[Point]:
    """Operations with arithmetic, bytes and time, merged where only the layer number tells them apart."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in put_together(rows):
        if _has_a_place(row):
            spot = (f"{row.flops:.5g}", f"{row.intensity:.5g}", f"{row.expected_seconds:.3g}")
            key = (figures.without_indices(row.path), row.op, row.phase, row.bound, *spot)
            groups.setdefault(key, []).append(row)
    points = []
    for members in groups.values():
        measured = [row.measured_seconds for row in members if row.measured_seconds is not None]
        points.append(
            Point(
                row=members[0],
                names=tuple(dict.fromkeys(row.path for row in members)),
                calls=sum(row.count for row in members),
                expected_seconds=sum(row.expected_seconds for row in members),
                measured_seconds=sum(measured) if len(measured) == len(members) else None,
            )
        )
    return points


def _has_a_place(row: Row) -> bool:
    return row.flops > 0 and row.expected_seconds > 0 and 0 < row.intensity < math.inf


def placeless(explanation: Explanation) -> list[Row]:
    """Operations that take time and have no place on logarithmic axes: copies, gathers, collectives."""
    return [
        row for row in put_together(figures.finest(explanation)) if not _has_a_place(row) and row.expected_seconds > 0
    ]


def roofline(explanation: Explanation) -> Chart:
    """Plotly traces and layout; x in FLOPs a byte, y in FLOP/s = FLOPs / expected (or measured) time.

    A marker's area is its share of the expected time. Roofs are min(peak, intensity · bandwidth), drawn for every
    precision that the program uses and the machine has a peak for; the measured ceilings are dashed.
    """
    facts, points = explanation.machine, gather(figures.finest(explanation))
    whole = sum(row.expected_seconds for row in figures.finest(explanation))
    used = [name for name in figures.flops_by_precision(figures.finest(explanation)) if facts.peaks.get(name, 0) > 0]
    used = used or list(facts.peaks)[:1]
    x_range, y_range = _ranges(facts, points, used)
    traces = _roofs(facts, used, x_range[0], x_range[1], y_range[0])
    present = {point.row.bound for point in points}
    for bound in [*figures.BOUNDS, *sorted(present - set(figures.BOUNDS))]:
        mine = sorted((point for point in points if point.row.bound == bound), key=lambda p: -p.expected_seconds)
        if mine:
            traces.append(_markers(bound, bound, mine, whole, lambda p: p.row.expected_seconds))
    timed = [point for point in points if point.measured_seconds]
    if timed:
        trace = _markers("measured", "ink", timed, whole, lambda p: p.row.measured_seconds or p.row.expected_seconds)
        trace["marker"] |= {"symbol": "diamond-open", "size": 7, "line": {"width": 1.3, "color": "var(--ink)"}}
        traces.append(trace)
    layout = {
        "xaxis": {"title": {"text": "intensity, FLOP/B"}} | _decades(*x_range),
        "yaxis": {"title": {"text": "FLOP/s"}} | _decades(*y_range),
        "hovermode": "closest",
    }
    return {"traces": traces, "layout": layout, "height": 520}


def _decades(low: float, high: float) -> Chart:
    """A logarithmic axis with our own letters at its powers of ten: Plotly knows none above T."""
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    step = 1 + len(exponents) // 9
    values = [10.0**exponent for exponent in exponents if exponent % step == 0]
    texts = [f"{value:g}" if value < 1 else re.sub(r"\.0+", "", format_count(value)) for value in values]
    return {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": values, "ticktext": texts}


def _ranges(
    facts: MachineFacts, points: list[Point], used: list[str]
) -> tuple[tuple[float, float], tuple[float, float]]:
    peaks = [facts.peaks[name] for name in used]
    ridges = [peak / facts.memory_bandwidth for peak in peaks if facts.memory_bandwidth > 0]
    intensities = [point.row.intensity for point in points] + ridges
    rates = [point.row.flops / point.row.expected_seconds for point in points] + peaks
    x_low, x_high = min(intensities, default=0.1) / 3, max(intensities, default=1e3) * 16
    return (x_low, x_high), (min(rates, default=1e9) / 4, max(rates, default=1e15) * 4)


def _roofs(facts: MachineFacts, used: list[str], x_low: float, x_high: float, y_low: float) -> list[Chart]:
    """Lines of the roofs with their names above them, where no operation can be, and a drop line from every ridge."""
    traces: list[Chart] = []
    bandwidth, peaks = facts.memory_bandwidth, {name: facts.peaks[name] for name in used}
    if bandwidth <= 0 or not peaks:
        return traces
    seen_peaks = {name: facts.measured_peaks[name] for name in used if facts.measured_peaks.get(name, 0) > 0}
    seen_bandwidth = facts.measured_bandwidth or 0.0
    if seen_bandwidth > 0:
        top = max(seen_peaks.values(), default=max(peaks.values()))
        traces.append(_slope(seen_bandwidth, top, x_low, y_low, "dash"))
    for peak in seen_peaks.values():
        traces.append(_line([peak / (seen_bandwidth or bandwidth), x_high], [peak, peak], "dash"))
    top = max(peaks.values())
    traces.append(_slope(bandwidth, top, x_low, y_low, "solid"))
    for index, (name, peak) in enumerate(peaks.items()):
        ridge = peak / bandwidth
        traces.append(_line([ridge, x_high], [peak, peak], "solid"))
        traces.append(_line([ridge, ridge], [y_low, peak], "dot"))
        traces.append(_ridge(name, ridge, peak))
        # Two ridges may be neighbours: every other name stands a little higher.
        foot = y_low * (1.25 if index % 2 == 0 else 2.0)
        traces.append(_label(ridge, foot, f"{name} ridge {format_intensity(ridge)}", "middle right", "muted"))
        measured = f" ({format_flop_rate(seen_peaks[name])} measured)" if name in seen_peaks else ""
        said = f"{name} {format_flop_rate(peak)}"
        traces.append(_label(x_high, peak, f"{said}{measured}", "top left", "ink", short=said))
    start = max(x_low, y_low / bandwidth)
    middle = start * (top / bandwidth / start) ** 0.55
    measured = f" ({format_bandwidth(seen_bandwidth)} measured)" if seen_bandwidth > 0 else ""
    said = format_bandwidth(bandwidth)
    traces.append(_label(middle, middle * bandwidth, f"{said}{measured}", "top left", "ink", short=said))
    return traces


def _slope(bandwidth: float, top: float, x_low: float, y_low: float, dash: str) -> Chart:
    start = max(x_low, y_low / bandwidth)
    return _line([start, top / bandwidth], [start * bandwidth, top], dash)


def _line(x: list[float], y: list[float], dash: str) -> Chart:
    solid = dash == "solid"
    style = {"color": "var(--ink)" if solid else "var(--muted)", "width": 1.6 if solid else 1.1, "dash": dash}
    shown: Chart = {"showlegend": False, "hoverinfo": "skip"}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": style} | shown


def _ridge(name: str, ridge: float, peak: float) -> Chart:
    marker = {"size": 8, "color": "var(--paper)", "line": {"color": "var(--ink)", "width": 1.6}}
    said = f"{_safe(name)} ridge point<br>{format_intensity(ridge)} FLOP/B at {format_flop_rate(peak)}"
    shown: Chart = {"showlegend": False, "text": [said], "hovertemplate": "%{text}<extra></extra>"}
    return {"type": "scatter", "mode": "markers", "x": [ridge], "y": [peak], "marker": marker} | shown


def _label(x: float, y: float, label: str, position: str, color: str, *, short: str = "") -> Chart:
    """Text in the plot; `short` is what a narrow page shows instead."""
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [x],
        "y": [y],
        "text": [_safe(label)],
        "textposition": position,
        "textfont": {"color": f"var(--{color})", "size": 11},
        # An unseen marker keeps the text off the line that it names.
        "marker": {"size": 8, "opacity": 0},
        "showlegend": False,
        "hoverinfo": "skip",
        "meta": {"label": True, "short": _safe(short or label)},
    }


def _markers(
    name: str, color: str, points: list[Point], whole: float, seconds: Callable[[Point], float]
) -> dict[str, Any]:
    sizes = [SMALLEST_MARKER + MARKER_SPAN * math.sqrt(point.expected_seconds / whole) for point in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [point.row.intensity for point in points],
        "y": [point.row.flops / seconds(point) for point in points],
        "text": [_hover(point, whole) for point in points],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "size": sizes,
            "color": f"var(--{color})",
            "opacity": 0.75,
            "line": {"color": "var(--paper)", "width": 1},
        },
    }


def _hover(point: Point, whole: float) -> str:
    row = point.row
    name = point.names[0] if len(point.names) == 1 else f"{point.names[0]} … {point.names[-1]}"
    lines = [f"<b>{_safe(name)}</b>", f"{_safe(row.op)} · {_safe(row.phase)} · {_safe(row.bound)}-bound"]
    if len(point.names) > 1:
        lines.append(f"{len(point.names)} alike; figures are for one, the share is of all")
    lines += [
        f"{format_flops(row.flops)}, {format_bytes(row.bytes_read + row.bytes_written)}, "
        f"{format_intensity(row.intensity)} FLOP/B",
        f"roof {format_seconds(row.roof_seconds)} · expected {format_seconds(row.expected_seconds)}"
        + (f" · measured {format_seconds(row.measured_seconds)}" if row.measured_seconds is not None else ""),
        f"{format_flop_rate(row.flops / row.expected_seconds)} · "
        f"{format_ratio(figures.headroom(row.roof_seconds, row.expected_seconds, row.measured_seconds))} the roof · "
        f"{format_percent(point.expected_seconds / whole)} of the time",
    ]
    if row.formula:
        lines.append(f"FLOPs = {_safe(row.formula)}")
    return "<br>".join(lines)


def _safe(text: str) -> str:
    """Plotly reads its strings as a small HTML: a name stays a name, and a hover stays on the page."""
    short = text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
    return html.escape(short, quote=False)
