"""What the norms' kernels share: where rows lie, how they are dealt to programs, and sums of columns.

Legend: T rows  D width  P programs  S sums
"""

# ruff: noqa: ANN001, ANN202, ANN201 - arguments of Triton functions are blocks and scalars of its language
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2, rows_of

WIDEST = 16384  # the longest row that a program's registers hold
FORWARD_TILE, BACKWARD_TILE = 2048, 8192  # elements that a program takes at once where rows are narrower
# Of a backward of narrow rows: more of them at once need registers for where each lies, and spill.
NARROW, NARROW_TILE = 1024, 1024
ELEMENTS = 16  # in a thread: two 16-byte loads of bf16
RESIDENT_WARPS = 16  # of a backward on one multiprocessor, whose registers hold the row, the weight and the sums
STAGES, BUFFER_BYTES = 3, 192 * 1024  # rows of a backward in flight, and a multiprocessor's shared memory for them
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 128, 32, 8


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


@triton.jit
def _column_sum_kernel(
    partial_ptr,
    out_ptr,
    second_ptr,
    rows,
    steps,
    WIDTH: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    start = partial_ptr + tl.program_id(1) * WIDTH
    for _ in range(0, steps):
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(start + row.to(tl.int64)[:, None] * (SUMS * WIDTH) + column[None, :], mask, 0.0)
        row += ROWS
    if tl.program_id(1) == 0:
        tl.store(out_ptr + column, tl.sum(total, 0), column < WIDTH)
    elif second_ptr is not None:
        tl.store(second_ptr + column, tl.sum(total, 0), column < WIDTH)


def column_sums(partial_PSD: Tensor, out_D: Tensor, second_D: Tensor | None = None) -> None:
    """out[d] = Σ over p of partial[p, 0, d], the second of partial[p, 1, d]: in fp32 and always in one order."""
    programs, sums, width = partial_PSD.shape
    _column_sum_kernel[(ceil_div(width, SUM_COLUMNS), sums)](
        partial_PSD,
        out_D,
        second_D,
        programs,
        ceil_div(programs, SUM_ROWS),
        WIDTH=width,
        SUMS=sums,
        ROWS=SUM_ROWS,
        BLOCK=SUM_COLUMNS,
        num_warps=SUM_WARPS,
    )


def forward_tile(width: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a forward's program."""
    return _tile(width, FORWARD_TILE)


def _tile(width: int, elements: int) -> tuple[int, int, int]:
    block = power_of_2(width)
    rows = max(1, elements // block)
    return block, rows, min(32, max(1, block * rows // (32 * ELEMENTS)))


def backward_tile(width: int, row_tensors: int, item_bytes: int) -> tuple[int, int, int, int, int]:
    """(columns, rows, warps, stages, programs on a multiprocessor) of a backward that reads `row_tensors` tensors."""
    block, rows, warps = _tile(width, BACKWARD_TILE if width > NARROW else NARROW_TILE)
    programs = max(1, RESIDENT_WARPS // warps)
    stages = min(STAGES, 1 + BUFFER_BYTES // (programs * row_tensors * block * rows * item_bytes))
    return block, rows, warps, stages, programs


def row_stride(x: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows are one stride apart, itself or a copy, and the stride."""
    x, _, inner, stride, _ = rows_of(x)
    return (x, stride) if inner == 1 else (x.contiguous(), x.shape[-1])
