"""Paged attention of one new token a sequence: a group's heads in one tile, a sequence's keys split over programs.

Flash-decoding (Dao et al. 2023): each split leaves its part of the output and its log-sum-exp, and the last program of
a sequence and key head to be done adds the parts up, always in one order. How a sequence is split follows on the device
from its own context, so that a launch captured with one context serves every other.
Legend: B sequences  T rows of tokens  H query heads  K key heads  G = H/K  E head dim  N keys of a tile  S splits
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2, processors
from rooflight.ops.kernels.paged_tile import HIDDEN, LOG2_E, Tiles, absorb, cache_rows, load_rows, precision_of

PROGRAMS = 2  # of a launch on each multiprocessor, at least, as far as keys can be split
# Of keys, and as many of values; narrow numbers are widened in registers, which hold no more elements, and fp32 ones
# are multiplied there.
TILE_BYTES, TILE_ELEMENTS, TILE_ELEMENTS_FP32 = 16 * 1024, 8 * 1024, 2 * 1024
MANY_PAIRS = 1024
LEAST_ROWS = 16  # of a product on tensor cores
MERGED_ELEMENTS = 4096  # of parts that are added up at once
# Compiled for up to so many splits: for none, few or many, and not for each number of sequences.
SPLIT_BLOCKS = (1, 16, 128)
COUNTERS = 1 << 16

_counters: dict[torch.device, Tensor] = {}


# Counts change from step to step: no variant of the kernel for some of them.
@triton.jit(do_not_specialize=["tokens", "sequences", "splits"])
def _decode_kernel(
    out_ptr,
    part_ptr,
    lse_ptr,
    counter_ptr,
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
    splits,
    table_stride,
    q_token_stride,
    q_head_stride,
    block_stride,
    token_stride,
    head_stride,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    member_R = tl.arange(0, ROWS)
    channel_E = tl.arange(0, BLOCK_E)
    inside_RE = (member_R < GROUP)[:, None] & (channel_E < HEAD_DIM)[None, :]
    head_R = head * GROUP + member_R
    within_RE = head_R[:, None] * HEAD_DIM + channel_E[None, :]
    row_size = KEY_HEADS * GROUP * HEAD_DIM
    if PADDING:
        # Rows beyond the last sequence's stand for nothing; a program of the same number clears each.
        last = tl.load(starts_ptr + sequences)
        if (split == 0) & (sequence >= last) & (sequence < tokens):
            nothing_RE = tl.zeros((ROWS, BLOCK_E), tl.float32)
            tl.store(out_ptr + sequence.to(tl.int64) * row_size + within_RE, nothing_RE, inside_RE)
    if sequence >= sequences:
        return
    context = tl.load(contexts_ptr + sequence).to(tl.int32)
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    if tl.load(starts_ptr + sequence + 1) != row + 1:
        return
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // BLOCK_N * BLOCK_N
    share = tl.maximum(tl.cdiv(tl.cdiv(context - first, splits), BLOCK_N), 1) * BLOCK_N
    active = tl.maximum(tl.cdiv(context - first, share), 1)
    # An empty context is the first split's, which writes zeros.
    if split >= active:
        return
    begin = first + split * share
    end = tl.minimum(begin + share, context)

    q_at_RE = row * q_token_stride + head_R[:, None] * q_head_stride + channel_E[None, :]
    q_RE = tl.load(q_ptr + q_at_RE, inside_RE, 0.0)
    peak_R = tl.full((ROWS,), HIDDEN, tl.float32)
    total_R = tl.zeros((ROWS,), tl.float32)
    if sinks_ptr is not None:
        # A sink is a score without a value, of the first split.
        sink_R = tl.load(sinks_ptr + head_R, member_R < GROUP, 0.0).to(tl.float32)
        peak_R = tl.where(split == 0, sink_R * LOG2_E, peak_R)
        total_R = tl.where(split == 0, 1.0, total_R)
    out_RE = tl.zeros((ROWS, BLOCK_E), tl.float32)
    table_ptr += sequence.to(tl.int64) * table_stride
    k_ptr += head * head_stride
    v_ptr += head * head_stride
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        position_N = start + tl.arange(0, BLOCK_N)
        inside_N = position_N < end
        if WINDOW > 0:
            inside_N = inside_N & (position_N >= context - WINDOW)
        rows_N = cache_rows(table_ptr, position_N, inside_N, block_stride, token_stride, PAGE, True)
        k_NE = load_rows(k_ptr, rows_N, inside_N, HEAD_DIM, BLOCK_E, True)
        v_NE = load_rows(v_ptr, rows_N, inside_N, HEAD_DIM, BLOCK_E, True)
        out_RE, peak_R, total_R = absorb(
            out_RE, peak_R, total_R, q_RE, k_NE, v_NE, inside_N[None, :], scale, softcap, CAPPED, True, PRECISION
        )
    # An empty context has no total.
    out_RE = out_RE / tl.where(total_R > 0.0, total_R, 1.0)[:, None]
    out_ptr += row * row_size
    if SPLIT_BLOCK == 1 or active == 1:
        tl.store(out_ptr + within_RE, out_RE, inside_RE)
    else:
        pair = sequence * KEY_HEADS + head
        part_ptr += pair.to(tl.int64) * (splits * GROUP * HEAD_DIM)
        lse_ptr += pair * (splits * GROUP)
        part_R = split * GROUP + member_R
        tl.store(part_ptr + part_R[:, None] * HEAD_DIM + channel_E[None, :], out_RE, inside_RE)
        tl.store(lse_ptr + part_R, peak_R + tl.log2(total_R), member_R < GROUP)
        # Every warp's stores come before the count, which publishes them.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel") == active - 1:
            tl.store(counter_ptr + pair, 0)
            _merge(
                out_ptr + head * (GROUP * HEAD_DIM),
                part_ptr,
                lse_ptr,
                active,
                GROUP,
                HEAD_DIM,
                SPLIT_BLOCK,
                MERGED,
                GROUP_BLOCK,
                BLOCK_E,
            )


@triton.jit
def _merge(
    out_ptr,
    part_ptr,
    lse_ptr,
    active,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out_G = Σ_s part_sG · exp(lse_sG) / Σ_s exp(lse_sG), read from the cache that all multiprocessors share."""
    member_G = tl.arange(0, GROUP_BLOCK)
    channel_E = tl.arange(0, BLOCK_E)
    split_S = tl.arange(0, SPLIT_BLOCK)
    mask_SG = (split_S < active)[:, None] & (member_G < GROUP)[None, :]
    lse_SG = tl.load(lse_ptr + split_S[:, None] * GROUP + member_G[None, :], mask_SG, HIDDEN, cache_modifier=".cg")
    peak_G = tl.max(lse_SG, 0)
    total_G = tl.sum(tl.exp2(lse_SG - peak_G[None, :]), 0)
    out_GE = tl.zeros((GROUP_BLOCK, BLOCK_E), tl.float32)
    for first in range(0, active, MERGED):
        split_M = first + tl.arange(0, MERGED)
        mask_MG = (split_M < active)[:, None] & (member_G < GROUP)[None, :]
        part_MG = split_M[:, None] * GROUP + member_G[None, :]
        lse_MG = tl.load(lse_ptr + part_MG, mask_MG, HIDDEN, cache_modifier=".cg")
        weight_MG = tl.where(mask_MG, tl.exp2(lse_MG - peak_G[None, :]), 0.0)
        at_MGE = part_MG[:, :, None] * HEAD_DIM + channel_E[None, None, :]
        mask_MGE = mask_MG[:, :, None] & (channel_E < HEAD_DIM)[None, None, :]
        part_MGE = tl.load(part_ptr + at_MGE, mask_MGE, 0.0, cache_modifier=".cg")
        out_GE += tl.sum(part_MGE * weight_MG[:, :, None], 0)
    at_GE = member_G[:, None] * HEAD_DIM + channel_E[None, :]
    tl.store(out_ptr + at_GE, out_GE / total_G[:, None], (member_G < GROUP)[:, None] & (channel_E < HEAD_DIM)[None, :])


