"""Memory over time: bytes that stand at each moment of a run, by category, and what stands at the peak."""

from __future__ import annotations

from rooflight.workload.explanation import Memory, Moment
from rooflight.workload.walk import Walk, general_path

# Storages that the run itself makes carry no label until it is known what became of them.
ACTIVATIONS = "activations"
CATEGORIES = ("weights", "gradients", "optimizer", ACTIVATIONS, "kv cache", "inputs")
_MOMENTS = 400


def over_time(walk: Walk, capacity: float) -> Memory:
    """Play the walk's allocations and frees in the order of the whole run."""
    standing = {kind: float(size) for kind, size in walk.standing.items()}
    now = {kind: standing.get(kind, 0.0) for kind in CATEGORIES}
    peak_total, peak, peak_label = sum(now.values()), dict(now), "before the run"
    highest = dict(now)
    keep_every = max(1, len(walk.steps) // _MOMENTS)
    timeline = [Moment("before the run", dict(now))]
    for index, step in enumerate(walk.steps):
        record = walk.trace.records[step.record]
        changes = [(walk.trace.kinds.get(storage, ACTIVATIONS), float(size)) for storage, size in record.changes]
        for kind, size in changes:
            now[kind] = now.get(kind, 0.0) + max(size, 0.0)
        total = sum(now.values())
        place = f"{record.phase}: {general_path(record.path) or record.name} ({record.name})"
        if step.layer is not None:
            place += f", layer {step.layer}"
        if total > peak_total:
            peak_total, peak, peak_label = total, dict(now), place
        for kind, size in now.items():
            highest[kind] = max(highest.get(kind, 0.0), size)
        if index % keep_every == 0:
            timeline.append(Moment(place, dict(now)))
        # What an operation freed still stood while it ran.
        for kind, size in changes:
            now[kind] += min(size, 0.0)
    return Memory(
        weights=standing.get("weights", 0.0),
        gradients=highest.get("gradients", 0.0),
        optimizer=highest.get("optimizer", 0.0),
        activations_peak=highest.get(ACTIVATIONS, 0.0),
        kv_cache=standing.get("kv cache", 0.0),
        total=peak_total,
        capacity=capacity,
        peak_label=peak_label,
        at_peak=sorted(((kind, size) for kind, size in peak.items() if size > 0), key=lambda item: -item[1]),
        timeline=timeline,
    )
