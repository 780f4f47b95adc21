"""How the keys of a batch are cut into parts, a program each, and how a sequence's parts are added up.

The cut is made on the device from all contexts, once a step for all layers: the host knows no context when a launch is
captured. A line of the schedule tells a program all that it needs before its first load of keys.
Legend: B sequences  U parts  X numbers of a schedule's line  G heads of a group  E head dim  M parts added up at once
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.attention.paged_cuda import LINE
from rooflight.ops.kernels import ceil_div, processors
from rooflight.ops.kernels.paged_tile import HIDDEN

# Contexts that a program looks at together, for few sequences and for many; lines that it writes, and its warps.
SEARCHED = (32, 256)
LINES, WARPS = 16, 4
FEW_PAIRS, MANY_PAIRS = 64, 256  # of a sequence and a key head
STEP = 32  # keys of a tile of heads of 128 channels in 16 bits


@dataclass(frozen=True, slots=True)
class Cut:
    """How keys are spread: parts of a key head in all, if sequences were divisible at will; keys of one at least.

    A sequence's last part is shorter than others: there may be one more part for each sequence. Parts begin at
    multiples of `step` keys.
    """

    parts: int
    least: int
    step: int


def cut_of(sequences: int, key_heads: int, multiprocessors: int) -> Cut:
    """The cut by what the host knows: never a context's real length (measured, docs/performance-log.md)."""
    pairs = sequences * key_heads
    # Few sequences: the finer the cut, the sooner the last key is read. Many: sums of parts cost more than they save.
    each, least = (2, 32) if pairs < FEW_PAIRS else (4, 32) if pairs < MANY_PAIRS else (6, 256)
    return Cut(ceil_div(each * multiprocessors, key_heads), least, STEP)


