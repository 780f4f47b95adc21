"""RMSNorm kernels: forward, forward with the residual add before it, and backward with the weight's gradient.

A row lies in registers from its load to its store. The backward runs few, long-lived programs: each loops over rows,
with the next ones on their way to shared memory meanwhile, and adds the weight's gradient up in registers; a second
kernel adds the programs' sums, always in one order.
Legend: T rows  D width  P programs
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2, processors, rows_of

FORWARD_TILE, BACKWARD_TILE = 2048, 1024  # elements that a program takes at once where rows are narrower
ELEMENTS = 16  # in a thread: two 16-byte loads of bf16
RESIDENT_WARPS = 16  # of the backward on one multiprocessor, whose registers hold the row, the weight and the sums
STAGES, BUFFER_BYTES = 3, 96 * 1024  # rows of the backward in flight, and the shared memory of one program for them
SUM_ROWS, SUM_COLUMNS = 64, 32


@triton.jit
def _offset(row, inner, outer_stride, inner_stride):
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


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
    x = tl.load(x_ptr + _offset(row, inner, outer_stride, inner_stride)[:, None] + column[None, :], mask, 0.0)
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
        at = _offset(row, inner, outer_stride, inner_stride)[:, None] + column[None, :]
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


@triton.jit
def _column_sum_kernel(partial_ptr, out_ptr, rows, steps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(0, steps):
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask, 0.0)
        row += ROWS
    tl.store(out_ptr + column, tl.sum(total, 0), column < WIDTH)


def _tile(width: int, elements: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program."""
    block = power_of_2(width)
    rows = max(1, elements // block)
    return block, rows, min(32, max(1, block * rows // (32 * ELEMENTS)))


def _row_stride(x: Tensor) -> tuple[Tensor, int]:
    x, _, inner, stride, _ = rows_of(x)
    return (x, stride) if inner == 1 else (x.contiguous(), x.shape[-1])


def _forward(
    x_TD: Tensor, residual_TD: Tensor | None, sum_TD: Tensor | None, weight_D: Tensor, eps: float, offset: float
) -> Tensor:
    x, rows, inner, outer_stride, inner_stride = rows_of(x_TD)
    residual, residual_stride = (None, 0) if residual_TD is None else _row_stride(residual_TD)
    out_TD = x_TD.new_empty(x_TD.shape)
    width = x_TD.shape[-1]
    block, tile_rows, warps = _tile(width, FORWARD_TILE)
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
    x, rows, inner, outer_stride, inner_stride = rows_of(x_TD)
    grad, grad_stride = _row_stride(grad_TD)
    residual, residual_stride = (None, 0) if grad_residual_TD is None else _row_stride(grad_residual_TD)
    width = x_TD.shape[-1]
    block, tile_rows, warps = _tile(width, BACKWARD_TILE)
    tiles = ceil_div(rows, tile_rows)
    row_bytes = (2 if residual is None else 3) * block * tile_rows * x_TD.element_size()
    stages = min(STAGES, 1 + BUFFER_BYTES // row_bytes)
    programs = min(tiles, processors(x_TD.device) * max(1, RESIDENT_WARPS // warps))
    out_TD, grad_weight_D = x_TD.new_empty(x_TD.shape), weight_D.new_empty(weight_D.shape)
    partial_PD = x_TD.new_empty((programs, width), dtype=torch.float32)
    _rms_norm_backward_kernel[(programs,)](
        grad,
        residual,
        x,
        weight_D.contiguous(),
        out_TD,
        partial_PD,
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
    _column_sum_kernel[(ceil_div(width, SUM_COLUMNS),)](
        partial_PD,
        grad_weight_D,
        programs,
        ceil_div(programs, SUM_ROWS),
        WIDTH=width,
        ROWS=SUM_ROWS,
        BLOCK=SUM_COLUMNS,
        num_warps=4,
    )
    return out_TD, grad_weight_D
