"""Which kernels each operation launched, and when they ran, from the trace that torch.profiler writes."""

from __future__ import annotations

import bisect
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "rooflight#"
# Categories of the events in Kineto's trace.
_RANGE = "user_annotation"
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel, copy or fill on the device: seconds since the trace's zero, and the operation that launched it.

    operation: the number in the range around the launch; None for what was launched outside of every range.
    """

    name: str
    start: float
    seconds: float
    stream: int
    operation: int | None


@dataclass(slots=True)
class KernelTrace:
    """What a profiled run showed: each operation's (start, seconds) on the host, and the kernels in order of time."""

    ranges: dict[int, tuple[float, float]] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    problem: str = ""


def read_trace(events: Iterable[Mapping[str, Any]]) -> KernelTrace:
    """Kernels and ranges of a trace's events (microseconds), its earliest range at zero.

    A kernel belongs to the range around the call that launched it, which both carry the number of as `correlation`. Of
    several ranges with one number the last counts: a view leaves its range under the next operation's number.
    """
    ranges: dict[tuple[Any, Any], list[tuple[float, float, int]]] = {}
    launches: dict[Any, tuple[tuple[Any, Any], float]] = {}
    found: list[Mapping[str, Any]] = []
    for event in events:
        kind, thread = event.get("cat"), (event.get("pid"), event.get("tid"))
        if event.get("ph") != "X":
            continue
        if kind == _RANGE and str(event["name"]).startswith(MARK):
            number = int(str(event["name"]).removeprefix(MARK))
            ranges.setdefault(thread, []).append((float(event["ts"]), float(event.get("dur", 0)), number))
        elif kind in _LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = (thread, float(event["ts"]))
        elif kind in _ON_DEVICE:
            found.append(event)
    for spans in ranges.values():
        spans.sort()
    zero = min((spans[0][0] for spans in ranges.values()), default=min((float(e["ts"]) for e in found), default=0.0))
    out = KernelTrace()
    for spans in ranges.values():
        out.ranges |= {number: ((start - zero) / 1e6, length / 1e6) for start, length, number in spans}
    for event in sorted(found, key=lambda e: float(e["ts"])):
        args = event.get("args", {})
        thread, at = launches.get(args.get("correlation"), ((None, None), 0.0))
        operation = _around(ranges.get(thread, []), at)
        start, length = (float(event["ts"]) - zero) / 1e6, float(event.get("dur", 0)) / 1e6
        out.kernels.append(Kernel(str(event["name"]), start, length, int(args.get("stream", 0)), operation))
    return out


def _around(spans: list[tuple[float, float, int]], at: float) -> int | None:
    """The number of the range that holds a moment."""
    index = bisect.bisect_right(spans, (at, float("inf"), 0)) - 1
    if index < 0 or at > spans[index][0] + spans[index][1]:
        return None
    return spans[index][2]


def traced(run: Callable[[], None]) -> KernelTrace:
    """Run under torch.profiler and read what it saw; what goes wrong with the profiler is told, and the run goes on."""
    from torch.profiler import ProfilerActivity, profile

    problem = ""
    profiler: Any = None
    try:
        with warnings.catch_warnings():
            # torch warns that a profile without a schedule is one cycle, which is what is wanted.
            warnings.filterwarnings("ignore", message=".*clears events at the end of each cycle.*")
            profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            profiler.start()
    except RuntimeError as error:
        profiler, problem = None, _told(error)
    try:
        run()
    finally:
        if profiler is not None:
            try:
                profiler.stop()
            except RuntimeError as error:
                profiler, problem = None, _told(error)
    if profiler is None:
        return KernelTrace(problem=problem)
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "trace.json"
            profiler.export_chrome_trace(str(path))
            found = read_trace(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"])
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        return KernelTrace(problem=_told(error))
    if not found.kernels:
        found.problem = "torch.profiler saw no kernel"
    return found


def _told(error: Exception) -> str:
    return f"torch.profiler failed ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
