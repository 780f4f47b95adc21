"""Grouped linear for any number of rows an expert, from none on: a tile of rows finds its expert on the device.

Tiles are counted expert by expert. There is a program for as many as there can be, and one beyond the last does
nothing, so that no count has to reach the host. Weights lie along a tensor core's 64 rows and x along its few columns,
for decode has few rows of x and reads every weight of the experts that it hits.
Legend: R rows, sorted by expert  X experts  N outputs  K inputs
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2
from rooflight.ops.kernels.activation import CLAMP_ALPHA, _clamp, apply
from rooflight.ops.kernels.grouped_plan import Plan, plan_for

GRAD_ROWS, GRAD_COLUMNS, GRAD_WARPS = 32, 128, 4
BIAS_COLUMNS, BIAS_WARPS = 1024, 4


@triton.jit
def _find(counts_ptr, tile, experts, X: tl.constexpr, TILE: tl.constexpr):
    """(expert, first row, rows left) of a tile; no rows are left beyond the last tile."""
    number_X = tl.arange(0, X)
    count_X = tl.load(counts_ptr + number_X, number_X < experts, 0).to(tl.int32)
    tiles_X = (count_X + (TILE - 1)) // TILE
    expert = tl.sum((tl.cumsum(tiles_X, 0) <= tile).to(tl.int32), 0)
    earlier_X = number_X < expert
    within = (tile - tl.sum(tl.where(earlier_X, tiles_X, 0), 0)) * TILE
    begin = tl.sum(tl.where(earlier_X, count_X, 0), 0)
    count = tl.sum(tl.where(number_X == expert, count_X, 0), 0)
    return expert, begin + within, count - within


@triton.jit
def _weight_rows(number_N, width, KIND: tl.constexpr):
    """A tile's rows of weights: with an activation gates and values by turns, stacked in memory or interleaved."""
    in_order: tl.constexpr = KIND == "" or KIND == "clamped_swiglu"
    return number_N if in_order else number_N // 2 + number_N % 2 * width