@triton.jit
def _steps_of(contexts_ptr, starts_ptr, index_B, sequences, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """(steps of keys that a sequence's token sees, whether it has one token)."""
    inside_B = index_B < sequences
    context_B = tl.load(contexts_ptr + index_B, inside_B, 0).to(tl.int32)
    start_B = tl.load(starts_ptr + index_B, inside_B, 0)
    mine_B = tl.load(starts_ptr + index_B + 1, inside_B, 0) == start_B + 1
    if WINDOW > 0:
        context_B = tl.minimum(context_B, WINDOW)
    return tl.where(mine_B, tl.cdiv(context_B, STEP), 0), mine_B


# Counts change from step to step: no variant of the kernel for some of them.
@triton.jit(do_not_specialize=["sequences", "units", "parts", "least"])
def _schedule_kernel(
    schedule_ptr,
    contexts_ptr,
    starts_ptr,
    sequences,
    units,
    parts,
    least,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
    SEARCHED: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
):
    total = 0
    for first in range(0, sequences, SEARCHED):
        steps_B, _ = _steps_of(contexts_ptr, starts_ptr, first + tl.arange(0, SEARCHED), sequences, WINDOW, STEP)
        total += tl.sum(steps_B)
    most = tl.maximum(tl.cdiv(total, parts), least)
    unit_U = tl.program_id(0) * LINES + tl.arange(0, LINES)
    sequence_U = tl.full((LINES,), -1, tl.int32)
    first_U = tl.zeros((LINES,), tl.int32)
    # Long sequences' parts are numbered from the first program on, and short sequences, a part each, from the last one
    # back: programs start in order, and what starts late should be short.
    longs, shorts = 0, 0
    for first in range(0, sequences, SEARCHED):
        index_B = first + tl.arange(0, SEARCHED)
        steps_B, mine_B = _steps_of(contexts_ptr, starts_ptr, index_B, sequences, WINDOW, STEP)
        long_B = 2 * steps_B > most
        parts_B = tl.where(long_B, tl.cdiv(steps_B, most), 0)
        short_B = (mine_B & (2 * steps_B <= most)).to(tl.int32)
        end_B = longs + tl.cumsum(parts_B, 0)
        # Where a short sequence is not, no unit is meant.
        alone_B = tl.where(short_B == 1, units - shorts - tl.cumsum(short_B, 0), -1)
        longs += tl.sum(parts_B)
        shorts += tl.sum(short_B)
        begin_UB = (end_B - parts_B)[None, :]
        found_UB = (unit_U[:, None] >= begin_UB) & (unit_U[:, None] < end_B[None, :])
        first_U += tl.sum(tl.where(found_UB, begin_UB, 0), 1)
        found_UB = found_UB | (unit_U[:, None] == alone_B[None, :])
        sequence_U = tl.maximum(sequence_U, tl.max(tl.where(found_UB, index_B[None, :], -1), 1))
    real_U = sequence_U >= 0
    context_U = tl.load(contexts_ptr + sequence_U, real_U, 0).to(tl.int32)
    row_U = tl.load(starts_ptr + sequence_U, real_U, 0).to(tl.int32)
    oldest_U = tl.zeros_like(context_U)
    if WINDOW > 0:
        oldest_U = tl.maximum(context_U - WINDOW, 0)
    steps_U = tl.cdiv(context_U - oldest_U, STEP)
    # An empty context is one part, which writes zeros.
    parts_U = tl.where(2 * steps_U > most, tl.cdiv(steps_U, most), 1)
    part_U = tl.where(parts_U > 1, unit_U - first_U, 0)
    begin_U = oldest_U + part_U * steps_U // parts_U * STEP
    end_U = tl.minimum(oldest_U + (part_U + 1) * steps_U // parts_U * STEP, context_U)
    rows = tl.load(starts_ptr + sequences).to(tl.int32)
    at_U = schedule_ptr + unit_U * LINE
    inside_U = unit_U < units
    tl.store(at_U, sequence_U, inside_U)
    tl.store(at_U + 1, row_U, inside_U)
    tl.store(at_U + 2, begin_U, inside_U)
    tl.store(at_U + 3, end_U, inside_U)
    tl.store(at_U + 4, part_U, inside_U)
    tl.store(at_U + 5, parts_U, inside_U)
    tl.store(at_U + 6, tl.zeros_like(unit_U) + rows, inside_U)
    tl.store(at_U + 7, tl.zeros_like(unit_U), inside_U)


def attention_schedule(
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    longest: int,
    key_heads: int,
    window: int,
    cut: Cut | None = None,
) -> Tensor:
    """[U, X] int32, as the operation `attention_schedule`; cut: instead of the rule's."""
    sequences, device = context_lengths_B.shape[0], context_lengths_B.device
    cut = cut or cut_of(sequences, key_heads, processors(device))
    # No sequence has more keys than its row of the table has room for.
    units = sequences + min(cut.parts, sequences * max(0, ceil_div(longest, cut.least) - 1))
    schedule_UX = torch.empty((units, LINE), dtype=torch.int32, device=device)
    if units:
        _schedule_kernel[(ceil_div(units, LINES),)](
            schedule_UX,
            context_lengths_B,
            query_starts_B1,
            sequences,
            units,
            cut.parts,
            ceil_div(cut.least, cut.step),
            WINDOW=window,
            STEP=cut.step,
            SEARCHED=SEARCHED[0] if sequences <= SEARCHED[0] else SEARCHED[1],
            LINES=LINES,
            LINE=LINE,
            num_warps=WARPS,
        )
    return schedule_UX


@triton.jit
def merge(
    out_ptr,
    part_ptr,
    lse_ptr,
    parts,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MERGED: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out_G = Σ_m part_mG · exp(lse_mG) / Σ_m exp(lse_mG), read from the cache that all multiprocessors share."""
    member_G = tl.arange(0, GROUP_BLOCK)
    channel_E = tl.arange(0, BLOCK_E)
    peak_G = tl.full((GROUP_BLOCK,), HIDDEN, tl.float32)
    total_G = tl.zeros((GROUP_BLOCK,), tl.float32)
    out_GE = tl.zeros((GROUP_BLOCK, BLOCK_E), tl.float32)
    for first in range(0, parts, MERGED):
        part_M = first + tl.arange(0, MERGED)
        mask_MG = (part_M < parts)[:, None] & (member_G < GROUP)[None, :]
        part_MG = part_M[:, None] * GROUP + member_G[None, :]
        lse_MG = tl.load(lse_ptr + part_MG, mask_MG, HIDDEN, cache_modifier=".cg")
        at_MGE = part_MG[:, :, None] * HEAD_DIM + channel_E[None, None, :]
        mask_MGE = mask_MG[:, :, None] & (channel_E < HEAD_DIM)[None, None, :]
        part_MGE = tl.load(part_ptr + at_MGE, mask_MGE, 0.0, cache_modifier=".cg")
        higher_G = tl.maximum(peak_G, tl.max(lse_MG, 0))
        fade_G = tl.exp2(peak_G - higher_G)
        weight_MG = tl.exp2(lse_MG - higher_G[None, :])
        total_G = total_G * fade_G + tl.sum(weight_MG, 0)
        out_GE = out_GE * fade_G[:, None] + tl.sum(part_MGE * weight_MG[:, :, None], 0)
        peak_G = higher_G
    at_GE = member_G[:, None] * HEAD_DIM + channel_E[None, :]
    tl.store(out_ptr + at_GE, out_GE / total_G[:, None], (member_G < GROUP)[:, None] & (channel_E < HEAD_DIM)[None, :])
