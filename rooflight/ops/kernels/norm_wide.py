"""RMSNorm and LayerNorm of rows that registers do not hold: two passes over a row, forward and backward.

The forward's second pass finds the row in L2. The backward first leaves four numbers a row, then walks down columns
and adds the gradients of weight and bias up in registers; sums are always added in one order. With W the width,
x̂ = (x − mean)·rstd, v = g·(offset + w): dx = (v − mean(v) − x̂·mean(v·x̂))·rstd; RMSNorm has no means to take away.
Means and variances grow lane by lane as Welford's (1962) do: Σx² − (Σx)²/W would cancel.
Legend: T rows  D width  P programs  S sums
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, processors, rows_of
from rooflight.ops.kernels.norm_rows import row_offset, row_stride

BLOCK, WARPS = 4096, 8  # elements of a row at once: two 16-byte loads of bf16 a thread
TILE_ROWS, TILE_COLUMNS, TILE_WARPS, STAGES = 8, 256, 4, 3
RESIDENT = 4  # programs of the walk down columns on one multiprocessor
STATISTICS = 4  # of a row: mean, rstd, mean(v), rstd·mean(v·x̂)


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    inner,
    outer_stride,
    inner_stride,
    residual_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    x_row = x_ptr + row_offset(row, inner, outer_stride, inner_stride)
    written = row.to(tl.int64) * WIDTH
    means = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    seen = 0.0
    for first in range(0, WIDTH, BLOCK):
        column = first + lane
        inside = column < WIDTH
        x = tl.load(x_row + column, inside, 0.0).to(tl.float32)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + row.to(tl.int64) * residual_stride + column, inside, 0.0).to(tl.float32)
            # What is normalised is the sum as it is kept, for the backward starts from that.
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + written + column, rounded, inside)
            x = rounded.to(tl.float32)
        if bias_ptr is None:
            squares += x * x
        else:
            seen += 1.0
            step = tl.where(inside, x - means, 0.0)
            means += step / seen
            squares += step * tl.where(inside, x - means, 0.0)
    mean = 0.0
    if bias_ptr is not None:
        counts = (WIDTH // BLOCK + (lane < WIDTH % BLOCK).to(tl.int32)).to(tl.float32)
        mean = tl.sum(counts * means) / WIDTH
        squares += counts * (means - mean) * (means - mean)
    rstd = tl.rsqrt(tl.sum(squares) / WIDTH + eps)
    # Another thread may have written what this one reads again.
    tl.debug_barrier()
    for first in range(0, WIDTH, BLOCK):
        column = first + lane
        inside = column < WIDTH
        if residual_ptr is not None:
            x = tl.load(sum_ptr + written + column, inside, 0.0).to(tl.float32)
        else:
            x = tl.load(x_row + column, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        y = (x - mean) * rstd * (tl.load(weight_ptr + column, inside, 0.0).to(tl.float32) + offset)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
        tl.store(out_ptr + written + column, y, inside)


@triton.jit
def _statistics_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
    grad_stride,
    inner,
    outer_stride,
    inner_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    x_row = x_ptr + row_offset(row, inner, outer_stride, inner_stride)
    grad_row = grad_ptr + row.to(tl.int64) * grad_stride
    means = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    weighted_means = tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    seen = 0.0
    for first in range(0, WIDTH, BLOCK):
        column = first + lane
        inside = column < WIDTH
        x = tl.load(x_row + column, inside, 0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32) + offset
        weighted = tl.load(grad_row + column, inside, 0.0).to(tl.float32) * weight
        if CENTRED:
            seen += 1.0
            step = tl.where(inside, x - means, 0.0)
            means += step / seen
            weighted_means += tl.where(inside, weighted - weighted_means, 0.0) / seen
            squares += step * tl.where(inside, x - means, 0.0)
            products += step * tl.where(inside, weighted - weighted_means, 0.0)
        else:
            squares += x * x
            products += x * weighted
    mean, weighted_mean = 0.0, 0.0
    if CENTRED:
        counts = (WIDTH // BLOCK + (lane < WIDTH % BLOCK).to(tl.int32)).to(tl.float32)
        mean = tl.sum(counts * means) / WIDTH
        weighted_mean = tl.sum(counts * weighted_means) / WIDTH
        squares += counts * (means - mean) * (means - mean)
        products += counts * (means - mean) * (weighted_means - weighted_mean)
    rstd = tl.rsqrt(tl.sum(squares) / WIDTH + eps)
    statistics = statistics_ptr + row.to(tl.int64) * 4
    tl.store(statistics, mean)
    tl.store(statistics + 1, rstd)
    tl.store(statistics + 2, weighted_mean)
    tl.store(statistics + 3, tl.sum(products) * rstd * rstd / WIDTH)


@triton.jit
def _columns_kernel(
    grad_ptr,
    residual_ptr,
    x_ptr,
    weight_ptr,
    statistics_ptr,
    out_ptr,
    partial_ptr,
    rows,
    steps,
    grad_stride,
    residual_stride,
    inner,
    outer_stride,
    inner_stride,
    offset,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CENTRED: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(1)
    weight = tl.load(weight_ptr + column, column < WIDTH, 0.0).to(tl.float32) + offset
    grad_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = (step * tl.num_programs(1) + program) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row_offset(row, inner, outer_stride, inner_stride)[:, None] + column[None, :]
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row.to(tl.int64)[:, None] * grad_stride + column[None, :], mask, 0.0).to(tl.float32)
        statistics = statistics_ptr + row.to(tl.int64) * 4
        # Rows beyond the last are zeros in all their statistics, and so in their sums.
        mean = tl.load(statistics, row < rows, 0.0)
        rstd = tl.load(statistics + 1, row < rows, 0.0)
        weighted_mean = tl.load(statistics + 2, row < rows, 0.0)
        slope = tl.load(statistics + 3, row < rows, 0.0)
        centred = x - mean[:, None]
        grad_x = (grad * weight[None, :] - weighted_mean[:, None] - centred * slope[:, None]) * rstd[:, None]
        grad_weight += grad * (centred * rstd[:, None])
        if CENTRED:
            grad_bias += grad
        if residual_ptr is not None:
            at = row.to(tl.int64)[:, None] * residual_stride + column[None, :]
            grad_x += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], grad_x, mask)
    partial = partial_ptr + program.to(tl.int64) * ((2 if CENTRED else 1) * WIDTH) + column
    tl.store(partial, tl.sum(grad_weight, 0), column < WIDTH)
    if CENTRED:
        tl.store(partial + WIDTH, tl.sum(grad_bias, 0), column < WIDTH)


def forward(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    sum_TD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    offset: float,
) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm, of x or of x + residual, which `sum_TD` then takes."""
    x, rows, inner, outer_stride, inner_stride = rows_of(x_TD)
    residual, residual_stride = (None, 0) if residual_TD is None else row_stride(residual_TD)
    out_TD = x_TD.new_empty(x_TD.shape)
    _forward_kernel[(rows,)](
        x,
        residual,
        weight_D.contiguous(),
        None if bias_D is None else bias_D.contiguous(),
        sum_TD,
        out_TD,
        inner,
        outer_stride,
        inner_stride,
        residual_stride,
        eps,
        offset,
        WIDTH=x_TD.shape[-1],
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out_TD


def backward(
    grad_TD: Tensor,
    grad_residual_TD: Tensor | None,
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of x with the residual's added, the programs' sums for the gradients of weight and bias)."""
    x, rows, inner, outer_stride, inner_stride = rows_of(x_TD)
    grad, grad_stride = row_stride(grad_TD)
    residual, residual_stride = (None, 0) if grad_residual_TD is None else row_stride(grad_residual_TD)
    weight, width = weight_D.contiguous(), x_TD.shape[-1]
    statistics = x_TD.new_empty((rows, STATISTICS), dtype=torch.float32)
    _statistics_kernel[(rows,)](
        grad,
        x,
        weight,
        statistics,
        grad_stride,
        inner,
        outer_stride,
        inner_stride,
        eps,
        offset,
        WIDTH=width,
        BLOCK=BLOCK,
        CENTRED=centred,
        num_warps=WARPS,
    )
    tiles, across = ceil_div(rows, TILE_ROWS), ceil_div(width, TILE_COLUMNS)
    programs = min(tiles, ceil_div(RESIDENT * processors(x_TD.device), across))
    out_TD = x_TD.new_empty(x_TD.shape)
    partial_PSD = x_TD.new_empty((programs, 2 if centred else 1, width), dtype=torch.float32)
    _columns_kernel[(across, programs)](
        grad,
        residual,
        x,
        weight,
        statistics,
        out_TD,
        partial_PSD,
        rows,
        ceil_div(tiles, programs),
        grad_stride,
        residual_stride,
        inner,
        outer_stride,
        inner_stride,
        offset,
        WIDTH=width,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        STAGES=STAGES,
        CENTRED=centred,
        num_warps=TILE_WARPS,
    )
    return out_TD, partial_PSD
