"""A profiled step as a trace that ui.perfetto.dev and chrome://tracing open, and as the table of most headroom.

The trace is Trace Event JSON: times in microseconds, "X" a slice, "C" a counter, "M" the name of a track. Slices of a
track nest: phase, then layer, then operation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rooflight.report.files import finite
from rooflight.report.units import MISSING, format_percent, format_ratio, format_seconds
from rooflight.train.comparison import Profile, Slice
from rooflight.train.kernel_trace import Kernel

MEASURED, PREDICTED = 1, 2
HOST, END_TO_END, FIRST_STREAM = 1, 2, 10
ROWS_SHOWN = 20
HEAD = (
    "operation", "place", "phase", "calls", "measured", "expected", "roof", "headroom", "×roof", "share", "bound",
)  # fmt: skip
Event = dict[str, Any]


def write(profile: Profile, directory: Path) -> str:
    """Write step-N.trace.json, step-N.txt and step-N.json; returns the table's text."""
    directory.mkdir(parents=True, exist_ok=True)
    text = table(profile)
    stem = directory / f"step-{profile.step}"
    stem.with_name(f"{stem.name}.trace.json").write_text(to_trace(profile), encoding="utf-8")
    stem.with_name(f"{stem.name}.txt").write_text(text, encoding="utf-8")
    figures = json.dumps(finite(profile.to_json()), indent=2, allow_nan=False, ensure_ascii=False)
    stem.with_name(f"{stem.name}.json").write_text(figures + "\n", encoding="utf-8")
    return text


def to_trace(profile: Profile) -> str:
    """The trace as JSON."""
    return json.dumps({"traceEvents": trace_events(profile), "displayTimeUnit": "ms"}, allow_nan=False)


def trace_events(profile: Profile) -> list[Event]:
    """Events in the order of time, an outer slice before those inside it; both processes begin at zero."""
    names = [*_process(MEASURED, f"measured: {profile.device}, step {profile.step}")]
    gpu = bool(profile.kernels)
    names += _track(MEASURED, HOST, "host, launching" if gpu else "host", 0)
    names += _track(MEASURED, END_TO_END, "operations end to end", 1)
    events = [*_nested(profile.host, MEASURED, HOST)]
    at = 0.0
    joined = []
    for each, seconds in zip(profile.host, profile.measured, strict=True):
        joined.append((each, at, seconds))
        at += seconds
    events += _nested_at(joined, MEASURED, END_TO_END)
    for number, stream in enumerate(sorted({kernel.stream for kernel in profile.kernels})):
        names += _track(MEASURED, FIRST_STREAM + number, f"GPU stream {stream}", 2 + number)
        for kernel in profile.kernels:
            if kernel.stream == stream:
                of = _launcher(kernel, profile)
                args = {"operation": of.name, **_args(of)} if of is not None else {}
                start, stop = _clock(kernel.start), _clock(kernel.start + kernel.seconds)
                events.append(_x(kernel.name, "kernel", start, stop, MEASURED, FIRST_STREAM + number, args))
    if profile.predicted:
        names += _process(PREDICTED, f"predicted: {profile.machine}")
        names += _track(PREDICTED, HOST, "expected times end to end", 0)
        events += _nested(profile.predicted, PREDICTED, HOST)
        for held in profile.memory:
            sizes = {kind: round(size) for kind, size in held.bytes.items()}
            events.append(
                {"ph": "C", "name": "memory, bytes", "ts": _clock(held.start) / 1e3, "pid": PREDICTED, "args": sizes}
            )
    earliest = min((event["ts"] for event in events), default=0.0)
    if earliest < 0:
        events = [event | {"ts": event["ts"] - earliest} for event in events]
    # Of slices that begin together the outer one, which is longer or was made first, comes first.
    return names + sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))


def _launcher(kernel: Kernel, profile: Profile) -> Slice | None:
    at = kernel.operation
    return profile.host[at] if at is not None and at < len(profile.host) else None


