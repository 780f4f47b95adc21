"""Which products of few rows run in our kernels and which in cuBLAS, and how ours are cut.

Legend: M rows of x  N outputs  K inputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rooflight.ops.kernels import power_of_2

MOST_ROWS = 4
FUSED_ROWS = 1
LEAST_INPUTS, MOST_INPUTS = 256, 16384
_DTYPES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch constants: outputs and inputs of a tile of weights, warps of a program, and stages of its pipeline.

    With one stage weights go straight from memory to registers.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Class:
    """Products of up to so many rows, inputs and Mi weights; without a plan they are cuBLAS's."""

    rows: int
    inputs: float
    weights: float
    plan: Plan | None


ANY = float("inf")
# The first class that holds a product decides; measured by `python -m benchmarks.ops_skinny --tune` on an H200.
# At one row ours is 1.03 to 1.15 times cuBLAS on the 8B's layers, and 3.8 times on 1024×2048, for which cuBLAS takes a
# slow kernel. From two rows on cuBLAS wins but on the smallest: a tensor core's 8 columns cost no more than one.
CLASSES: tuple[Class, ...] = (
    Class(1, 1024, 8, Plan(4, 512, 2, 1)),
    Class(1, 1024, ANY, None),
    Class(1, 2048, 8, Plan(2, 2048, 4, 1)),
    Class(1, 4096, 3, Plan(1, 4096, 4, 1)),
    Class(1, 4096, ANY, Plan(2, 4096, 4, 1)),
    Class(1, ANY, ANY, Plan(4, 1024, 4, 1)),
    Class(2, 1024, ANY, None),
    Class(2, 2048, 2, Plan(4, 1024, 4, 4)),
    Class(2, 4096, 3, Plan(2, 4096, 8, 1)),
    Class(4, 1024, ANY, None),
    Class(4, 2048, 2, Plan(4, 1024, 4, 1)),
    Class(4, 4096, 3, Plan(2, 1024, 4, 1)),
)


def plan_for(rows: int, outputs: int, inputs: int) -> Plan | None:
    """How a product is cut; None: better left to cuBLAS."""
    weights = outputs * inputs / 2**20
    for found in CLASSES:
        if rows <= found.rows and inputs <= found.inputs and weights <= found.weights:
            return found.plan
    return None


def fused_plan_for(rows: int, inputs: int, gated: bool, added: bool) -> Plan | None:
    """How a product is cut that carries a norm, a gate or a sum along; None: left to separate kernels.

    All inputs of an output at once, so that weights are on their way before the kernel ahead is through. Measured in a
    chain of a layer's four products (`benchmarks/ops_decode_layer.py`): two outputs of a norm's product in a program, a
    sum's programs of 16 KiB, and for a gate, whose programs read two matrices, half of that.
    """
    if rows > FUSED_ROWS or inputs > MOST_INPUTS:
        return None
    block = power_of_2(max(inputs, LEAST_INPUTS))
    warps = max(4, block // 2048)
    if gated:
        return Plan(max(1, 2048 // block), block, max(1, block // 1024), 1)
    return Plan(max(1, 8192 // block) if added else 2, block, warps, 1)


def takes(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, fused: bool = False) -> bool:
    """Whether a linear layer on a GPU runs in our kernels: few rows, half precision, and a class with a plan.

    fused: whether a norm, a gate or a sum goes along.
    """
    # Every linear layer of a training step asks; most are answered here.
    if x_TK.dim() == 0 or x_TK.numel() > MOST_ROWS * x_TK.shape[-1]:
        return False
    if weight_NK.dim() != 2 or x_TK.dtype not in _DTYPES or weight_NK.dtype != x_TK.dtype:
        return False
    outputs, inputs = weight_NK.shape
    if not inputs or x_TK.shape[-1] != inputs or not outputs > 0 or weight_NK.stride(1) != 1:
        return False
    if bias_N is not None and (bias_N.dtype != x_TK.dtype or bias_N.shape != (outputs,) or bias_N.stride(0) != 1):
        return False
    rows = x_TK.numel() // inputs
    if fused:
        return 0 < rows <= FUSED_ROWS and inputs <= MOST_INPUTS
    return rows > 0 and plan_for(rows, outputs, inputs) is not None
