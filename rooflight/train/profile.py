"""`profile_step`: take one wet training step operation by operation, and lay it beside what was predicted for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rooflight.ops import aten
from rooflight.ops.aten.registry import rule_of
from rooflight.ops.op import find
from rooflight.train.accounting import Prediction
from rooflight.train.comparison import HeadroomRow, Held, Profile, Slice, compare, counted
from rooflight.train.kernel_trace import MARK, KernelTrace, traced
from rooflight.workload.record import Recorder


class _Around(AbstractContextManager[None]):
    """Notes when an operation starts and ends, and marks it for the profiler."""

    __slots__ = ("_at", "_mark", "_number", "_spans")

    def __init__(self, spans: dict[int, tuple[float, float]], number: int, mark: bool):
        self._spans, self._number = spans, number
        self._mark = torch.profiler.record_function(f"{MARK}{number}") if mark else None

    def __enter__(self) -> None:
        if self._mark is not None:
            self._mark.__enter__()
        self._at = time.perf_counter()

    def __exit__(self, *exc: Any) -> None:
        # A view that was free leaves its time under the number of the next operation, which then writes its own.
        self._spans[self._number] = (self._at, time.perf_counter() - self._at)
        if self._mark is not None:
            self._mark.__exit__(*exc)


class _Lenient(Recorder):
    """A recorder that lets an operator without a price pass, for no price is worth a training run."""

    def __init__(self, module: nn.Module, around: Callable[[int], Any]):
        super().__init__(module, around=around)
        self.unpriced: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = find(func) is not None or func._schema.name in aten.VIEWS or rule_of(func) is not None
        if not known and not aten.decomposes(func):
            self.unpriced[str(func)] += 1
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def profile_step(
    take_step: Callable[[Recorder], None],
    module: nn.Module,
    device: torch.device,
    prediction: Prediction | None,
    *,
    step: int = 0,
    micro_batches: int = 1,
) -> Profile:
    """Take a step under a recorder and lay what it did beside the prediction.

    take_step: takes the whole step, handing the recorder on. micro_batches: of the step, as the prediction holds two
        at most. What `take_step` raises is passed on; what goes wrong with measuring is told in the notes.
    """
    gpu = device.type == "cuda"
    spans: dict[int, tuple[float, float]] = {}
    recorder = _Lenient(module, lambda number: _Around(spans, number, gpu))
    wall = [0.0, 0.0]

    def run() -> None:
        wall[0] = time.perf_counter()
        with recorder:
            take_step(recorder)
        if gpu:
            torch.cuda.synchronize(device)
        wall[1] = time.perf_counter()

    if gpu:
        torch.cuda.synchronize(device)
        seen = traced(run)
    else:
        run()
        seen = KernelTrace()
    if not seen.ranges:
        seen.ranges = {number: (start - wall[0], seconds) for number, (start, seconds) in spans.items()}
    profile = compare(recorder.records, seen, prediction, wall[1] - wall[0], str(device), step, micro_batches)
    if recorder.unpriced:
        profile.notes.append(f"without a price, and so left out: {counted(recorder.unpriced)}")
    return profile


__all__ = ["HeadroomRow", "Held", "Profile", "Slice", "profile_step"]
