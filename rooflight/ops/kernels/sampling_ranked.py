"""Kernels that draw from likely to unlikely under top_k, top_p and min_p, without sorting.

The first launch leaves each chunk's greatest logit; the second its whole weight, how many tokens min_p keeps, and how
many lie within powers of 2 below the greatest. From these counts follows how far down the draw can reach, and the third
gathers the tokens above that, a few of the vocabulary as a rule. The fourth searches among them (`sampling_search`).
Sums are of whole numbers: a draw is the reference's bit for bit.
Legend: B rows  V vocabulary  C chunks  T tokens of a tile  K counts of a chunk, in W words  G gathered
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import power_of_2, processors
from rooflight.ops.kernels.sampling import (
    ONE,
    TILE,
    WARPS,
    by_rows,
    load_logits,
    load_peaks,
    log_ratio,
    peaks,
    scale_of,
    tiles_of,
    whole,
)
from rooflight.ops.kernels.sampling_search import STATE, choose_kernel, enough_of, target_of

COUNTS = tl.constexpr(16)  # of ratios by powers of 2; the last holds what weighs nothing
FINE, WIDE = tl.constexpr(11), tl.constexpr(9)  # counts of one power of 2, then some of nine
WORDS, HALVES = tl.constexpr(8), tl.constexpr(0x000F000F)  # 32 bits hold two counts, made of 4 bits a thread
# Above what rounding adds to a weight, or moves a count's edge.
SLACK = tl.constexpr(1.0 + 2.0**-12)
CHUNKS_AT_ONCE = tl.constexpr(32)
STAGES = tl.constexpr(4)  # tiles on their way; all at once would leave no registers
LEAST_TILES = 4  # of a chunk: every program adds up the counts of all chunks
GATHERED = 16384  # tokens; where a draw can reach more, the search is over the whole row
WAYS = 8
# A search's tile of a list, each with all ways, and its warps: more where programs are fewer than multiprocessors.
FEW_ROWS, MANY_ROWS = (1024, 8), (512, 4)
# Bits of a widened logit that say nothing: those that its own type lacks.
EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _count_of(log_T):
    """Which count a token belongs to, rising as logits fall; the last for what is no number."""
    depth_T = -log_T
    # Rounded once, said so, for two kernels have to agree on a token's count.
    depth_T = tl.minimum(depth_T, tl.fma(depth_T, 1.0 / WIDE, FINE - FINE / WIDE))
    return tl.where(depth_T < COUNTS - 1, depth_T, COUNTS - 1).to(tl.int32)


@triton.jit(do_not_specialize=["chunks"])
def _survey_kernel(
    peak_ptr,
    mass_ptr,
    likely_ptr,
    count_ptr,
    x_ptr,
    temperature_ptr,
    min_p_ptr,
    row_stride,
    vocabulary,
    chunks,
    CHUNK_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    # From the last row to the first: the logits that the launch before read last are the ones that L2 still holds.
    chunk, row = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    x_ptr += row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    if temperature > 0:
        peak = tl.max(load_peaks(peak_ptr + row * chunks, chunks, CHUNK_BLOCK), 0)
        scale = scale_of(temperature)
        mass_T, deep_T, likely_T = tl.zeros((TILE,), tl.int64), tl.zeros((TILE,), tl.int64), tl.zeros((TILE,), tl.int32)
        # Counts of 4 bits, enough for a chunk's tiles: the first eight and the last eight. What lies beyond the
        # vocabulary counts as weighing nothing, which nobody asks for.
        first_T, last_T = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
        for tile in tl.range(TILES, num_stages=STAGES):
            at_T = (chunk * TILES + tile) * TILE + tl.arange(0, TILE)
            log_T = log_ratio(load_logits(x_ptr, at_T, vocabulary), peak, scale)
            ratio_T, number_T = tl.exp2(log_T), _count_of(log_T)
            weight_T = whole(ratio_T)
            mass_T += weight_T
            deep_T += tl.where(number_T >= FINE, weight_T, 0)
            likely_T += (ratio_T >= min_p).to(tl.int32)
            one_T = 1 << ((number_T & 7) * 4)
            first_T += tl.where(number_T < 8, one_T, 0)
            last_T += tl.where(number_T < 8, 0, one_T)
        quarter_W = tl.arange(0, WORDS // 2)
        first_W = tl.sum((first_T[:, None] >> (quarter_W * 4)[None, :]) & HALVES, 0)
        last_W = tl.sum((last_T[:, None] >> (quarter_W * 4)[None, :]) & HALVES, 0)
        at = row * chunks + chunk
        tl.store(mass_ptr + at * 2, tl.sum(mass_T, 0))
        tl.store(mass_ptr + at * 2 + 1, tl.sum(deep_T, 0))
        tl.store(likely_ptr + at, tl.sum(likely_T, 0))
        count_ptr += at.to(tl.int64) * WORDS
        tl.store(count_ptr + quarter_W, first_W)
        tl.store(count_ptr + WORDS // 2 + quarter_W, last_W)


@triton.jit
def _load_counts(count_ptr, chunk_C, chunks):
    """Counts [C, K] of chunks: words hold the counts 0 and 4, 1 and 5, 2 and 6, 3 and 7; then 8 and 12, …"""
    number_K = tl.arange(0, COUNTS)
    word_K = (number_K // 8) * 4 + number_K % 4
    word_CK = tl.load(count_ptr + chunk_C[:, None] * WORDS + word_K[None, :], (chunk_C < chunks)[:, None], 0)
    return (word_CK >> ((number_K % 8) // 4 * 16)[None, :]) & 0xFFFF


@triton.jit
def _deepest(count_K, kept, total, deep, top_p, uniform, vocabulary):
    """The deepest count of tokens that the draw can reach, given the row's counts and weights."""
    number_K = tl.arange(0, COUNTS)
    if kept < vocabulary:
        # The first `kept` ranks.
        deepest = tl.sum((tl.cumsum(count_K, 0) < kept).to(tl.int32), 0)
    else:
        # What is left out weighs, at most, what need not be reached.
        enough = enough_of(top_p, total)
        reached = tl.where(enough < total, enough, target_of(uniform, total) + 1)
        edge_K = tl.where(number_K < FINE, number_K, FINE + WIDE * (number_K - FINE)).to(tl.float32)
        most_K = tl.where(number_K < COUNTS - 1, (tl.exp2(-edge_K) * (ONE * SLACK)).to(tl.int64) + 1, 0)
        weight_K = count_K.to(tl.int64) * most_K
        fine_K = tl.where(number_K < FINE, weight_K, 0)
        deeper_K = tl.sum(weight_K, 0) - tl.cumsum(weight_K, 0)
        deeper_fine_K = deep + tl.sum(fine_K, 0) - tl.cumsum(fine_K, 0)
        deeper_K = tl.where(number_K < FINE, deeper_fine_K, deeper_K)
        deepest = tl.sum((deeper_K > total - reached).to(tl.int32), 0)
    return tl.minimum(deepest, COUNTS - 2)