@triton.jit
def _activated(total_NR, KIND: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    """f(gate)·up, or gpt-oss's clamped form, of gates and values by turns."""
    pair_FR2 = tl.permute(tl.reshape(total_NR, (OUTPUTS // 2, 2, ROWS)), (0, 2, 1))
    gate_FR, up_FR = tl.split(pair_FR2)
    if KIND == "clamped_swiglu":
        gate_FR, up_FR = _clamp(gate_FR, up_FR)
        out_FR = (up_FR + 1.0) * gate_FR * tl.sigmoid(gate_FR * CLAMP_ALPHA)
    else:
        out_FR = apply(gate_FR, KIND) * up_FR
    return out_FR


@triton.jit(do_not_specialize=["experts"])
def _linear_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    counts_ptr,
    experts,
    outputs,
    inputs,
    x_stride,
    expert_stride,
    output_stride,
    input_stride,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
):
    expert, first, left = _find(counts_ptr, tl.program_id(0), experts, X, ROWS)
    if left > 0:
        number_R, number_K = tl.arange(0, ROWS), tl.arange(0, INPUTS)
        number_N = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        # Beyond the last row or output others are read again, and what comes of it is not stored.
        out_N = _weight_rows(tl.minimum(number_N, outputs - 1), outputs // 2, KIND)
        row_R = first.to(tl.int64) + tl.minimum(number_R, left - 1)
        x_ptr_R = x_ptr + row_R[None, :] * x_stride
        w_ptr_N = w_ptr + expert.to(tl.int64) * expert_stride
        w_ptr_N += (out_N * output_stride)[:, None]
        total_NR = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for start in tl.range(0, inputs, INPUTS, num_stages=STAGES):
            at_K = start + number_K
            if WHOLE:
                w_NK = tl.load(w_ptr_N + at_K[None, :] * input_stride)
                x_KR = tl.load(x_ptr_R + at_K[:, None])
            else:
                w_NK = tl.load(w_ptr_N + at_K[None, :] * input_stride, (at_K < inputs)[None, :], 0.0)
                x_KR = tl.load(x_ptr_R + at_K[:, None], (at_K < inputs)[:, None], 0.0)
            total_NR = tl.dot(w_NK, x_KR, total_NR, input_precision="ieee")
        if bias_ptr is not None:
            total_NR += tl.load(bias_ptr + expert * outputs + out_N).to(tl.float32)[:, None]
        y_ptr_R = y_ptr + row_R[None, :] * (outputs if KIND == "" else outputs // 2)
        if KIND == "":
            stored_NR = (number_N < outputs)[:, None] & (number_R < left)[None, :]
            tl.store(y_ptr_R + number_N[:, None], total_NR, stored_NR)
        else:
            number_F = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
            stored_FR = (number_F < outputs // 2)[:, None] & (number_R < left)[None, :]
            tl.store(y_ptr_R + number_F[:, None], _activated(total_NR, KIND, OUTPUTS, ROWS), stored_FR)


@triton.jit
def _add_bias_kernel(y_ptr, bias_ptr, counts_ptr, experts, outputs, X: tl.constexpr, BLOCK: tl.constexpr):
    row, number_X = tl.program_id(0), tl.arange(0, X)
    column_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at_N = row.to(tl.int64) * outputs + column_N
    y_N = tl.load(y_ptr + at_N, column_N < outputs, 0.0).to(tl.float32)
    count_X = tl.load(counts_ptr + number_X, number_X < experts, 0).to(tl.int32)
    expert = tl.sum((tl.cumsum(count_X, 0) <= row).to(tl.int32), 0)
    bias_N = tl.load(bias_ptr + expert * outputs + column_N, (column_N < outputs) & (expert < experts), 0.0)
    tl.store(y_ptr + at_N, y_N + bias_N.to(tl.float32), column_N < outputs)


@triton.jit
def _bias_grad_kernel(
    out_ptr, grad_ptr, counts_ptr, outputs, X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    expert, number_X = tl.program_id(0), tl.arange(0, X)
    column_N = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.sum(tl.load(counts_ptr + number_X, number_X < expert, 0), 0)
    end = first + tl.load(counts_ptr + expert)
    total_RN = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, ROWS):
        row_R = start + tl.arange(0, ROWS)
        mask = (row_R < end)[:, None] & (column_N < outputs)[None, :]
        total_RN += tl.load(grad_ptr + row_R[:, None] * outputs + column_N[None, :], mask, 0.0).to(tl.float32)
    tl.store(out_ptr + expert.to(tl.int64) * outputs + column_N, tl.sum(total_RN, 0), column_N < outputs)


def _product(
    x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor, plan: Plan | None, kind: str = ""
) -> Tensor:
    """W_x(r)·x_r + b_x(r), or what a gated activation makes of it; the weight may be a transposed view."""
    rows, inputs = x_RK.shape
    experts, outputs, _ = weight_XNK.shape
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    out_RN = x_RK.new_empty((rows, outputs // 2 if kind else outputs))
    plan = plan or plan_for(rows, experts, x_RK.dtype)
    hit = min(rows, experts)
    # As many as Σ ⌈rows of an expert / rows of a tile⌉ can be.
    tiles = hit + (rows - hit) // plan.rows
    _linear_kernel[(tiles, ceil_div(outputs, plan.outputs))](
        *(out_RN, x_RK, weight_XNK, bias_XN, counts_X, experts, outputs, inputs, x_RK.stride(0), *weight_XNK.stride()),
        X=power_of_2(experts),
        ROWS=plan.rows,
        OUTPUTS=plan.outputs,
        INPUTS=plan.inputs,
        WHOLE=inputs % plan.inputs == 0,
        STAGES=plan.stages,
        KIND=kind,
        num_warps=plan.warps,
    )
    return out_RN


def linear(
    x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor, plan: Plan | None = None
) -> Tensor:
    """Every expert's matrix over its rows, summed in fp32, its bias added before rounding. plan: not the rule's."""
    return _product(x_RK, weight_XNK, bias_XN, counts_X, plan)


def gated_linear(
    x_RK: Tensor,
    weight_XNK: Tensor,
    bias_XN: Tensor | None,
    counts_X: Tensor,
    kind: str,
    plan: Plan | None = None,
) -> Tensor:
    """`linear` and the gated activation over it, which sees fp32 sums that were not rounded."""
    return _product(x_RK, weight_XNK, bias_XN, counts_X, plan, kind)


def input_grad(grad_RN: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
    """Every expert's transposed matrix over the gradients of its rows."""
    return _product(grad_RN, weight_XNK.transpose(1, 2), None, counts_X, None)


def add_bias(y_RN: Tensor, bias_XN: Tensor, counts_X: Tensor) -> Tensor:
    """y, to whose rows their experts' biases were added in place."""
    rows, outputs = y_RN.shape
    experts = counts_X.shape[0]
    _add_bias_kernel[(rows, ceil_div(outputs, BIAS_COLUMNS))](
        *(y_RN, bias_XN, counts_X, experts, outputs),
        X=power_of_2(experts),
        BLOCK=BIAS_COLUMNS,
        num_warps=BIAS_WARPS,
    )
    return y_RN


def bias_grad(grad_RN: Tensor, counts_X: Tensor) -> Tensor:
    """Σ of the gradients of an expert's rows, in fp32 and always in the same order."""
    experts, outputs = counts_X.shape[0], grad_RN.shape[1]
    out_XN = grad_RN.new_empty((experts, outputs))
    _bias_grad_kernel[(experts, ceil_div(outputs, GRAD_COLUMNS))](
        *(out_XN, grad_RN.contiguous(), counts_X, outputs),
        X=power_of_2(experts),
        ROWS=GRAD_ROWS,
        COLUMNS=GRAD_COLUMNS,
        num_warps=GRAD_WARPS,
    )
    return out_XN