def _clock(seconds: float) -> int:
    """Nanoseconds as a whole number, so that an inner slice never ends after the outer one by rounding."""
    return round(seconds * 1e9)


def _x(name: str, kind: str, start: int, stop: int, process: int, track: int, args: Event) -> Event:
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "ts": start / 1e3,
        "dur": (stop - start) / 1e3,
        "pid": process,
        "tid": track,
        "args": args,
    }


def _process(process: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}


def _track(process: int, track: int, name: str, index: int) -> Iterator[Event]:
    yield {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": track, "args": {"sort_index": index}}


def _args(each: Slice) -> Event:
    """What a slice tells when it is clicked; what is not known is left out."""
    told: Event = {"path": each.path, "phase": each.phase, "FLOPs": each.flops, "bytes": each.bytes}
    if each.roof_seconds is not None:
        told["roof µs"] = round(each.roof_seconds * 1e6, 3)
    if each.expected_seconds is not None:
        told["expected µs"] = round(each.expected_seconds * 1e6, 3)
    if each.bound:
        told["bound"] = each.bound
    return told


def _nested(slices: Sequence[Slice], process: int, track: int) -> list[Event]:
    return _nested_at([(each, each.start, each.seconds) for each in slices], process, track)


def _nested_at(placed: Sequence[tuple[Slice, float, float]], process: int, track: int) -> list[Event]:
    """Operations, and around each run of them one slice for their phase and one for their layer."""
    spans = sorted(
        ((_clock(start), _clock(start + seconds), each) for each, start, seconds in placed), key=lambda span: span[0]
    )
    events: list[Event] = []

    def around(run: list[tuple[int, int, Slice]], name: str, kind: str) -> None:
        events.append(_x(name, kind, run[0][0], max(stop for _, stop, _ in run), process, track, {}))

    for phase, in_phase in _runs(spans, lambda span: span[2].phase):
        around(in_phase, phase, "phase")
        for layer, in_layer in _runs(in_phase, lambda span: span[2].layer):
            if layer is not None:
                around(in_layer, f"layer {layer}", "layer")
            events += [_x(s.name, s.phase, start, stop, process, track, _args(s)) for start, stop, s in in_layer]
    return events


def _runs(spans: Iterable[Any], key: Callable[[Any], Any]) -> Iterator[tuple[Any, list[Any]]]:
    for value, members in groupby(spans, key):
        yield value, list(members)


def table(profile: Profile) -> str:
    """The operations with most headroom, under what the step took in all."""
    total = sum(profile.measured)
    roofs = [each.roof_seconds for each in profile.host if each.roof_seconds is not None]
    told = [
        f"recorded in {format_seconds(profile.seconds)}, of which {format_seconds(total)} in its operations",
        f"predicted {format_seconds(profile.predicted_seconds)}" if profile.predicted else "not predicted",
        f"roof {format_seconds(sum(roofs))}" if roofs else "no machine to hold it against",
    ]
    rows: list[tuple[str, ...]] = [HEAD]
    for row in profile.rows[:ROWS_SHOWN]:
        ratio = row.measured_seconds / row.roof_seconds if row.roof_seconds else None
        rows.append(
            (
                row.operation,
                row.path or MISSING,
                row.phase,
                str(row.calls),
                format_seconds(row.measured_seconds),
                format_seconds(row.expected_seconds),
                format_seconds(row.roof_seconds),
                format_seconds(row.headroom_seconds) if row.roof_seconds is not None else MISSING,
                format_ratio(ratio),
                format_percent(row.measured_seconds / total if total else None),
                row.bound or MISSING,
            )
        )
    left = len(profile.rows) - ROWS_SHOWN
    on = f" against {profile.machine}" if profile.machine else ""
    lines = [f"Step {profile.step} on {profile.device}{on}: {'; '.join(told)}", "", *_aligned(rows)]
    if left > 0:
        lines.append(f"and {left} more, in step-{profile.step}.json")
    return "\n".join([*lines, *(f"- {note}" for note in profile.notes)]) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    words = {0, 1, 2, len(widths) - 1}
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if index in words else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
