"""How the scripts of one operation each time a GPU: replays of a CUDA graph, compiling ahead, and what memory gives."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from rooflight.hardware.timing import time_call

T = TypeVar("T")
J = TypeVar("J")
R = TypeVar("R")


@functools.cache
def stream() -> torch.cuda.Stream:
    """The one on which all calls are captured."""
    return torch.cuda.Stream()


def eager_seconds(run: Callable[[], object]) -> float:
    """Time of a second call, on the device or by its launches, to tell how many a graph should hold."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream()):
        run()
        begin.record()
        run()
        end.record()
        end.synchronize()
    return max(begin.elapsed_time(end) * 1e-3, 1e-6)


def graph_seconds(
    run: Callable[[T], object], inputs: Sequence[T], turns: int, replays: int = 5, warm_replays: int = 1
) -> float:
    """Median time of a call, of replays of one graph of `turns` calls that take turns through the inputs.

    warm_replays: before those that are timed, for an idle card's clocks are low.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Not torch.cuda.graph(): that empties the allocator's cache each time.
    with torch.cuda.stream(stream()):
        # Outside of the capture, for libraries allocate when they first run on a stream.
        run(inputs[0])
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for each in itertools.islice(itertools.cycle(inputs), turns):
                run(each)
        finally:
            graph.capture_end()
        for _ in range(warm_replays):
            graph.replay()
        times = []
        for _ in range(replays):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3 / turns)
    torch.cuda.synchronize()
    graph.reset()
    return statistics.median(times)


def attempt(run: Callable[[], T], label: str, otherwise: T) -> T:
    """What it gives, or where it fails `otherwise` and a line: others go on."""
    try:
        return run()
    except Exception as failure:
        print(f"FAILED: {label}: {type(failure).__name__}: {str(failure).strip()[:200]}", flush=True)
        torch.cuda.synchronize()
        return otherwise


def in_processes(work: Callable[[J], R], jobs: Iterable[J]) -> list[R]:
    """What comes of each job, most often a kernel in Triton's cache on disk: one process takes a second for each.

    Nothing, and a line, where processes cannot be had.
    """
    jobs = list(jobs)
    workers = max(1, min(14, os.cpu_count() or 1, len(jobs)))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(work, jobs))
    except (RuntimeError, OSError) as error:
        print(f"compiling ahead failed ({error}); kernels are compiled one by one", file=sys.stderr)
        return []


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 4 GiB, read and written."""
    source = torch.randn(2**31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    # An idle card's memory clock is low: the first figure is for waking it up (2.76 TB/s was seen where 4.25 is right).
    time_call(lambda: target.copy_(source), device="cuda", budget_seconds=0.5)
    return 2 * source.nbytes / time_call(lambda: target.copy_(source), device="cuda", budget_seconds=0.3).seconds


def read_bandwidth() -> float:
    """Bytes per second of the largest of 4 GiB of integers."""
    x = torch.randn(2**31, dtype=torch.bfloat16, device="cuda").view(torch.int32)
    time_call(lambda: x.amax(), device="cuda", budget_seconds=0.5)
    return x.nbytes / time_call(lambda: x.amax(), device="cuda", budget_seconds=0.3).seconds
