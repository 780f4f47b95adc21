"""Walk a program once on fake tensors and lay its records out in the order in which the whole model runs them.

A decoder is walked with each distinct layer once; the whole run is the walk with every layer's records repeated where
that layer stands, forwards in order and backwards in reverse. That is exact, for layers of one kind do the same work.
"""

from __future__ import annotations

import gc
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from rooflight.errors import RooflightError, UntraceableModule
from rooflight.workload.program import Program
from rooflight.workload.record import BACKWARD, FORWARD, RECOMPUTE, Record, Recorder, Trace, tensors_in
from rooflight.workload.untraceable import advice, cause

_PASSES = (FORWARD, BACKWARD, RECOMPUTE)
_LAYER = re.compile(r"^layers\.(\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of the whole run: the record that stands for it, and the layer of the whole that it is in."""

    record: int
    layer: int | None


@dataclass(slots=True)
class Walk:
    """A trace, the whole run's steps over it, and the bytes that stand before the run begins, by kind."""

    trace: Trace
    steps: list[Step]
    standing: dict[str, Any]

    def counts(self) -> list[int]:
        """How often each record runs in the whole."""
        counts = [0] * len(self.trace.records)
        for step in self.steps:
            counts[step.record] += 1
        return counts


def layer_of(path: str) -> int | None:
    """The layer index in a module path, or None outside the layers."""
    match = _LAYER.match(path)
    return int(match.group(1)) if match else None


def general_path(path: str) -> str:
    """A module path with its layer index replaced by a star, so that layers of a model share rows."""
    return _LAYER.sub("layers.*", path)


@contextmanager
def fake_tensors(shape_env: Any = None) -> Iterator[FakeTensorMode]:
    """Inside, tensors have shapes and no memory."""
    # The engine frees what a step saved by reference counts; a collector run in the middle only costs time.
    collecting = gc.isenabled()
    gc.disable()
    # What a shape function raises, torch also logs with its traceback; we say it in the one line of our own error.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
            # torch's own deepcopy of a parameter asks a fake tensor for its address, and warns of itself.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield mode
    finally:
        log.disabled = quiet
        if collecting:
            gc.enable()


def dry(build: Callable[[], Program], shape_env: Any = None) -> Walk:
    """Walk the program that `build` makes, without memory or arithmetic.

    Raises UntraceableModule where the program asks for values, which fake tensors do not have.
    """
    try:
        with fake_tensors(shape_env):
            return record(build())
    except RooflightError:
        raise
    except Exception as error:
        raise UntraceableModule(
            f"the program cannot be run on fake tensors: {cause(error)}; {advice(error)}"
        ) from error


def record(program: Program, **recorder_options: Any) -> Walk:
    """Run the program once under a recorder, dry or wet as its tensors are."""
    recorder = Recorder(program.module, **recorder_options)
    standing: dict[str, Any] = {}
    for kind, pieces in program.standing.items():
        standing[kind] = 0
        for tree, count in pieces:
            recorder.know(tree, kind)
            standing[kind] += count * _bytes(tree)
    with recorder:
        result = program.step(recorder)
    del result
    trace = recorder.trace()
    return Walk(trace, expand(trace.records, program.order), standing)


def _bytes(tree: Any) -> Any:
    seen: set[int] = set()
    total: Any = 0
    for tensor in tensors_in(tree):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total = total + storage.nbytes()
    return total


def expand(records: list[Record], order: tuple[int, ...]) -> list[Step]:
    """Steps of the whole run: records of each walked layer repeated at every layer that `order` maps to it."""
    if not order:
        return [Step(index, None) for index in range(len(records))]
    layers = list(enumerate(order))
    steps: list[Step] = []
    index = 0
    for start, stop, backward in _runs(records):
        steps += [Step(i, None) for i in range(index, start)]
        segments = _segments(records, start, stop)
        for layer, folded in reversed(layers) if backward else layers:
            steps += [Step(i, layer) for i in segments.get(folded, ())]
        index = stop
    return steps + [Step(i, None) for i in range(index, len(records))]


def _runs(records: list[Record]) -> list[tuple[int, int, bool]]:
    """(first record, one past the last, whether backward) of each pass through the layers, in order.

    A step of several micro-batches passes forward and back several times.
    """
    runs: list[tuple[int, int, bool]] = []
    for index, record in enumerate(records):
        if layer_of(record.path) is None or record.phase not in _PASSES:
            continue
        backward = record.phase != FORWARD
        if runs and runs[-1][2] == backward:
            runs[-1] = (runs[-1][0], index + 1, backward)
        else:
            runs.append((index, index + 1, backward))
    return runs


def _segments(records: list[Record], start: int, stop: int) -> dict[int, list[int]]:
    """Records of a run by walked layer; what carries no layer belongs to the one before it."""
    segments: dict[int, list[int]] = {}
    layer = layer_of(records[start].path) or 0
    for index in range(start, stop):
        here = layer_of(records[index].path)
        layer = layer if here is None else here
        segments.setdefault(layer, []).append(index)
    return segments


def total_flops(walk: Walk) -> int:
    """FLOPs of the whole run."""
    counts = walk.counts()
    return sum(int(r.cost.total_flops) * n for r, n in zip(walk.trace.records, counts, strict=True))


__all__ = ["Step", "Walk", "dry", "expand", "fake_tensors", "general_path", "layer_of", "record"]
