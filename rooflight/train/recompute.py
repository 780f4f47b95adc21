"""What selective recomputation throws away, chosen by the FLOPs that computing a byte of it again costs."""

from __future__ import annotations

from collections.abc import Callable

from rooflight.errors import InvalidValue
from rooflight.models.recompute import Recompute, recomputed_key
from rooflight.workload.memory import over_time
from rooflight.workload.record import FORWARD
from rooflight.workload.walk import Walk, layer_of

GIB = 2**30


def by_flops_a_byte(plain: Walk) -> list[tuple[str, float]]:
    """The layers' operations that leave something behind, and their FLOPs for each byte of it, the cheapest first."""
    left: dict[str, float] = {}
    flops: dict[str, float] = {}
    for record in plain.trace.records:
        if record.phase != FORWARD or layer_of(record.path) is None or record.name.startswith("aten."):
            continue
        key = recomputed_key(record.name, record.shapes)
        # What it made less what was freed right after it: what waits for the backward.
        left[key] = left.get(key, 0.0) + sum(float(size) for _, size in record.changes)
        flops[key] = flops.get(key, 0.0) + float(record.cost.total_flops)
    kept = {key: size for key, size in left.items() if size > 0}
    return sorted(((key, flops[key] / size) for key, size in kept.items()), key=lambda item: item[1])


def choose(walked: Callable[[Recompute], Walk], budget_bytes: float) -> frozenset[str]:
    """The fewest operations, cheapest to compute again first, without whose outputs activations take the budget.

    walked: the step dry under a given recomputation. Raises InvalidValue where even all of them are not enough.
    """
    ranked = [key for key, _ in by_flops_a_byte(walked("none"))]

    def activations(count: int) -> float:
        return over_time(walked(frozenset(ranked[:count])), 0.0).activations_peak

    if activations(len(ranked)) > budget_bytes:
        least = activations(len(ranked)) / GIB
        raise InvalidValue(
            f"--activation-gib {budget_bytes / GIB:g} cannot be met: with everything recomputed activations take "
            f"{least:.2f} GiB; use that or more, or a smaller --micro-batch-size, or --recompute full"
        )
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        if activations(middle) <= budget_bytes:
            high = middle
        else:
            low = middle + 1
    return frozenset(ranked[:low])
