"""How a product over experts is cut, by the mean rows of an expert.

Legend: R rows, sorted by expert  X experts  N outputs  K inputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch constants: rows, outputs and inputs of a tile, warps of a program, and stages of its pipeline."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Class:
    """Products of up to so many mean rows of an expert that has any."""

    mean_rows: float
    plan: Plan


ANY = float("inf")
# The first class that holds a product decides; measured by `python -m benchmarks.ops_moe --tune` on an H200.
HALF: tuple[Class, ...] = (
    Class(2, Plan(16, 64, 128, 4, 4)),
    Class(10, Plan(16, 64, 128, 4, 4)),
    Class(20, Plan(32, 64, 128, 4, 4)),
    Class(48, Plan(64, 128, 64, 4, 4)),
    Class(ANY, Plan(128, 128, 64, 8, 3)),
)
# Without tensor cores, whose fp32 is no fp32.
SINGLE: tuple[Class, ...] = (
    Class(10, Plan(16, 32, 64, 4, 3)),
    Class(ANY, Plan(64, 64, 32, 8, 3)),
)


def mean_rows(rows: int, experts: int) -> float:
    """Rows over the experts that they can reach."""
    return rows / max(1, min(rows, experts))


def plan_for(rows: int, experts: int, dtype: torch.dtype) -> Plan:
    """How a product is cut in our kernel."""
    mean = mean_rows(rows, experts)
    return next(one.plan for one in (SINGLE if dtype == torch.float32 else HALF) if mean <= one.mean_rows)
