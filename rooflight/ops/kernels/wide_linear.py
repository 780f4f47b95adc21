"""Linear layers of up to 128 rows over small matrices, with norm, activation and residual in one launch (Hopper).

Legend: T tokens  M rows of x  N outputs  K inputs  D width
"""

# Gluon types a layout as a constant of its language.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div, counters_of, processors
from rooflight.ops.kernels.stream_plan import MOST_TILES
from rooflight.ops.kernels.wide_kernel import wide_linear_kernel
from rooflight.ops.kernels.wide_plan import (
    Plan,
    check,
    fits,
    plan_for,
    programs_of,
    registers_of,
    steps_of,
)

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def norm_linear(
    x_TK: Tensor,
    norm_weight_K: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float = 0.0,
    gate: str | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """RMSNorm(x)·Wᵀ + b; with a gate act(first half of it)·second half. W times the norm's weight is rounded, not x."""
    out_TN = x_TK.new_empty((x_TK.shape[0], weight_NK.shape[0] // (1 if gate is None else 2)))
    _launch(out_TN, x_TK, weight_NK, bias_N, norm_weight_K, eps, offset, gate, plan=plan)
    return out_TN


def add_linear(
    residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, plan: Plan | None = None
) -> None:
    """residual += x·Wᵀ + b in place, summed in fp32 and rounded once."""
    _launch(residual_TN, x_TK, weight_NK, bias_N, adds=True, plan=plan)


def _weight_descriptor(weight_NK: Tensor, plan: Plan, gates: int) -> TensorDescriptor:
    """Eight rows of gates, then the eight of their values, and so on: what a thread of the product has together."""
    (rows, inputs), stride = weight_NK.shape, weight_NK.stride(0)
    block = [plan.height // (8 * gates), gates, 8, plan.inputs]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[weight_NK.dtype])
    shape = [rows // (8 * gates), gates, 8, inputs]
    return TensorDescriptor(weight_NK, shape, [8 * stride, rows // gates * stride, stride, 1], block, layout)


def _launch(
    out_MN: Tensor,
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    gate: str | None = None,
    adds: bool = False,
    plan: Plan | None = None,
) -> None:
    check(x_MK, weight_NK, bias_N, norm_weight_K, out_MN if adds else None, gate)
    (rows, inputs), gated, device = x_MK.shape, gate is not None, x_MK.device
    outputs = out_MN.shape[1]
    multiprocessors = processors(device)
    plan = plan or plan_for(rows, outputs, inputs, gated, multiprocessors)
    if plan is None or not fits(plan, inputs, gated):
        raise InvalidValue(f"{plan} does not fit {rows}×{outputs}×{inputs}: see rooflight/ops/kernels/wide_plan.py")
    parts, splits, steps = ceil_div(rows, plan.rows), plan.splits, steps_of(plan, inputs)
    programs = programs_of(plan, rows, outputs, gated)
    sums = squares = counters = None
    if splits > 1:
        size = programs * plan.height * plan.rows
        sums = torch.empty((size + programs * plan.rows,), dtype=torch.float32, device=device)
        squares = sums[size:]
        counters = counters_of(device, "linear", MOST_TILES)
    x_block = [plan.rows, plan.inputs]
    x_layout = gl.NVMMASharedLayout.get_default_for(x_block, _DTYPES[x_MK.dtype])
    wide_linear_kernel[(programs,)](
        _weight_descriptor(weight_NK, plan, 2 if gated else 1),
        TensorDescriptor(x_MK, list(x_MK.shape), list(x_MK.stride()), x_block, x_layout),
        out_MN,
        bias_N,
        norm_weight_K,
        sums,
        squares,
        counters,
        eps,
        offset,
        rows,
        outputs // 8,
        inputs,
        out_MN.stride(0) // 8,
        parts,
        KIND=gate or "none",
        ADDS=adds,
        SPLITS=splits,
        STEPS=steps,
        num_warps=4,
        maxnreg=registers_of(plan, norm_weight_K is not None),
        launch_pdl=True,
    )
