"""The kernels that cast to fp8: the largest magnitude of a tensor, and its cast with that, by rows, by columns or both.

A tile is read once and written as it lies and turned, for a product in fp8 wants both operands contiguous along the
dimension that it sums over. Nothing waits for the host: the scale stays on the device.
Legend: T rows  K columns  P shares
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.fp8_linear import LARGEST, LEAST_AMAX, SHARES
from rooflight.ops.kernels import ceil_div

AMAX_BLOCK, AMAX_WARPS = 4096, 8  # each thread has two 16-byte loads of bf16 under way
TILE_ROWS, TILE_COLUMNS, TILE_WARPS = 64, 128, 4


@triton.jit
def _magnitude_bits(x):
    # Ordered as the magnitudes are, with NaN above infinity; a maximum of floats would lose the NaN.
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, count, steps, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for _ in range(0, steps):
        largest = tl.maximum(largest, _magnitude_bits(tl.load(x_ptr + at, at < count, 0.0)))
        at += tl.num_programs(0) * BLOCK
    tl.store(amax_ptr + program, tl.max(largest, 0).to(tl.float32, bitcast=True))


@triton.jit
def _quantize_kernel(
    x_ptr,
    amax_ptr,
    by_rows_ptr,
    by_columns_ptr,
    scale_ptr,
    rows,
    columns,
    TYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST_AMAX: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    across = tl.cdiv(columns, COLUMNS)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask, 0.0)
    bits = tl.max(tl.load(amax_ptr + tl.arange(0, SHARES)).to(tl.int32, bitcast=True), 0)
    amax = bits.to(tl.float32, bitcast=True)
    # Not tl.maximum, which would lose a NaN.
    scale = tl.div_rn(tl.where(amax < LEAST_AMAX, LEAST_AMAX, amax), LARGEST)
    x8 = (x.to(tl.float32) * tl.div_rn(1.0, scale)).to(TYPE)
    if by_rows_ptr is not None:
        tl.store(by_rows_ptr + row[:, None] * columns + column[None, :], x8, mask)
    if by_columns_ptr is not None:
        turned = (column < columns)[:, None] & (row < rows)[None, :]
        tl.store(by_columns_ptr + column[:, None] * rows + row[None, :], tl.trans(x8), turned)
    if program == 0:
        tl.store(scale_ptr, scale)


_TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def amax(x_TK: Tensor) -> Tensor:
    """`ops.fp8_linear.fp8_amax`: the largest magnitude of each of P shares, chunks dealt out in turn."""
    x_TK = x_TK.contiguous()
    amax_P = x_TK.new_empty((SHARES,), dtype=torch.float32)
    count = x_TK.numel()
    steps = ceil_div(count, SHARES * AMAX_BLOCK)
    _amax_kernel[(SHARES,)](x_TK, amax_P, count, steps, BLOCK=AMAX_BLOCK, num_warps=AMAX_WARPS)
    return amax_P


def _quantize(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype, by_rows: bool, by_columns: bool) -> tuple[Tensor, ...]:
    x_TK = x_TK.contiguous()
    rows, columns = x_TK.shape
    x8_TK = x_TK.new_empty((rows, columns), dtype=dtype) if by_rows else None
    x8_KT = x_TK.new_empty((columns, rows), dtype=dtype) if by_columns else None
    scale = x_TK.new_empty((), dtype=torch.float32)
    _quantize_kernel[(ceil_div(rows, TILE_ROWS) * ceil_div(columns, TILE_COLUMNS),)](
        x_TK,
        amax_P,
        x8_TK,
        x8_KT,
        scale,
        rows,
        columns,
        TYPE=_TYPES[dtype],
        LARGEST=LARGEST[dtype],
        LEAST_AMAX=LEAST_AMAX,
        SHARES=SHARES,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        num_warps=TILE_WARPS,
    )
    return *(out for out in (x8_TK, x8_KT) if out is not None), scale


def quantize(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.fp8_linear.fp8_quantize`: (x in fp8, scale)."""
    return _quantize(x_TK, amax_P, dtype, True, False)  # pyright: ignore[reportReturnType]


def quantize_transposed(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.fp8_linear.fp8_quantize_transposed`: (xᵀ in fp8, scale)."""
    return _quantize(x_TK, amax_P, dtype, False, True)  # pyright: ignore[reportReturnType]


def quantize_both(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.fp8_linear.fp8_quantize_both`: (x in fp8, xᵀ in fp8, scale)."""
    return _quantize(x_TK, amax_P, dtype, True, True)  # pyright: ignore[reportReturnType]
