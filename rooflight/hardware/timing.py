"""The timing harness: how long one call takes on a CPU or a CUDA device, as the median of many."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils import benchmark

Call = Callable[[], object]

WARM_UP_CALLS = 3
GRAPH_SECONDS = 2e-3  # one replay is long against the resolution of CUDA events (0.5 µs)
GRAPH_NODES = 512
MIN_REPLAYS, MAX_REPLAYS = 5, 100
ATTEMPTS, WIDE_SPREAD = 3, 0.2


@dataclass(frozen=True, slots=True)
class Timing:
    """seconds: median of one call on the device. host_seconds: what launching it eagerly costs the host (CUDA only).

    spread: interquartile range over the median. captured: timed inside a CUDA graph.
    """

    seconds: float
    host_seconds: float | None
    spread: float
    captured: bool = False


def _median_and_spread(times: Sequence[float]) -> tuple[float, float]:
    middle = statistics.median(times)
    if len(times) < 4:
        return middle, (max(times) - min(times)) / middle
    lower, _, upper = statistics.quantiles(times, n=4)
    return middle, (upper - lower) / middle


def time_call(fn: Call | Sequence[Call], *, device: str | torch.device, budget_seconds: float = 0.2) -> Timing:
    """Median time of one call of `fn`.

    Several callables take turns: give as many, over as many copies of the data, as exceed the cache, to time an
    operation whose data is not in it. CPU: torch.utils.benchmark's adaptive repeats, with all threads. CUDA: repeats
    captured in one graph, replayed between events; an eager loop where `fn` cannot be captured.
    """
    calls = [fn] if callable(fn) else list(fn)
    if torch.device(device).type == "cuda":
        return _time_cuda(calls, budget_seconds)
    return _time_cpu(calls, budget_seconds)


def _time_cpu(calls: list[Call], budget_seconds: float) -> Timing:
    # The first call allocates, and its pages and oneDNN's primitives are not part of what repeats.
    started = time.perf_counter()
    calls[0]()
    first = time.perf_counter() - started
    if first >= budget_seconds:
        started = time.perf_counter()
        calls[-1]()
        return Timing(time.perf_counter() - started, None, 0.0)
    if len(calls) == 1:
        turn = calls[0]
    else:
        order = itertools.cycle(calls)

        def turn() -> object:
            return next(order)()

    timer = benchmark.Timer("turn()", globals={"turn": turn}, num_threads=torch.get_num_threads())
    best: Timing | None = None
    for _ in range(ATTEMPTS):
        measured = timer.blocked_autorange(min_run_time=max((budget_seconds - first) / 2, 1e-3))
        timing = Timing(measured.median, None, measured.iqr / measured.median)
        # Another process on these cores only ever adds time: where the blocks disagree, the quieter attempt is kept.
        if best is None or timing.seconds < best.seconds:
            best = timing
        if timing.spread < WIDE_SPREAD and len(measured.times) > 1:
            break
    return best or Timing(first, None, 0.0)


def _eager_seconds(calls: list[Call], repeats: int) -> tuple[float, float]:
    """Device and host seconds of one call in an eager loop; the host's are read before the device is waited for."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    started = time.perf_counter()
    for call in itertools.islice(itertools.cycle(calls), repeats):
        call()
    host = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats, host / repeats


def _capture(calls: list[Call], repeats: int) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in itertools.islice(itertools.cycle(calls), repeats):
                call()
    except RuntimeError:
        # A call that waits for the device (nonzero, .item()) cannot be captured; the eager loop times it.
        torch.cuda.synchronize()
        return None
    return graph


def _time_cuda(calls: list[Call], budget_seconds: float) -> Timing:
    deadline = time.perf_counter() + budget_seconds
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in itertools.islice(itertools.cycle(calls), max(WARM_UP_CALLS, len(calls))):
            call()
    torch.cuda.current_stream().wait_stream(side)
    # Fewer launches than the driver queues (1024), or the host would wait for the device.
    eager, host = _eager_seconds(calls, 50)
    repeats = min(GRAPH_NODES, max(1, int(GRAPH_SECONDS / max(eager, 1e-7))))
    repeats = max(repeats, min(len(calls), GRAPH_NODES))
    graph = _capture(calls, repeats)
    times: list[float] = []
    if graph is None:
        while len(times) < MIN_REPLAYS or (time.perf_counter() < deadline and len(times) < MAX_REPLAYS):
            times.append(_eager_seconds(calls, min(repeats, 50))[0])
    else:
        graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        while len(times) < MIN_REPLAYS or (time.perf_counter() < deadline and len(times) < MAX_REPLAYS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3 / repeats)
        graph.reset()
    middle, spread = _median_and_spread(times)
    return Timing(middle, host, spread, captured=graph is not None)


class Timer:
    """`time_call` with a device and a deadline, handed to whoever adds samples of their own to a probe.

    timer(fn) times a call; `remaining` is what is left of the budget in seconds; `say` reports progress in one line.
    """

    def __init__(self, device: str | torch.device, budget_seconds: float, say: Callable[[str], None]) -> None:
        self.device = torch.device(device)
        self.say = say
        self._deadline = time.perf_counter() + budget_seconds

    @property
    def remaining(self) -> float:
        return self._deadline - time.perf_counter()

    def __call__(self, fn: Call | Sequence[Call], *, budget_seconds: float = 0.2) -> Timing:
        return time_call(fn, device=self.device, budget_seconds=min(budget_seconds, max(self.remaining, 1e-3)))
