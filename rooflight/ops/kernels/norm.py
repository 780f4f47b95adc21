"""RMSNorm kernels: forward, forward with the residual add before it, and backward with the weight's gradient.

A row lies in registers from its load to its store; of wider rows see `norm_wide`. The backward runs few, long-lived
programs: each loops over rows, with the next ones on their way to shared memory meanwhile, and adds the weight's
gradient up in registers; a second kernel adds the programs' sums, always in one order.
Legend: T rows  D width  P programs
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, norm_wide, processors, rows_of
from rooflight.ops.kernels.norm_rows import WIDEST, backward_tile, column_sums, forward_tile, row_offset, row_stride


@triton.jit
def _add_pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    rows,
    inner,
    outer_stride,
    inner_stride,
    residual_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(x_ptr + row_offset(row, inner, outer_stride, inner_stride)[:, None] + column[None, :], mask, 0.0)
    x = x.to(tl.float32)
    out = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    if residual_ptr is not None:
        residual = row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        x += tl.load(residual_ptr + residual, mask, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < WIDTH, 0.0).to(tl.float32) + offset
    if residual_ptr is not None:
        # What is normalised is the sum as it is kept, for the backward starts from that.
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, rounded, mask)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    tl.store(out_ptr + out, x * rstd[:, None] * weight[None, :], mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,
    residual_ptr,
    x_ptr,
    weight_ptr,
    out_ptr,
    partial_ptr,
    rows,
    steps,
    grad_stride,
    residual_stride,
    inner,
    outer_stride,
    inner_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, column < WIDTH, 0.0)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = (step * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row_offset(row, inner, outer_stride, inner_stride)[:, None] + column[None, :]
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        at = row.to(tl.int64)[:, None] * grad_stride + column[None, :]
        grad = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
        if residual_ptr is not None:
            at = row.to(tl.int64)[:, None] * residual_stride + column[None, :]
            residual = tl.load(residual_ptr + at, mask, 0.0)
        weighted = grad * (weight.to(tl.float32) + offset)[None, :]
        squares, product = tl.reduce((x * x, weighted * x), 1, _add_pair)
        # Rows beyond the last are zeros; with eps 0 their rstd would be infinite.
        rstd = tl.where(row < rows, tl.rsqrt(squares / WIDTH + eps), 0.0)
        grad_x = (weighted - x * (product * rstd * rstd / WIDTH)[:, None]) * rstd[:, None]
        grad_weight += grad * (x * rstd[:, None])
        if residual_ptr is not None:
            grad_x += residual.to(tl.float32)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], grad_x, mask)
    tl.store(partial_ptr + program.to(tl.int64) * WIDTH + column, tl.sum(grad_weight, 0), column < WIDTH)


def _forward(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    sum_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    offset: float,
) -> Tensor:
    width = x_TD.shape[-1]
    if width > WIDEST:
        return norm_wide.forward(x_TD, residual_TD, sum_TD, weight_D, None, eps, offset)
    x, rows, inner, outer_stride, inner_stride = rows_of(x_TD)
    residual, residual_stride = (None, 0) if residual_TD is None else row_stride(residual_TD)
    out_TD = x_TD.new_empty(x_TD.shape)
    block, tile_rows, warps = forward_tile(width)
    _rms_norm_kernel[(ceil_div(rows, tile_rows),)](
        x,
        residual,
        weight_D.contiguous(),
        sum_TD,
        out_TD,
        rows,
        inner,
        outer_stride,
        inner_stride,
        residual_stride,
        eps,
        offset,
        WIDTH=width,
        BLOCK=block,
        ROWS=tile_rows,
        num_warps=warps,
    )
    return out_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y = x · rsqrt(mean(x²) + eps) · (offset + w); reads x and writes y once."""
    return _forward(x_TD, None, None, weight_D, eps, offset)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual)."""
    sum_TD = x_TD.new_empty(x_TD.shape)
    return _forward(x_TD, residual_TD, sum_TD, weight_D, eps, offset), sum_TD


def rms_norm_backward(
    grad_TD: Tensor, grad_residual_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """(gradient of x with the residual's added, gradient of the weight)."""
    width, grad_weight_D = x_TD.shape[-1], weight_D.new_empty(weight_D.shape)
    if width > WIDEST:
        out_TD, partial_P1D = norm_wide.backward(grad_TD, grad_residual_TD, x_TD, weight_D, eps, offset, False)
        column_sums(partial_P1D, grad_weight_D)
        return out_TD, grad_weight_D
    x, rows, inner, outer_stride, inner_stride = rows_of(x_TD)
    grad, grad_stride = row_stride(grad_TD)
    residual, residual_stride = (None, 0) if grad_residual_TD is None else row_stride(grad_residual_TD)
    block, tile_rows, warps, stages, resident = backward_tile(width, 2 if residual is None else 3, x.element_size())
    tiles = ceil_div(rows, tile_rows)
    programs = min(tiles, processors(x_TD.device) * resident)
    out_TD = x_TD.new_empty(x_TD.shape)
    partial_P1D = x_TD.new_empty((programs, 1, width), dtype=torch.float32)
    _rms_norm_backward_kernel[(programs,)](
        grad,
        residual,
        x,
        weight_D.contiguous(),
        out_TD,
        partial_P1D,
        rows,
        ceil_div(tiles, programs),
        grad_stride,
        residual_stride,
        inner,
        outer_stride,
        inner_stride,
        eps,
        offset,
        WIDTH=width,
        BLOCK=block,
        ROWS=tile_rows,
        STAGES=stages,
        num_warps=warps,
    )
    column_sums(partial_P1D, grad_weight_D)
    return out_TD, grad_weight_D
