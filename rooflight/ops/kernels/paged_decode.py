"""Paged attention of one new token a sequence: a group's heads in one tile, keys spread over programs of equal work.

Flash-decoding (Dao et al. 2023): a long sequence is cut into parts, each of which leaves its share of the output and
its log-sum-exp, and the last program of a sequence and key head to be done adds the parts up, always in one order. How
sequences are cut says a schedule that was made on the device, so that a captured launch serves all contexts.
Legend: B sequences  T rows of tokens  H query heads  K key heads  G = H/K  E head dim  N keys of a tile  M parts
        U parts of all sequences  X numbers of a schedule's line
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.ops.attention.paged_cuda import LINE
from rooflight.ops.kernels import counters_of, early_attention, power_of_2
from rooflight.ops.kernels.paged_parts import attention_schedule, merge
from rooflight.ops.kernels.paged_tile import HIDDEN, LOG2_E, Tiles, absorb, cache_rows, load_rows, precision_of

# Of keys, and as many of values; narrow numbers are widened in registers, which hold no more elements, and fp32 ones
# are multiplied there.
TILE_BYTES, TILE_ELEMENTS, TILE_ELEMENTS_FP32 = 16 * 1024, 8 * 1024, 2 * 1024
LEAST_ROWS = 16  # of a product on tensor cores
MERGED_ELEMENTS = 4096  # of parts that are added up at once, in registers
COUNTERS = 1 << 16


# Counts change from step to step: no variant of the kernel for some of them.
@triton.jit(do_not_specialize=["tokens"])
def _decode_kernel(
    out_ptr,
    part_ptr,
    lse_ptr,
    counter_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    schedule_ptr,
    sinks_ptr,
    scale,
    softcap,
    tokens,
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
    CAPPED: tl.constexpr,
    PADDING: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
    LINE: tl.constexpr,
    MERGED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0)
    unit = tl.program_id(1)
    member_R = tl.arange(0, ROWS)
    channel_E = tl.arange(0, BLOCK_E)
    inside_RE = (member_R < GROUP)[:, None] & (channel_E < HEAD_DIM)[None, :]
    head_R = head * GROUP + member_R
    within_RE = head_R[:, None] * HEAD_DIM + channel_E[None, :]
    row_size = KEY_HEADS * GROUP * HEAD_DIM
    line_ptr = schedule_ptr + unit * LINE
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sequence = tl.load(line_ptr)
    row = tl.load(line_ptr + 1).to(tl.int64)
    begin = tl.load(line_ptr + 2)
    end = tl.load(line_ptr + 3)
    part = tl.load(line_ptr + 4)
    parts = tl.load(line_ptr + 5)
    if PADDING:
        # Rows beyond the last sequence's stand for nothing.
        for empty in range(tl.load(line_ptr + 6).to(tl.int64) + unit, tokens, tl.num_programs(1)):
            nothing_RE = tl.zeros((ROWS, BLOCK_E), tl.float32)
            tl.store(out_ptr + empty * row_size + within_RE, nothing_RE, inside_RE)
    if sequence < 0:
        return
    q_at_RE = row * q_token_stride + head_R[:, None] * q_head_stride + channel_E[None, :]
    q_RE = tl.load(q_ptr + q_at_RE, inside_RE, 0.0)
    peak_R = tl.full((ROWS,), HIDDEN, tl.float32)
    total_R = tl.zeros((ROWS,), tl.float32)
    if sinks_ptr is not None:
        # A sink is a score without a value, of the first part.
        sink_R = tl.load(sinks_ptr + head_R, member_R < GROUP, 0.0).to(tl.float32)
        peak_R = tl.where(part == 0, sink_R * LOG2_E, peak_R)
        total_R = tl.where(part == 0, 1.0, total_R)
    out_RE = tl.zeros((ROWS, BLOCK_E), tl.float32)
    table_ptr += sequence.to(tl.int64) * table_stride
    k_ptr += head * head_stride
    v_ptr += head * head_stride
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        position_N = start + tl.arange(0, BLOCK_N)
        inside_N = position_N < end
        # The last key stands for those behind it, which are hidden: loads that never leave a part need no mask.
        rows_N = cache_rows(table_ptr, tl.minimum(position_N, end - 1), inside_N, block_rows, TOKEN_STRIDE, PAGE, False)
        k_NE = load_rows(k_ptr, rows_N, inside_N, HEAD_DIM, BLOCK_E, False)
        v_NE = load_rows(v_ptr, rows_N, inside_N, HEAD_DIM, BLOCK_E, False)
        out_RE, peak_R, total_R = absorb(
            out_RE, peak_R, total_R, q_RE, k_NE, v_NE, inside_N[None, :], scale, softcap, CAPPED, True, PRECISION
        )
    # An empty context has no total.
    out_RE = out_RE / tl.where(total_R > 0.0, total_R, 1.0)[:, None]
    out_ptr += row * row_size
    if parts == 1:
        tl.store(out_ptr + within_RE, out_RE, inside_RE)
    else:
        # A sequence's parts lie one behind the other for each key head.
        part_ptr += (head * tl.num_programs(1) + unit - part).to(tl.int64) * (GROUP * HEAD_DIM)
        lse_ptr += (head * tl.num_programs(1) + unit - part) * GROUP
        part_R = part * GROUP + member_R
        tl.store(part_ptr + part_R[:, None] * HEAD_DIM + channel_E[None, :], out_RE, inside_RE)
        tl.store(lse_ptr + part_R, peak_R + tl.log2(total_R), member_R < GROUP)
        # Every warp's stores come before the count, which publishes them.
        tl.debug_barrier()
        counter_ptr += sequence * KEY_HEADS + head
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == parts - 1:
            tl.store(counter_ptr, 0)
            merge(
                out_ptr + head * (GROUP * HEAD_DIM),
                part_ptr,
                lse_ptr,
                parts,
                GROUP,
                HEAD_DIM,
                MERGED,
                GROUP_BLOCK,
                BLOCK_E,
            )


def tiles_of(head_dim: int, group: int, dtype: torch.dtype, cache_bytes: int) -> Tiles:
    """Launch constants for heads of this width, groups of this size, queries of this type, and the bytes of a key.

    Many small programs of one warp have the most loads on their way (measured, docs/performance-log.md).
    """
    rows = max(LEAST_ROWS, power_of_2(group))
    elements = TILE_ELEMENTS_FP32 if dtype == torch.float32 else TILE_ELEMENTS
    keys = max(16, min(elements, TILE_BYTES // cache_bytes) // power_of_2(max(16, head_dim)))
    if dtype == torch.float32 or rows > LEAST_ROWS or head_dim > 128:
        return Tiles(rows, min(128, keys), 4, 3)
    return Tiles(rows, min(64, max(16, keys // 2)), 1, 7)


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
    schedule_UX: Tensor | None = None,
    tiles: Tiles | None = None,
    early: bool | None = None,
) -> None:
    """Write the rows of sequences with one new token into `out_THE`; others are left alone.

    alone: no other kernel fills the rest, so that rows beyond the last sequence are cleared. schedule_UX: of
    `attention_schedule` for these sequences and this window, made here when None. tiles, early: instead of the rule's.
    """
    tokens, heads, head_dim = q_THE.shape
    sequences, blocks = block_table_BM.shape
    page, key_heads = k_NPKE.shape[1], k_NPKE.shape[2]
    group = heads // key_heads
    device = q_THE.device
    tiles = tiles or tiles_of(head_dim, group, q_THE.dtype, k_NPKE.element_size())
    early = early_attention(tokens, heads * head_dim) if early is None else early
    if schedule_UX is None:
        schedule_UX = attention_schedule(context_lengths_B, query_starts_B1, blocks * page, key_heads, window)
    units = schedule_UX.shape[0]
    width, group_block = power_of_2(max(16, head_dim)), power_of_2(group)
    # Where no sequence is cut nothing is left for others: any pointers do.
    part = lse = out_THE
    counters = block_table_BM
    if units > sequences:
        part = torch.empty((key_heads, units, group, head_dim), dtype=torch.float32, device=device)
        lse = torch.empty((key_heads, units, group), dtype=torch.float32, device=device)
        counters = counters_of(device, "decode", max(COUNTERS, sequences * key_heads))
    _decode_kernel[(key_heads, units)](
        out_THE,
        part,
        lse,
        counters,
        q_THE,
        k_NPKE,
        v_NPKE,
        block_table_BM,
        schedule_UX,
        sinks_H,
        scale,
        softcap,
        tokens,
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
        CAPPED=softcap > 0,
        PADDING=alone,
        EARLY=early,
        PRECISION=precision_of(q_THE.dtype),
        LINE=LINE,
        MERGED=max(1, MERGED_ELEMENTS // (group_block * width)),
        ROWS=tiles.rows,
        GROUP_BLOCK=group_block,
        BLOCK_E=width,
        BLOCK_N=tiles.keys,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        launch_pdl=early,
    )
