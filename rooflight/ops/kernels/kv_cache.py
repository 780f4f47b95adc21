"""The scatter of new keys and values into the paged cache, both in one launch.

Legend: T tokens  N blocks  P tokens a block  K key heads  E key dim  U value dim
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2

BLOCK, WARPS = 1024, 4  # elements of a program: 8 a thread, one 16-byte load of bf16


@triton.jit
def _scatter(x_ptr, cache_ptr, row_T, slot_T, tokens, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = ((row_T < tokens) & (slot_T >= 0))[:, None] & (column < WIDTH)[None, :]
    x = tl.load(x_ptr + row_T.to(tl.int64)[:, None] * stride + column[None, :], mask, 0.0)
    # By way of fp32: fp16 has no cast to some of the cache's types.
    at = slot_T.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(cache_ptr + at, x.to(tl.float32).to(cache_ptr.dtype.element_ty), mask)


@triton.jit
def _write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    tokens,
    k_stride,
    v_stride,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_T = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot_T = tl.load(slots_ptr + row_T, row_T < tokens, -1)
    if tl.program_id(2) == 0:
        _scatter(k_ptr, k_cache_ptr, row_T, slot_T, tokens, k_stride, K_WIDTH, BLOCK)
    elif v_ptr is not None:
        _scatter(v_ptr, v_cache_ptr, row_T, slot_T, tokens, v_stride, V_WIDTH, BLOCK)


def _rows_as_they_lie(x: Tensor) -> Tensor:
    """Tokens may be strided, as slices of fused QKV are; a token's heads lie side by side."""
    dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()


def write_kv(k_TKE: Tensor, v_TKU: Tensor | None, k_NPKE: Tensor, v_NPKU: Tensor | None, slots_T: Tensor) -> None:
    """cache[slot] = row for keys and values, in the cache's type; rows with a negative slot are left out.

    Slot n·P + p is place p of block n. Two rows with one slot leave either's.
    """
    k = _rows_as_they_lie(k_TKE)
    v = None if v_TKU is None or v_NPKU is None else _rows_as_they_lie(v_TKU)
    k_width = k.shape[1] * k.shape[2]
    v_width = 0 if v is None else v.shape[1] * v.shape[2]
    block = min(BLOCK, power_of_2(max(k_width, v_width)))
    rows = BLOCK // block
    tokens = slots_T.shape[0]
    if not tokens:
        return
    _write_kernel[(ceil_div(tokens, rows), ceil_div(max(k_width, v_width), block), 1 if v is None else 2)](
        k,
        v,
        k_NPKE,
        None if v is None else v_NPKU,
        slots_T,
        tokens,
        k.stride(0),
        0 if v is None else v.stride(0),
        K_WIDTH=k_width,
        V_WIDTH=v_width,
        ROWS=rows,
        BLOCK=block,
        num_warps=WARPS,
    )
