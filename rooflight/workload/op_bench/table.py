"""Every operation of `bench ops` and its sizes, found by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rooflight.errors import InvalidValue
from rooflight.workload.op_bench import attend, cache, choose, dense, experts, fused, learn
from rooflight.workload.op_bench.case import Operation
from rooflight.workload.op_bench.shapes import SHAPES

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        *dense.OPERATIONS,
        *fused.OPERATIONS,
        *attend.OPERATIONS,
        *cache.OPERATIONS,
        *experts.OPERATIONS,
        *learn.OPERATIONS,
        *choose.OPERATIONS,
    )
}
_NAMES = {name: op.name for op in OPERATIONS.values() for name in (op.name, *op.also)}


def chosen(names: Iterable[str]) -> list[Operation]:
    """The named operations, all of them for no name; raises InvalidValue for one that is unknown."""
    found: dict[str, Operation] = {}
    for name in names:
        key = name.lower().replace("-", "_")
        if key not in _NAMES:
            near = difflib.get_close_matches(key, _NAMES, 3)
            hint = f"did you mean {', '.join(near)}?" if near else f"use some of {', '.join(OPERATIONS)}"
            raise InvalidValue(f"operation {name!r} is unknown; {hint}")
        found[_NAMES[key]] = OPERATIONS[_NAMES[key]]
    return list(found.values()) or list(OPERATIONS.values())


__all__ = ["OPERATIONS", "SHAPES", "chosen"]
