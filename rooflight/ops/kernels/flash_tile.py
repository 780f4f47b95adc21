"""What the flash attention kernels share: tiles, where one lies, and which others it sees whole or in part.

A sequence is one of a dense batch, or a document of a packed row. Dense tensors are [B, L, H, E] and packed ones
[T, H, E]: their first stride, times a sequence's number or its first token, leads to the sequence in both.
Legend: M queries of a tile  N keys of a tile  E head dim  U value dim
"""

# ruff: noqa: ANN001, ANN201 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2

LOG2_E = 1.4426950408889634
SEARCHED = 128  # documents that a program looks at together to find its own
BEYOND = tl.constexpr(1 << 29)  # more tiles than there are


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch constants: queries and keys of a tile, warps of a program, and stages of its pipeline.

    Where two operands of Hopper's matrix instructions lie at one address in different layouts, ptxas 12.8 computes the
    second one's descriptor from registers that nothing has set: wrong numbers, or an illegal access. fp32 operands are
    laid out by Triton for each product, so that fp32 tiles have fewer rows than the 64 of those instructions.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def precision_of(dtype: torch.dtype) -> str:
    """How products round their operands: fp32 as three TF32 products, whose error is that of fp32 (2203.03341)."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def block_of(channels: int) -> int:
    """Channels of a tile; those beyond a head's own are zeros."""
    return power_of_2(max(16, channels))


def exponents(scale: float, softcap: float) -> tuple[float, float]:
    """(factor, inner): scores as exponents of two are factor·q·kᵀ, with a softcap factor·tanh(q·kᵀ·scale/softcap).

    inner is what an exponential of two needs for that tanh, 0 without a softcap.
    """
    if not softcap:
        return scale * LOG2_E, 0.0
    return softcap * LOG2_E, 2 * LOG2_E * scale / softcap


def readable(x: Tensor) -> Tensor:
    """The tensor with its channels one after the other; a slice of a wider one stays as it lies."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Strides of a sequence, a token and a head."""
    return x.stride(0), x.stride(-3), x.stride(-2)


def tiles_of(length: int, block: int, starts_N1: Tensor | None) -> int:
    """Tiles of a sequence; for a packed row, as many as any documents in it can need."""
    return ceil_div(length, block) if starts_N1 is None else length // block + starts_N1.shape[0] - 1


def constants(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, softcap: float, plan: Plan) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "KEY_HEADS": k.shape[-2],
        "GROUP": q.shape[-2] // max(1, k.shape[-2]),
        "HEAD_DIM": q.shape[-1],
        "VALUE_DIM": v.shape[-1],
        "BLOCK_E": block_of(q.shape[-1]),
        "BLOCK_U": block_of(v.shape[-1]),
        "CAUSAL": causal,
        "WINDOWED": causal and window > 0,
        "CAPPED": softcap > 0,
        "PRECISION": precision_of(q.dtype),
        "SEARCHED": SEARCHED,
        "M": plan.queries,
        "N": plan.keys,
        "STAGES": plan.stages,
        "num_warps": plan.warps,
    }


@triton.jit
def place(tile, sequence, starts_ptr, documents, queries, keys, BLOCK: tl.constexpr, SEARCHED: tl.constexpr):
    """(first, queries, keys, tile) of the tile's sequence; a row's document is found from where documents begin.

    Document n has the tiles from starts[n]//BLOCK + n on; where it needs fewer, and after the last, tiles are empty.
    """
    if starts_ptr is not None:
        document = 0
        for index in range(1, documents + 1, SEARCHED):
            n = index + tl.arange(0, SEARCHED)
            begins = tl.load(starts_ptr + n, n <= documents, BEYOND).to(tl.int32) // BLOCK + n
            document += tl.sum(((n <= documents) & (begins <= tile)).to(tl.int32), 0)
        sequence = tl.load(starts_ptr + document).to(tl.int32)
        stop = tl.load(starts_ptr + document + 1, document < documents, 0).to(tl.int32)
        queries = tl.maximum(stop - sequence, 0)
        keys = queries
        tile -= sequence // BLOCK + document
    return sequence, queries, keys, tile


@triton.jit
def key_tiles(
    row, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Tiles of keys that queries row…row+M see: all of first…last, of which begin…end without a mask.

    The queries are the last of the keys' positions.
    """
    first = 0
    begin = 0
    end = keys // N
    last = tl.cdiv(keys, N)
    if CAUSAL:
        position = row + keys - queries
        end = tl.maximum(position + 1, 0) // N
        last = tl.cdiv(tl.minimum(tl.maximum(position + M, 0), keys), N)
        if WINDOWED:
            first = tl.maximum(position - window + 1, 0) // N
            begin = tl.minimum(tl.cdiv(tl.maximum(position + M - window, 0), N), end)
    return first, begin, end, last


@triton.jit
def query_tiles(
    key, queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Tiles of queries that see keys key…key+N: all of first…last, of which begin…end without a mask."""
    first = 0
    begin = 0
    end = queries // M
    last = tl.cdiv(queries, M)
    if CAUSAL:
        row = key - (keys - queries)
        if WINDOWED:
            end = tl.minimum(end, tl.maximum(row + window, 0) // M)
            last = tl.minimum(last, tl.cdiv(tl.maximum(row + N - 1 + window, 0), M))
        first = tl.minimum(tl.maximum(row, 0) // M, last)
        begin = tl.minimum(tl.cdiv(tl.maximum(row + N - 1, 0), M), last)
        end = tl.maximum(begin, end)
    return first, begin, end, last


@triton.jit
def numbered(index, first, begin, end, MASKED: tl.constexpr):
    """Number of the index-th tile among those without a mask, begin…end, or among those around them."""
    if MASKED:
        # Past those before `begin`, on to those from `end`.
        begin = first + tl.where(index >= begin - first, end - begin, 0)
    return begin + index


@triton.jit
def sees(position, key, window, WINDOWED: tl.constexpr):
    """Whether a query at this position sees the key, from broadcastable blocks of them."""
    visible = key <= position
    if WINDOWED:
        visible = visible & (key > position - window)
    return visible


@triton.jit
def squash(x, inner, CAPPED: tl.constexpr):
    """tanh(x·scale/softcap), or x without a softcap; libdevice's tanh does not run in Triton's interpreter."""
    if CAPPED:
        x = 1.0 - 2.0 / (tl.exp2(x * inner) + 1.0)
    return x
