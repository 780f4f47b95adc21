"""Weights fetched into the L2 cache by a small kernel, for the product that runs after it.

A norm or a gate of few rows leaves memory idle for the 2–4 µs that it takes; what it asks for meanwhile the next
kernel need not wait for.
"""

# ruff: noqa: ANN001, ANN201 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A row's time is too short below, and above a product is no longer bound by its weights.
LEAST_ROWS, MOST_ROWS = 2, 256
MOST_BYTES = 8 << 20
PIECE = tl.constexpr(2048)  # bytes that one thread asks for
_ASK = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 2048; mov.u32 $0, 0; }"
)


@triton.jit
def fetch_ahead(ptr, pieces, THREADS: tl.constexpr):
    """Ask for this program's part of the first `pieces` times 2 KiB behind a pointer; nothing waits for them."""
    piece = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    address = ptr.to(tl.int64) + piece.to(tl.int64) * PIECE
    wanted = (piece < pieces).to(tl.int32)
    tl.inline_asm_elementwise(_ASK, "=r,l,r", [address, wanted], dtype=tl.int32, is_pure=False, pack=1)


def pieces_of(weight: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """The weight, if it is worth fetching for so many rows, and how many pieces of its beginning."""
    if weight is None or not LEAST_ROWS <= rows <= MOST_ROWS or not weight.is_cuda or not weight.is_contiguous():
        return None, 0
    return weight, min(weight.numel() * weight.element_size(), MOST_BYTES) // PIECE.value
