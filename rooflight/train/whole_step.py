"""A step over all of its micro-batches, from a walk over two: the second's operations again for those that follow."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from rooflight.workload.record import FORWARD, OPTIMIZER
from rooflight.workload.roofline import Timed
from rooflight.workload.walk import Walk

T = TypeVar("T")


def second_micro_batch(walk: Walk) -> tuple[int, int] | None:
    """(first step, one past the last) of a walk's second micro-batch; None where it has one only."""
    phases = [walk.trace.records[step.record].phase for step in walk.steps]
    start = None
    backward = False
    for index, phase in enumerate(phases):
        if phase == OPTIMIZER:
            return None if start is None else (start, index)
        if start is None and backward and phase == FORWARD:
            start = index
        backward = backward or phase != FORWARD
    return None if start is None else (start, len(phases))


def whole_step(timed: Timed, micro_batches: int) -> Timed:
    """The timed walk of two micro-batches with the second repeated until there are `micro_batches` of them."""
    again = micro_batches - 2
    found = second_micro_batch(timed.walk) if again > 0 else None
    if found is None:
        return timed
    start, stop = found

    def repeated(items: list[T]) -> list[T]:
        return items[:stop] + items[start:stop] * again + items[stop:]

    walk = replace(timed.walk, steps=repeated(timed.walk.steps))
    return replace(timed, walk=walk, seconds=repeated(timed.seconds), bounds=repeated(timed.bounds))