def tiles_of(head_dim: int, group: int, dtype: torch.dtype, cache_bytes: int, pairs: int) -> Tiles:
    """Launch constants for heads of this width, groups of this size, queries of this type, and the bytes of a key.

    pairs: sequences × key heads. Few of them are split, and many small programs of one warp then have the most loads on
    their way; where there are enough, larger tiles waste less (measured, docs/performance-log.md).
    """
    rows = max(LEAST_ROWS, power_of_2(group))
    elements = TILE_ELEMENTS_FP32 if dtype == torch.float32 else TILE_ELEMENTS
    keys = max(16, min(elements, TILE_BYTES // cache_bytes) // power_of_2(max(16, head_dim)))
    if pairs < MANY_PAIRS and dtype != torch.float32 and rows == LEAST_ROWS and head_dim <= 128:
        return Tiles(rows, min(64, max(16, keys // 2)), 1, 5)
    return Tiles(rows, min(128, keys), 4, 3)


def splits_of(sequences: int, key_heads: int, most_tiles: int, multiprocessors: int) -> int:
    """Programs over which a sequence's keys are split, from what the host knows: never a context's real length."""
    pairs = sequences * key_heads
    if pairs > COUNTERS:
        return 1
    return max(1, min(ceil_div(PROGRAMS * multiprocessors, pairs), most_tiles, SPLIT_BLOCKS[-1]))


def _counters_of(device: torch.device) -> Tensor:
    """Zeros that a launch leaves as zeros, shared by all launches on a device: these must follow one another."""
    found = _counters.get(device)
    if found is None:
        found = torch.zeros((COUNTERS,), dtype=torch.int32, device=device)
        # Memory of a graph's own pool, cleared by the graph itself, is nothing that others may use.
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            _counters[device] = found
    return found


def decode(
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
    alone: bool,
    tiles: Tiles | None = None,
    splits: int = 0,
) -> None:
    """Write the rows of sequences with one new token into `out_THE`; others are left alone.

    alone: no other kernel fills the rest, so that rows beyond the last sequence are cleared. tiles, splits: instead of
    the rule's.
    """
    tokens, heads, head_dim = q_THE.shape
    sequences, blocks = block_table_BM.shape
    page, key_heads = k_NPKE.shape[1], k_NPKE.shape[2]
    group = heads // key_heads
    tiles = tiles or tiles_of(head_dim, group, q_THE.dtype, k_NPKE.element_size(), sequences * key_heads)
    most_tiles = ceil_div(blocks * page, tiles.keys)
    splits = splits or splits_of(sequences, key_heads, most_tiles, processors(q_THE.device))
    device = q_THE.device
    width, group_block = power_of_2(max(16, head_dim)), power_of_2(group)
    split_block = next(n for n in SPLIT_BLOCKS if splits <= n)
    # Without splits nothing is left for others: any pointers do.
    part = lse = out_THE
    counters = block_table_BM
    if splits > 1:
        part = torch.empty((sequences, key_heads, splits, group, head_dim), dtype=torch.float32, device=device)
        lse = torch.empty((sequences, key_heads, splits, group), dtype=torch.float32, device=device)
        counters = _counters_of(device)
    _decode_kernel[(key_heads, max(sequences, tokens) if alone else sequences, splits)](
        out_THE,
        part,
        lse,
        counters,
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
        splits,
        block_table_BM.stride(0),
        q_THE.stride(0),
        q_THE.stride(1),
        k_NPKE.stride(0),
        k_NPKE.stride(1),
        k_NPKE.stride(2),
        KEY_HEADS=key_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=page,
        WINDOW=window,
        CAPPED=softcap > 0,
        PADDING=alone,
        PRECISION=precision_of(q_THE.dtype),
        SPLIT_BLOCK=split_block,
        MERGED=max(1, min(split_block, MERGED_ELEMENTS // (group_block * width))),
        ROWS=tiles.rows,
        GROUP_BLOCK=group_block,
        BLOCK_E=width,
        BLOCK_N=tiles.keys,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
