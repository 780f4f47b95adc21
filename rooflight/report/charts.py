"""The bar and area charts: where the time goes by component, and memory over the step."""

from __future__ import annotations

import html

from rooflight.report import figures
from rooflight.report.roofline import Chart
from rooflight.report.units import format_bytes, format_seconds, time_axis
from rooflight.workload.explanation import Explanation, Row

GIB = 2**30
MOST_BARS = 16
CATEGORY_COLORS = 7


def where_time_goes(explanation: Explanation) -> Chart:
    """Horizontal bars of roof, expected and measured time a component, the slowest on top."""
    rows = explanation.components or explanation.rows
    bars: dict[str, list[Row]] = {}
    for row in rows:
        bars.setdefault(figures.label(row, "component"), []).append(row)
    ordered = sorted(bars.items(), key=lambda bar: -sum(row.expected_seconds for row in bar[1]))
    if len(ordered) > MOST_BARS:
        rest = [row for _, members in ordered[MOST_BARS - 1 :] for row in members]
        ordered = [*ordered[: MOST_BARS - 1], (f"{len(ordered) - MOST_BARS + 1} others", rest)]
    ordered.reverse()

    series: list[tuple[str, str, list[float | None]]] = [
        ("roof", "roof", [sum(row.roof_seconds for row in members) for _, members in ordered]),
        ("expected", "expected", [sum(row.expected_seconds for row in members) for _, members in ordered]),
    ]
    if figures.is_measured(explanation):
        series.append(("measured", "measured", [_measured(members) for _, members in ordered]))
    longest = max((value or 0.0 for _, _, values in series for value in values), default=0.0)
    factor, unit = time_axis(longest)
    names = [html.escape(name, quote=False) for name, _ in ordered]
    # Plotly stacks a group from below: reversed, the roof stands on top and the measured below it.
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": [None if value is None else value * factor for value in values],
            "text": [format_seconds(value) for value in values],
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": f"%{{y}}<br>{name} %{{text}}<extra></extra>",
            "marker": {"color": f"var(--{color})"},
        }
        for name, color, values in reversed(series)
    ]
    layout = {
        "barmode": "group",
        "bargap": 0.28,
        "bargroupgap": 0.08,
        "xaxis": {"title": {"text": f"time, {unit}"}, "range": [0, (1.2 * longest or 1.0) * factor]},
        "yaxis": {"automargin": True, "showgrid": False},
        "legend": {"traceorder": "reversed"},
    }
    return {"traces": traces, "layout": layout, "height": 110 + len(ordered) * (14 + 15 * len(series))}


def _measured(rows: list[Row]) -> float | None:
    times = [row.measured_seconds for row in rows if row.measured_seconds is not None]
    return sum(times) if len(times) == len(rows) else None


def memory_over_time(explanation: Explanation) -> Chart:
    """Bytes by category over the step, stacked, under the capacity line; without a timeline, one stacked bar."""
    memory = explanation.memory
    if not memory.timeline:
        return _memory_bar(explanation)
    categories = list(dict.fromkeys(name for moment in memory.timeline for name in moment.bytes))
    steps = list(range(len(memory.timeline)))
    labels = [html.escape(moment.label, quote=False) for moment in memory.timeline]
    traces: list[Chart] = []
    for index, category in enumerate(categories):
        sizes = [moment.bytes.get(category, 0.0) for moment in memory.timeline]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "memory",
                "name": html.escape(category, quote=False),
                "x": steps,
                "y": [size / GIB for size in sizes],
                "text": [format_bytes(size) for size in sizes],
                "line": {"width": 0.5, "shape": "hv", "color": f"var(--cat-{index % CATEGORY_COLORS})"},
                "fillcolor": f"var(--cat-{index % CATEGORY_COLORS})",
                "hovertemplate": f"{html.escape(category, quote=False)} %{{text}}<extra></extra>",
            }
        )
    heights = [sum(moment.bytes.values()) for moment in memory.timeline]
    peak = max(heights)
    at = heights.index(peak)
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "total",
            "showlegend": False,
            "x": steps,
            "y": [height / GIB for height in heights],
            "text": [f"{label}: {format_bytes(height)}" for label, height in zip(labels, heights, strict=True)],
            "line": {"width": 1, "shape": "hv", "color": "var(--ink)"},
            "hovertemplate": "%{text}<extra></extra>",
        }
    )
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"peak {format_bytes(peak)}",
            "x": [at],
            "y": [peak / GIB],
            "marker": {"color": "var(--ink)", "size": 9, "symbol": "diamond"},
            "hovertemplate": "peak<extra></extra>",
        }
    )
    layout = _capacity(memory.capacity, peak, "y") | {
        "xaxis": {
            "title": {"text": "step, from its first operation to its last"},
            "tickvals": [],
            "range": [0, max(steps[-1], 1)],
            "showgrid": False,
            "unifiedhovertitle": {"text": "moment %{x}"},
        },
        "hovermode": "x unified",
    }
    return {"traces": traces, "layout": layout, "height": 420}


def _memory_bar(explanation: Explanation) -> Chart:
    memory = explanation.memory
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [""],
            "x": [size / GIB],
            "text": [format_bytes(size)],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "hovertemplate": f"{name} %{{text}}<extra></extra>",
            "marker": {"color": f"var(--cat-{index % CATEGORY_COLORS})"},
        }
        for index, (name, size) in enumerate(figures.memory_lines(memory))
    ]
    layout = _capacity(memory.capacity, memory.total, "x") | {
        "barmode": "stack",
        "yaxis": {"showticklabels": False, "showgrid": False},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
        "uniformtext": {"mode": "hide", "minsize": 11},
    }
    return {"traces": traces, "layout": layout, "height": 190}


def _capacity(capacity: float, used: float, axis: str) -> Chart:
    """The capacity line on the axis of bytes; one that is far away is told beside the axis and not drawn."""
    title = {"text": "GiB"}
    name = f"capacity {format_bytes(capacity)}"
    if not 0 < capacity <= 6 * used:
        title["text"] = f"GiB ({name} is off the scale)" if capacity > 0 else "GiB"
        return {f"{axis}axis": {"title": title, "rangemode": "tozero"}}
    edge = capacity / GIB
    line = {"type": "line", "line": {"color": "var(--alarm)", "width": 1.5, "dash": "dash"}}
    mark: Chart = {"text": name, "showarrow": False, "bgcolor": "var(--paper)"}
    mark["font"] = {"color": "var(--alarm)", "size": 12}
    if axis == "y":
        line |= {"xref": "paper", "x0": 0, "x1": 1, "y0": edge, "y1": edge}
        mark |= {"xref": "paper", "x": 0.01, "xanchor": "left", "y": edge, "yanchor": "bottom"}
    else:
        line |= {"yref": "paper", "y0": 0, "y1": 1, "x0": edge, "x1": edge}
        mark |= {"yref": "paper", "y": 1, "yanchor": "bottom", "x": edge, "xanchor": "right"}
    span = [0, 1.12 * max(capacity, used) / GIB]
    return {f"{axis}axis": {"title": title, "range": span}, "shapes": [line], "annotations": [mark]}
