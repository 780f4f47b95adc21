"""Paged attention of many new tokens a sequence, ragged: tiles of tokens × heads of a group against a sequence's pages.

FlashAttention-2's loop (Dao 2023, 2307.08691). A program finds its sequence from where the sequences begin, so that the
grid follows from sizes that the host knows.
Legend: B sequences  T rows of tokens  H query heads  K key heads  G = H/K  E head dim
        R rows of a tile  N keys of a tile
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import power_of_2
from rooflight.ops.kernels.paged_tile import HIDDEN, LOG2_E, Tiles, absorb, cache_rows, load_rows, precision_of

SEARCHED = 128  # sequences that a program looks at together to find its own
BEYOND = tl.constexpr(1 << 29)  # more tiles than there are


@triton.jit
def _over_keys(
    out_RE,
    peak_R,
    total_R,
    q_RE,
    k_ptr,
    v_ptr,
    table_ptr,
    position_R,
    begin,
    end,
    block_rows,
    scale,
    softcap,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The keys from `begin` to `end`; without a mask every row sees all of them, and they fill whole tiles."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        position_N = start + tl.arange(0, BLOCK_N)
        inside_N = position_N < end
        visible_RN = position_N[None, :] <= position_R[:, None]
        if WINDOW > 0:
            visible_RN = visible_RN & (position_N[None, :] > position_R[:, None] - WINDOW)
            # The first row sees the oldest keys; the blocks of those before may be another sequence's by now.
            inside_N = inside_N & (position_N > tl.min(position_R, 0) - WINDOW)
        rows_N = cache_rows(table_ptr, position_N, inside_N, block_rows, TOKEN_STRIDE, PAGE, MASKED)
        k_NE = load_rows(k_ptr, rows_N, inside_N, HEAD_DIM, BLOCK_E, MASKED)
        v_NE = load_rows(v_ptr, rows_N, inside_N, HEAD_DIM, BLOCK_E, MASKED)
        out_RE, peak_R, total_R = absorb(
            out_RE, peak_R, total_R, q_RE, k_NE, v_NE, visible_RN, scale, softcap, CAPPED, MASKED, PRECISION
        )
    return out_RE, peak_R, total_R


# Counts change from step to step: no variant of the kernel for some of them.
@triton.jit(do_not_specialize=["tokens", "sequences"])
def _prefill_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    contexts_ptr,
    starts_ptr,
    sinks_ptr,
    scale,
    softcap,
    tokens,
    sequences,
    table_stride,
    q_token_stride,
    q_head_stride,
    block_rows,
    head_stride,
    TOKEN_STRIDE: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    LEAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SEARCHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    head = tl.program_id(0)
    # The last tiles of a long prompt look back furthest: they begin first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # Sequence b has the tiles from starts[b]//TOKENS + b on, as many as it can need; the padding comes after the last.
    sequence = 0
    for first in range(1, sequences + 1, SEARCHED):
        index = first + tl.arange(0, SEARCHED)
        begins = tl.load(starts_ptr + index, index <= sequences, BEYOND).to(tl.int32) // TOKENS + index
        sequence += tl.sum(((index <= sequences) & (begins <= tile)).to(tl.int32), 0)
    row = tl.load(starts_ptr + sequence).to(tl.int32)
    real = sequence < sequences
    length = tl.load(starts_ptr + sequence + 1, real, tokens).to(tl.int32) - row
    done = (tile - row // TOKENS - sequence) * TOKENS
    # What is shorter than LEAST is another kernel's.
    if (done >= length) | (real & (length < LEAST)):
        return
    index_R = tl.arange(0, ROWS)
    token_R = index_R // GROUP
    head_R = head * GROUP + index_R % GROUP
    channel_E = tl.arange(0, BLOCK_E)
    inside_R = (token_R < TOKENS) & (done + token_R < length)
    inside_RE = inside_R[:, None] & (channel_E < HEAD_DIM)[None, :]
    row_R = (row + done + token_R).to(tl.int64)
    out_at_RE = (row_R * (KEY_HEADS * GROUP * HEAD_DIM) + head_R * HEAD_DIM)[:, None] + channel_E[None, :]
    out_RE = tl.zeros((ROWS, BLOCK_E), tl.float32)
    if sequence >= sequences:
        tl.store(out_ptr + out_at_RE, out_RE, inside_RE)
        return
    context = tl.load(contexts_ptr + sequence).to(tl.int32)
    position = context - length + done
    position_R = position + token_R
    q_at_RE = (row_R * q_token_stride + head_R * q_head_stride)[:, None] + channel_E[None, :]
    q_RE = tl.load(q_ptr + q_at_RE, inside_RE, 0.0)
    if sinks_ptr is None:
        peak_R = tl.full((ROWS,), HIDDEN, tl.float32)
        total_R = tl.zeros((ROWS,), tl.float32)
    else:
        # A sink is a score without a value.
        peak_R = tl.load(sinks_ptr + head_R).to(tl.float32) * LOG2_E
        total_R = tl.full((ROWS,), 1.0, tl.float32)
    table_ptr += sequence.to(tl.int64) * table_stride
    k_ptr += head * head_stride
    v_ptr += head * head_stride
    end = tl.minimum(position + TOKENS, context)
    if WINDOW > 0:
        whole = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    else:
        whole = (position + 1) // BLOCK_N * BLOCK_N
        out_RE, peak_R, total_R = _over_keys(
            out_RE,
            peak_R,
            total_R,
            q_RE,
            k_ptr,
            v_ptr,
            table_ptr,
            position_R,
            0,
            whole,
            block_rows,
            scale,
            softcap,
            TOKEN_STRIDE,
            HEAD_DIM,
            PAGE,
            WINDOW,
            CAPPED,
            PRECISION,
            BLOCK_E,
            BLOCK_N,
            STAGES,
            False,
        )
    out_RE, peak_R, total_R = _over_keys(
        out_RE,
        peak_R,
        total_R,
        q_RE,
        k_ptr,
        v_ptr,
        table_ptr,
        position_R,
        whole,
        end,
        block_rows,
        scale,
        softcap,
        TOKEN_STRIDE,
        HEAD_DIM,
        PAGE,
        WINDOW,
        CAPPED,
        PRECISION,
        BLOCK_E,
        BLOCK_N,
        STAGES,
        True,
    )
    # An empty context has no total.
    out_RE = out_RE / tl.where(total_R > 0.0, total_R, 1.0)[:, None]
    tl.store(out_ptr + out_at_RE, out_RE, inside_RE)


def tiles_of(head_dim: int, group: int, dtype: torch.dtype) -> Tiles:
    """Launch constants for heads of this width, groups of this size, and queries of this type."""
    width, least = power_of_2(max(16, head_dim)), power_of_2(group)
    if dtype == torch.float32:
        return Tiles(max(16, least), 32 if width < 128 else 16, 4, 2)
    keys = 32 if width > 128 else 64 if width == 128 else 128
    return Tiles(max(128, least), keys, 8, 5 if width <= 128 else 3)


def prefill(
    out_THE: Tensor,
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    block_table_BM: Tensor,
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    least: int,
    tiles: Tiles | None = None,
) -> None:
    """Write the rows of sequences with `least` new tokens or more into `out_THE`, and zeros beyond the last sequence.

    tiles: instead of the rule's.
    """
    tokens, heads, head_dim = q_THE.shape
    sequences, page, key_heads = block_table_BM.shape[0], k_NPKE.shape[1], k_NPKE.shape[2]
    group = heads // key_heads
    tiles = tiles or tiles_of(head_dim, group, q_THE.dtype)
    _prefill_kernel[(key_heads, tokens // (tiles.rows // group) + sequences + 1)](
        out_THE,
        q_THE,
        k_NPKE,
        v_NPKE,
        block_table_BM,
        context_lengths_B,
        query_starts_B1,
        sinks_H,
        scale,
        softcap,
        tokens,
        sequences,
        block_table_BM.stride(0),
        q_THE.stride(0),
        q_THE.stride(1),
        k_NPKE.stride(0) // k_NPKE.stride(1),
        k_NPKE.stride(2),
        TOKEN_STRIDE=k_NPKE.stride(1),
        KEY_HEADS=key_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=page,
        WINDOW=window,
        CAPPED=softcap > 0,
        LEAST=least,
        PRECISION=precision_of(q_THE.dtype),
        SEARCHED=SEARCHED,
        ROWS=tiles.rows,
        BLOCK_E=power_of_2(max(16, head_dim)),
        BLOCK_N=tiles.keys,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
