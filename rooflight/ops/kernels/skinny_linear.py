"""y = x·Wᵀ + b for the fewest rows, at the speed at which memory gives the weights: the point is bytes on their way.

Products are made in registers: all lanes of a program lie along K, no sum leaves it, and nothing is split. What stands
around the product in a decode step goes along: the RMSNorm of x before it, a gate's activation or a residual after it.
Legend: M rows of x  N outputs  K inputs  C chunks of eight inputs
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div, early_launch, power_of_2
from rooflight.ops.kernels.activation import apply
from rooflight.ops.kernels.skinny_plan import Plan, fused_plan_for, plan_for

CHUNK = tl.constexpr(8)  # 16 bytes of bf16


# Tiles are of four dimensions from their loads on, [M, N, C, 8], so that none is laid out anew between threads.
@triton.jit
def _weights(w_ptr, at_CK, out_N, outputs, inputs):
    """A tile of weights: [1, N, C, 8]."""
    inside = (out_N < outputs)[None, :, None, None] & (at_CK < inputs)[None, None, :, :]
    return tl.load(w_ptr + at_CK[None, None, :, :], inside, 0.0)


@triton.jit
def _inputs(x_ptr, norm_ptr, at_CK, row_M, rows, inputs, offset):
    """x, times the norm's weight if there is one, and x² summed over chunks: [M, 1, C, 8] and [M, 1, C]."""
    at_CK = at_CK[None, None, :, :]
    x = tl.load(x_ptr + at_CK, (row_M < rows)[:, None, None, None] & (at_CK < inputs), 0.0).to(tl.float32)
    squares = tl.sum(x * x, 3)
    if norm_ptr is not None:
        x *= tl.load(norm_ptr + at_CK, at_CK < inputs, 0.0).to(tl.float32) + offset
    return x, squares


@triton.jit
def _finished(total_MNC, rstd_M1, bias_ptr, out_N, outputs):
    """Sums of chunks to outputs for the normalised x, with their bias: [M, N]."""
    y_MN = tl.sum(total_MNC, 2) * rstd_M1
    if bias_ptr is not None:
        y_MN += tl.load(bias_ptr + out_N, out_N < outputs, 0.0).to(tl.float32)[None, :]
    return y_MN


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    up_ptr,
    bias_ptr,
    up_bias_ptr,
    norm_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    w_stride,
    eps,
    offset,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    row_M = tl.arange(0, BLOCK_M)
    out_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within_CK = tl.arange(0, BLOCK_K // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x_ptr += (row_M * x_stride)[:, None, None, None]
    at_N = (out_N.to(tl.int64) * w_stride)[None, :, None, None]
    w_ptr += at_N
    if GATE is not None:
        up_ptr += at_N
    if WHOLE:
        # Of all that is read only weights may be asked for before the kernel ahead is through.
        w = _weights(w_ptr, within_CK, out_N, outputs, inputs)
        if GATE is not None:
            up = _weights(up_ptr, within_CK, out_N, outputs, inputs)
        if EARLY:
            gdc_wait()
        x, squares = _inputs(x_ptr, norm_ptr, within_CK, row_M, rows, inputs, offset)
        total_MNC = tl.sum(w.to(tl.float32) * x, 3)
        if GATE is not None:
            total_up_MNC = tl.sum(up.to(tl.float32) * x, 3)
    else:
        if EARLY:
            gdc_wait()
        total_MNC = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // CHUNK), tl.float32)
        total_up_MNC = total_MNC
        squares = tl.zeros((BLOCK_M, 1, BLOCK_K // CHUNK), tl.float32)
        for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
            at_CK = start + within_CK
            w = _weights(w_ptr, at_CK, out_N, outputs, inputs)
            x, more = _inputs(x_ptr, norm_ptr, at_CK, row_M, rows, inputs, offset)
            squares += more
            total_MNC += tl.sum(w.to(tl.float32) * x, 3)
            if GATE is not None:
                total_up_MNC += tl.sum(_weights(up_ptr, at_CK, out_N, outputs, inputs).to(tl.float32) * x, 3)
    rstd_M1 = tl.full((BLOCK_M, 1), 1.0, tl.float32)
    if norm_ptr is not None:
        rstd_M1 = tl.rsqrt(tl.sum(squares, 2) / inputs + eps)
    y_MN = _finished(total_MNC, rstd_M1, bias_ptr, out_N, outputs)
    if GATE is not None:
        y_MN = apply(y_MN, GATE) * _finished(total_up_MNC, rstd_M1, up_bias_ptr, out_N, outputs)
    y_ptr += row_M.to(tl.int64)[:, None] * outputs + out_N[None, :]
    inside_MN = (row_M < rows)[:, None] & (out_N < outputs)[None, :]
    if ADDED:
        y_MN += tl.load(y_ptr, inside_MN, 0.0).to(tl.float32)
    tl.store(y_ptr, y_MN, inside_MN)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, plan: Plan | None = None) -> Tensor:
    """x·Wᵀ + b, summed in fp32; rows of x and of the weight may be strided. plan: instead of the rule's."""
    y = x_TK.new_empty((*x_TK.shape[:-1], weight_NK.shape[0]))
    _launch(y, x_TK, weight_NK, bias_N, plan=plan)
    return y


def norm_linear(
    x_TK: Tensor,
    norm_weight_K: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float,
    gate: str | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """RMSNorm(x)·Wᵀ + b; with a gate act(first half of it)·second half. The norm's result is not rounded between."""
    outputs = weight_NK.shape[0] if gate is None else weight_NK.shape[0] // 2
    y = x_TK.new_empty((*x_TK.shape[:-1], outputs))
    _launch(y, x_TK, weight_NK, bias_N, norm_weight_K, eps, offset, gate, plan=plan)
    return y


def add_linear(
    residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, plan: Plan | None = None
) -> None:
    """residual += x·Wᵀ + b in place, rounded once; the residual is contiguous."""
    _launch(residual_TN, x_TK, weight_NK, bias_N, added=True, plan=plan)


def _launch(
    y: Tensor,
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    gate: str | None = None,
    added: bool = False,
    plan: Plan | None = None,
) -> None:
    inputs, outputs = weight_NK.shape[1], y.shape[-1]
    x_MK = x_TK if x_TK.dim() == 2 else x_TK.reshape(-1, inputs)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    rows = x_MK.shape[0]
    if plan is None and (norm_weight_K is not None or added):
        plan = fused_plan_for(rows, inputs, gate is not None, added)
    plan = plan or plan_for(rows, weight_NK.shape[0], inputs)
    if plan is None:
        raise InvalidValue(
            f"no plan for {rows}×{weight_NK.shape[0]}×{inputs}: add one to rooflight/ops/kernels/skinny_plan.py"
        )
    # A plain product's weights may be what the kernel ahead has just written; those of a layer are parameters.
    early = early_launch(rows) and (norm_weight_K is not None or added)
    _linear_kernel[(ceil_div(outputs, plan.outputs),)](
        y,
        x_MK,
        weight_NK,
        None if gate is None else weight_NK[outputs:],
        bias_N,
        None if gate is None or bias_N is None else bias_N[outputs:],
        norm_weight_K,
        rows,
        outputs,
        inputs,
        x_MK.stride(0),
        weight_NK.stride(0),
        eps,
        offset,
        GATE=gate,
        ADDED=added,
        EARLY=early,
        BLOCK_M=power_of_2(rows),
        BLOCK_N=plan.outputs,
        BLOCK_K=plan.inputs,
        WHOLE=inputs <= plan.inputs,
        STAGES=plan.stages,
        num_warps=plan.warps,
        launch_pdl=early,
    )
