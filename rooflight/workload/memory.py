"""Memory over time: bytes that stand at each moment of a run, by category, and what stands at the peak."""

from __future__ import annotations

from collections.abc import Iterator

from rooflight.workload.explanation import Memory, Moment
from rooflight.workload.walk import Step, Walk, general_path

# Storages that the run itself makes carry no label until it is known what became of them.
ACTIVATIONS = "activations"
# What an operation holds only while it runs, beyond what it reads and writes.
WORKSPACE = "workspace"
CATEGORIES = ("weights", "gradients", "optimizer", ACTIVATIONS, WORKSPACE, "kv cache", "inputs")
BEFORE = "before the run"
_MOMENTS = 400


def before(walk: Walk) -> dict[str, float]:
    """Bytes by category before the run begins."""
    return {kind: float(walk.standing.get(kind, 0)) for kind in CATEGORIES}


def play(walk: Walk) -> Iterator[dict[str, float]]:
    """Bytes by category while each step of the whole run runs, in order; one dict, changed from step to step.

    What an operation makes stands with what it frees and with its workspace, for it frees when it is done.
    """
    now = before(walk)
    for step in walk.steps:
        record = walk.trace.records[step.record]
        changes = [(walk.trace.kinds.get(storage, ACTIVATIONS), float(size)) for storage, size in record.changes]
        for kind, size in changes:
            now[kind] = now.get(kind, 0.0) + max(size, 0.0)
        now[WORKSPACE] = float(record.cost.workspace)
        yield now
        for kind, size in changes:
            now[kind] += min(size, 0.0)


def place(walk: Walk, step: Step) -> str:
    """Where a step stands, in words: phase, module, operation, layer."""
    record = walk.trace.records[step.record]
    words = f"{record.phase}: {general_path(record.path) or record.name} ({record.name})"
    return words if step.layer is None else f"{words}, layer {step.layer}"


def over_time(walk: Walk, capacity: float) -> Memory:
    """Play the walk's allocations and frees in the order of the whole run."""
    start = before(walk)
    peak_total, peak, peak_label, highest = sum(start.values()), dict(start), BEFORE, dict(start)
    timeline = [Moment(BEFORE, dict(start))]
    keep_every = max(1, len(walk.steps) // _MOMENTS)
    for index, (step, now) in enumerate(zip(walk.steps, play(walk), strict=True)):
        total = sum(now.values())
        if total > peak_total:
            peak_total, peak, peak_label = total, dict(now), place(walk, step)
        for kind, size in now.items():
            highest[kind] = max(highest.get(kind, 0.0), size)
        if index % keep_every == 0:
            timeline.append(Moment(place(walk, step), dict(now)))
    return Memory(
        weights=start["weights"],
        gradients=highest["gradients"],
        optimizer=highest["optimizer"],
        activations_peak=highest[ACTIVATIONS],
        kv_cache=start["kv cache"],
        total=peak_total,
        capacity=capacity,
        peak_label=peak_label,
        at_peak=sorted(((kind, size) for kind, size in peak.items() if size > 0), key=lambda item: -item[1]),
        timeline=timeline,
    )
