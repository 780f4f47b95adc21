"""y = x·Wᵀ + b for the fewest rows, at the speed at which memory gives the weights: the point is bytes on their way.

Products are made in registers: all lanes of a program lie along K, no sum leaves it, and nothing is split.
Legend: M rows of x  N outputs  K inputs  C chunks of eight inputs
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div, power_of_2
from rooflight.ops.kernels.skinny_plan import Plan, plan_for

CHUNK = tl.constexpr(8)  # 16 bytes of bf16


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    w_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_M = tl.arange(0, BLOCK_M)
    out_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within_CK = tl.arange(0, BLOCK_K // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x_ptr += (row_M * x_stride)[:, None, None, None]
    w_ptr += (out_N.to(tl.int64) * w_stride)[None, :, None, None]
    total_MNC = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // CHUNK), tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        at_CK = (start + within_CK)[None, None, :, :]
        w = tl.load(w_ptr + at_CK, (out_N < outputs)[None, :, None, None] & (at_CK < inputs), 0.0)
        x = tl.load(x_ptr + at_CK, (row_M < rows)[:, None, None, None] & (at_CK < inputs), 0.0)
        total_MNC += tl.sum(w.to(tl.float32) * x.to(tl.float32), 3)
    y_MN = tl.sum(total_MNC, 2)
    if bias_ptr is not None:
        y_MN += tl.load(bias_ptr + out_N, out_N < outputs, 0.0).to(tl.float32)[None, :]
    at_MN = row_M.to(tl.int64)[:, None] * outputs + out_N[None, :]
    tl.store(y_ptr + at_MN, y_MN, (row_M < rows)[:, None] & (out_N < outputs)[None, :])


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, plan: Plan | None = None) -> Tensor:
    """x·Wᵀ + b, summed in fp32; rows of x and of the weight may be strided. plan: instead of the rule's."""
    outputs, inputs = weight_NK.shape
    x_MK = x_TK if x_TK.dim() == 2 else x_TK.reshape(-1, inputs)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    rows = x_MK.shape[0]
    y = x_TK.new_empty((*x_TK.shape[:-1], outputs))
    plan = plan or plan_for(rows, outputs, inputs)
    if plan is None:
        raise InvalidValue(f"no plan for {rows}×{outputs}×{inputs}: add one to rooflight/ops/kernels/skinny_plan.py")
    _linear_kernel[(ceil_div(outputs, plan.outputs),)](
        y,
        x_MK,
        weight_NK,
        bias_N,
        rows,
        outputs,
        inputs,
        x_MK.stride(0),
        weight_NK.stride(0),
        BLOCK_M=power_of_2(rows),
        BLOCK_N=plan.outputs,
        BLOCK_K=plan.inputs,
        STAGES=plan.stages,
        num_warps=plan.warps,
    )
    return y
