"""The bar and area charts: where the time goes by component, and memory over the step."""

from __future__ import annotations

import html

from rooflight.report import figures
from rooflight.report.roofline import Chart
from rooflight.report.units import binary_axis, format_bytes, format_seconds, time_axis
from rooflight.workload.explanation import Explanation, Row

FEWEST_BARS, MOST_BARS = 6, 16
LEAST_SHARE = 0.005  # of the expected time: shorter bars are seen together
CATEGORY_COLORS = 7


def where_time_goes(explanation: Explanation) -> Chart:
    """Horizontal bars of roof, expected and measured time a component, the slowest on top."""
    rows = explanation.components or explanation.rows
    bars: dict[str, list[Row]] = {}
    for row in rows:
        bars.setdefault(figures.label(row, "component"), []).append(row)
    ordered = sorted(bars.items(), key=lambda bar: -sum(row.expected_seconds for row in bar[1]))
    whole = sum(row.expected_seconds for row in rows)
    worth = [bar for bar in ordered if sum(row.expected_seconds for row in bar[1]) >= LEAST_SHARE * whole]
    kept = min(max(len(worth), FEWEST_BARS), MOST_BARS - 1)
    if len(ordered) > kept + 1:
        rest = [row for _, members in ordered[kept:] for row in members]
        ordered = [*ordered[:kept], (f"{len(ordered) - kept} others", rest)]
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
    sizes_seen = {name: 0.0 for moment in memory.timeline for name in moment.bytes}
    for moment in memory.timeline:
        for name, size in moment.bytes.items():
            sizes_seen[name] = max(sizes_seen[name], size)
    categories = list(sizes_seen)
    unit, unit_name = binary_axis(max(sum(moment.bytes.values()) for moment in memory.timeline))
    steps = list(range(len(memory.timeline)))
    labels = [html.escape(moment.label, quote=False) for moment in memory.timeline]
    traces: list[Chart] = []
    for index, category in enumerate(categories):
        if sizes_seen[category] <= 0:
            continue
        shown = html.escape(figures.category(category), quote=False)
        sizes = [moment.bytes.get(category, 0.0) for moment in memory.timeline]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "memory",
                "name": shown,
                "x": steps,
                "y": [size / unit for size in sizes],
                "text": [format_bytes(size) for size in sizes],
                "line": {"width": 0.5, "shape": "hv", "color": f"var(--cat-{index % CATEGORY_COLORS})"},
                "fillcolor": f"var(--cat-{index % CATEGORY_COLORS})",
                "hovertemplate": f"{shown} %{{text}}<extra></extra>",
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
            "y": [height / unit for height in heights],
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
            "y": [peak / unit],
            "marker": {"color": "var(--ink)", "size": 9, "symbol": "diamond"},
            "hovertemplate": f"peak at {html.escape(memory.peak_label, quote=False)}<extra></extra>",
        }
    )
    edges = _phases([moment.label for moment in memory.timeline])
    layout = _capacity(memory.capacity, peak, "y", unit, unit_name)
    layout["shapes"] = [*layout.get("shapes", []), *(_edge(start) for _, start, _ in edges[1:])]
    layout |= {
        "xaxis": {
            "title": {"text": "operations in the order in which they run"},
            "tickvals": [(start + stop) / 2 for _, start, stop in edges],
            "ticktext": [name for name, _, _ in edges],
            "range": [0, max(steps[-1], 1)],
            "showgrid": False,
            "unifiedhovertitle": {"text": " "},
        },
        "hovermode": "x unified",
    }
    return {"traces": traces, "layout": layout, "height": 420}


def _phases(labels: list[str]) -> list[tuple[str, int, int]]:
    """(phase, first moment, last moment) of each run of moments in one phase, short ones with their neighbour."""
    runs: list[tuple[str, int, int]] = []
    for index, label in enumerate(labels):
        name = label.partition(":")[0] if ": " in label else ""
        if runs and (not name or runs[-1][0] == name):
            runs[-1] = (runs[-1][0], runs[-1][1], index)
        elif name:
            runs.append((name, index, index))
    least = max(1, len(labels) // 20)
    return [run for run in runs if run[2] - run[1] >= least] or runs[:1]


def _edge(start: int) -> Chart:
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    return {"type": "line", "yref": "paper", "x0": start, "x1": start, "y0": 0, "y1": 1, "line": line}


def _memory_bar(explanation: Explanation) -> Chart:
    memory = explanation.memory
    unit, unit_name = binary_axis(memory.total)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": line.name,
            "y": [""],
            "x": [line.at_peak / unit],
            "text": [format_bytes(line.at_peak)],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "hovertemplate": f"{line.name} %{{text}}<extra></extra>",
            "marker": {"color": f"var(--cat-{index % CATEGORY_COLORS})"},
        }
        for index, line in enumerate(figures.memory_lines(memory))
    ]
    layout = _capacity(memory.capacity, memory.total, "x", unit, unit_name) | {
        "barmode": "stack",
        "yaxis": {"showticklabels": False, "showgrid": False},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
        "uniformtext": {"mode": "hide", "minsize": 11},
    }
    return {"traces": traces, "layout": layout, "height": 190}


def _capacity(capacity: float, used: float, axis: str, unit: float, unit_name: str) -> Chart:
    """The capacity line on the axis of bytes; one that is far away is told beside the axis and not drawn."""
    title = {"text": unit_name}
    name = f"capacity {format_bytes(capacity)}"
    if not 0 < capacity <= 6 * used:
        title["text"] = f"{unit_name} ({name} is off the scale)" if capacity > 0 else unit_name
        return {f"{axis}axis": {"title": title, "rangemode": "tozero"}}
    edge = capacity / unit
    line = {"type": "line", "line": {"color": "var(--alarm)", "width": 1.5, "dash": "dash"}}
    mark: Chart = {"text": name, "showarrow": False, "bgcolor": "var(--paper)"}
    mark["font"] = {"color": "var(--alarm)", "size": 12}
    if axis == "y":
        line |= {"xref": "paper", "x0": 0, "x1": 1, "y0": edge, "y1": edge}
        mark |= {"xref": "paper", "x": 0.01, "xanchor": "left", "y": edge, "yanchor": "bottom"}
    else:
        line |= {"yref": "paper", "y0": 0, "y1": 1, "x0": edge, "x1": edge}
        mark |= {"yref": "paper", "y": 1, "yanchor": "bottom", "x": edge, "xanchor": "right"}
    span = [0, 1.12 * max(capacity, used) / unit]
    return {f"{axis}axis": {"title": title, "range": span}, "shapes": [line], "annotations": [mark]}
