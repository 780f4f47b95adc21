"""Linear layers of 2 to 128 rows at the speed at which memory gives weights, with norm, activation and residual fused.

Legend: M rows of x  N outputs  K inputs
"""

# Gluon types a layout as a constant of its language.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rooflight.ops.kernels import ceil_div, counters_of, processors
from rooflight.ops.kernels.stream_kernel import stream_linear_kernel
from rooflight.ops.kernels.stream_plan import HALF, MOST_TILES, Plan, check, plan_for, room_of, rows_block, tiles_of

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], _DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


def stream_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm_weight_K: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    residual_MN: Tensor | None = None,
    activation: str | None = None,
    plan: Plan | None = None,
    early: bool = True,
) -> Tensor:
    """y = W·h + b of at most 128 rows, h = x·rstd·(offset + norm weight) or x; y = f(gate)·up with an activation.

    residual_MN: y is added to it in place, in fp32 and rounded once; it is what is returned. activation: the weight's
    rows are all gates, then all values. plan: instead of the rule's. early: begin before the launch ahead
    ends, which then must not write the weights.
    """
    check(x_MK, weight_NK, bias_N, norm_weight_K, residual_MN, activation)
    (rows, inputs), gated = x_MK.shape, activation is not None
    outputs = weight_NK.shape[0] // (2 if gated else 1)
    plan = plan or plan_for(rows, outputs, inputs, gated, processors(x_MK.device))
    out = x_MK.new_empty((rows, outputs)) if residual_MN is None else residual_MN
    room = room_of(rows)
    block, steps, tiles = rows_block(rows), ceil_div(inputs, plan.inputs), tiles_of(outputs, gated)
    slots, part = 2 * plan.programs, 2 * HALF * block
    sums = torch.empty((slots * (part + block),), dtype=torch.float32, device=x_MK.device)
    stream_linear_kernel[(plan.programs,)](
        _descriptor(weight_NK, HALF, plan.inputs),
        _descriptor(x_MK, block, plan.inputs),
        out,
        bias_N,
        norm_weight_K,
        sums,
        sums[slots * part :],
        counters_of(x_MK.device, "linear", MOST_TILES),
        eps,
        offset,
        rows,
        outputs,
        inputs,
        out.stride(0),
        steps,
        steps * tiles,
        KIND=activation or "none",
        ADDS=residual_MN is not None,
        STAGES=plan.stages,
        num_warps=room.warps,
        maxnreg=room.registers,
        launch_pdl=early,
    )
    return out
