"""Memory over time as a chart of characters: time from left to right, bytes upwards, a shade for each category."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from rooflight.report import figures
from rooflight.report.ink import Ink
from rooflight.report.units import binary_axis, format_bytes, format_seconds
from rooflight.workload.explanation import Moment

HEIGHT = 12
WIDEST = 72
AXIS = 10
# From the bottom of the stack; the shade, the letter where there are only letters, the colour where there are any.
LOOKS = {
    "weights": ("█", "W", "blue"),
    "optimizer": ("▓", "O", "cyan"),
    "gradients": ("▒", "G", "yellow"),
    "kv cache": ("▚", "K", "magenta"),
    "inputs": ("▪", "i", "white"),
    "activations": ("░", "a", "green"),
    "workspace": ("╳", "x", "red"),
}
_PHASES = {"recompute": "backward"}


def memory_chart(timeline: Sequence[Moment], capacity: float, seconds: float, ink: Ink, width: int) -> Text:
    """The chart of moments that are evenly spaced over `seconds`; a column shows the highest of its moments."""
    columns = [max(part, key=_total) for part in _parts(timeline, min(WIDEST, max(width - AXIS, 8)))]
    peak = max(map(_total, columns), default=0.0)
    if peak <= 0:
        return Text()
    near = peak < capacity <= 1.3 * peak
    top = capacity if near else peak
    unit, name = binary_axis(top)
    step = top / HEIGHT
    lines: list[Text] = []
    seen: dict[str, None] = {}
    for row in range(HEIGHT - 1, -1, -1):
        labelled = (HEIGHT - 1 - row) % 3 == 0
        mark = f"{(row + 1) * step / unit:.3g} {name}" if labelled else ""
        line = Text(f"{mark:>{AXIS - 2}} " + ("|" if ink.ascii else "┤" if labelled else "│"))
        limit = (near and row == HEIGHT - 1) or (capacity <= peak and row == min(int(capacity / step), HEIGHT - 1))
        for moment in columns:
            kind = _at(moment, (row + 0.5) * step)
            if kind is not None:
                seen[kind] = None
                line.append(_shade(kind, ink), style=LOOKS[kind][2])
            else:
                line.append(("-" if ink.ascii else "╌") if limit else " ", style="red" if limit else "")
        if limit:
            line.append(ink.clean(f" {format_bytes(capacity)}: capacity"), style="red")
        lines.append(line)
    lines.append(Text(" " * (AXIS - 1) + ("+" + "-" * len(columns) if ink.ascii else "└" + "─" * len(columns))))
    lines.append(Text(" " * AXIS + _phases(columns)))
    right = ink.clean(format_seconds(seconds))
    lines.append(Text(f"{'0':>{AXIS}}" + right.rjust(len(columns)), style="dim"))
    legend = Text(" " * AXIS)
    for kind in LOOKS:
        if kind in seen:
            legend.append(_shade(kind, ink), style=LOOKS[kind][2])
            legend.append(f" {figures.category(kind)}   ")
    legend.rstrip()
    return Text("\n").join([*lines, legend])


def _total(moment: Moment) -> float:
    return sum(moment.bytes.values())


def _parts(timeline: Sequence[Moment], count: int) -> list[Sequence[Moment]]:
    """The moments in `count` runs of nearly equal length, fewer where there are fewer moments."""
    count = min(count, len(timeline))
    edges = [index * len(timeline) // count for index in range(count + 1)] if count else []
    return [timeline[start:stop] for start, stop in pairwise(edges)]


def _at(moment: Moment, height: float) -> str | None:
    """The category that a stack of a moment's bytes has at a height; None above it."""
    reached = 0.0
    for kind in LOOKS:
        reached += moment.bytes.get(kind, 0.0)
        if height < reached:
            return kind
    return None


def _shade(kind: str, ink: Ink) -> str:
    return LOOKS[kind][1 if ink.ascii else 0]


def _phases(columns: Sequence[Moment]) -> str:
    """The phases' names under the columns in which they run, a name where it has room."""
    names = [moment.label.partition(":")[0] for moment in columns]
    names = [_PHASES.get(name, name) for name in names]
    out = ""
    start = 0
    for index in range(1, len(names) + 1):
        if index < len(names) and names[index] == names[start]:
            continue
        room = index - start
        name = names[start]
        if room > len(name):
            out += "|" + name.center(room - 1)
        else:
            out += ("|" + name[: room - 1]).ljust(room) if room > 3 else "|".ljust(room)
        start = index
    return out