@triton.jit(do_not_specialize=["chunks"])
def _gather_kernel(
    near_ptr,
    token_ptr,
    state_ptr,
    peak_ptr,
    mass_ptr,
    likely_ptr,
    count_ptr,
    x_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    row_stride,
    vocabulary,
    chunks,
    GATHERED: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0:
        top_k = tl.load(top_k_ptr + row)
        top_p, uniform = tl.load(top_p_ptr + row).to(tl.float64), tl.load(uniform_ptr + row).to(tl.float64)
        chunk_C = tl.arange(0, CHUNK_BLOCK)
        mass_ptr += row * chunks * 2
        total = tl.sum(tl.load(mass_ptr + chunk_C * 2, chunk_C < chunks, 0), 0)
        deep = tl.sum(tl.load(mass_ptr + chunk_C * 2 + 1, chunk_C < chunks, 0), 0)
        likely = tl.sum(tl.load(likely_ptr + row * chunks + chunk_C, chunk_C < chunks, 0), 0)
        kept = tl.maximum(tl.where(top_k > 0, tl.minimum(top_k, likely), likely), 1).to(tl.int32)
        # The row's counts; those of the chunks before this one; this one's.
        number_K = tl.arange(0, COUNTS)
        count_ptr += row.to(tl.int64) * chunks * WORDS
        row_K, before_K, own_K = (
            tl.zeros((COUNTS,), tl.int32),
            tl.zeros((COUNTS,), tl.int32),
            tl.zeros((COUNTS,), tl.int32),
        )
        for first in range(0, chunks, CHUNKS_AT_ONCE):
            at_C = first + tl.arange(0, CHUNKS_AT_ONCE)
            count_CK = _load_counts(count_ptr, at_C, chunks)
            row_K += tl.sum(count_CK, 0)
            before_K += tl.sum(tl.where((at_C < chunk)[:, None], count_CK, 0), 0)
            own_K += tl.sum(tl.where((at_C == chunk)[:, None], count_CK, 0), 0)
        # Where only tokens that weigh nothing are not kept, all may as well be.
        kept = tl.where(kept > tl.sum(tl.where(number_K < COUNTS - 1, row_K, 0), 0), vocabulary, kept)
        deepest = _deepest(row_K, kept, total, deep, top_p, uniform, vocabulary)
        near_K = number_K <= deepest
        near = tl.sum(tl.where(near_K, row_K, 0), 0)
        if chunk == 0:
            tl.store(state_ptr + row * STATE, near.to(tl.int64))
            tl.store(state_ptr + row * STATE + 1, kept.to(tl.int64))
            tl.store(state_ptr + row * STATE + 2, total)
        if (near <= GATHERED) & (tl.sum(tl.where(near_K, own_K, 0), 0) > 0):
            x_ptr += row.to(tl.int64) * row_stride
            near_ptr += row.to(tl.int64) * GATHERED
            token_ptr += row.to(tl.int64) * GATHERED
            peak = tl.max(load_peaks(peak_ptr + row * chunks, chunks, CHUNK_BLOCK), 0)
            scale = scale_of(temperature)
            to = tl.sum(tl.where(near_K, before_K, 0), 0)
            for tile in range(TILES):
                at_T = (chunk * TILES + tile) * TILE + tl.arange(0, TILE)
                x_T = tl.load(x_ptr + at_T, at_T < vocabulary, float("-inf"))
                near_T = (_count_of(log_ratio(x_T.to(tl.float32), peak, scale)) <= deepest) & (at_T < vocabulary)
                to_T = to + tl.cumsum(near_T.to(tl.int32), 0) - 1
                tl.store(near_ptr + to_T, x_T, near_T)
                tl.store(token_ptr + to_T, at_T, near_T)
                to += tl.sum(near_T.to(tl.int32), 0)


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
    most: int = 0,
    tiles: int = 0,
    gathered: int = GATHERED,
    search: tuple[int, int] | None = None,
) -> Tensor:
    """`ops.sampling.sample` in four launches, whatever was promised by `most`.

    tiles of a chunk, tokens that may be gathered, (tile, warps) of the search: instead of the rules'.
    """
    logits_BV = by_rows(logits_BV)
    (rows, vocabulary), device = logits_BV.shape, logits_BV.device
    multiprocessors = processors(device)
    tiles = tiles or max(LEAST_TILES, tiles_of(rows, vocabulary, multiprocessors))
    list_tile, warps = search or (FEW_ROWS if rows <= multiprocessors else MANY_ROWS)
    temperature_B, top_p_B, uniform_B = temperature_B.contiguous(), top_p_B.contiguous(), uniform_B.contiguous()
    peak_BC = peaks(logits_BV, tiles)
    chunks = peak_BC.shape[1]
    row_stride = logits_BV.stride(0)
    shape = {"CHUNK_BLOCK": power_of_2(chunks), "TILES": tiles, "TILE": TILE}

    mass_BC2 = torch.empty((rows, chunks, 2), dtype=torch.int64, device=device)
    likely_BC = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    count_BCW = torch.empty((rows, chunks, WORDS.value), dtype=torch.int32, device=device)
    _survey_kernel[(chunks, rows)](
        *(peak_BC, mass_BC2, likely_BC, count_BCW, logits_BV, temperature_B, min_p_B.contiguous()),
        *(row_stride, vocabulary, chunks),
        **shape,
        num_warps=WARPS,
    )
    near_BG = torch.empty((rows, gathered), dtype=logits_BV.dtype, device=device)
    token_BG = torch.empty((rows, gathered), dtype=torch.int32, device=device)
    state_B3 = torch.empty((rows, STATE.value), dtype=torch.int64, device=device)
    _gather_kernel[(chunks, rows)](
        *(near_BG, token_BG, state_B3, peak_BC, mass_BC2, likely_BC, count_BCW, logits_BV),
        *(temperature_B, top_k_B.contiguous(), top_p_B, uniform_B, row_stride, vocabulary, chunks),
        GATHERED=gathered,
        **shape,
        num_warps=WARPS,
    )
    out_B = torch.empty((rows,), dtype=torch.int64, device=device)
    choose_kernel[(rows,)](
        *(out_B, near_BG, token_BG, state_B3, peak_BC, logits_BV, temperature_B, top_p_B, uniform_B),
        *(row_stride, vocabulary, chunks),
        EMPTY=EMPTY_BITS[logits_BV.dtype],
        GATHERED=gathered,
        **shape,
        LIST=list_tile,
        WAYS=WAYS,
        num_warps=warps,
    )
    return out_B
