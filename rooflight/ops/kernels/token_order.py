"""Positions in the order of their tokens: a stable sort in two passes of half a token's bits.

`_count_kernel` counts the lower halves of each stretch of positions, and marks which tokens occur; `_place_kernel` puts
positions in their order and counts the upper halves of where they land, and once more puts them in order of these.
Nothing but whole numbers is added by atomics, so that the order is always the same.
Legend: T tokens  V vocabulary  B values of half a token's bits  N stretches  S positions ranked at once
R stretches' counts loaded at once  C counters of the caller
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.ops.kernels import ceil_div

RANKED, LEAST_STRETCH, MOST_STRETCHES = 64, 256, 128
# So few that programs of the launches before and after find room on the same multiprocessor.
SORT_WARPS, SORT_REGISTERS = 8, 104
COUNTED = 256  # positions at once
COUNTS = 2048  # that a program loads at once
CLEARED = 512  # of the caller's counters, by a program at once


@triton.jit
def _key(token_S, vocabulary):
    """Tokens outside the vocabulary, which the embedding's forward refuses, come last and are written nowhere."""
    return tl.where((token_S >= 0) & (token_S < vocabulary), token_S, vocabulary).to(tl.int32)


@triton.jit
def _count_kernel(
    counts_ptr,
    upper_counts_ptr,
    counter_ptr,
    mark_ptr,
    token_ptr,
    tokens,
    vocabulary,
    counters,
    stretch_length,
    B: tl.constexpr,
    UPPER_B: tl.constexpr,
    S: tl.constexpr,
    CLEARED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A stretch's lower halves are counted and its tokens marked; and what later launches count in becomes zero."""
    if EARLY:
        gdc_launch_dependents()
    stretch, number_B = tl.program_id(0), tl.arange(0, B)
    end = tl.minimum((stretch + 1) * stretch_length, tokens)
    count_B = tl.zeros((B,), tl.int32)
    for first in range(stretch * stretch_length, end, S):
        position_S = first + tl.arange(0, S)
        inside_S = position_S < end
        key_S = _key(tl.load(token_ptr + position_S, inside_S, 0), vocabulary)
        # One of a token's positions, no matter which.
        tl.store(mark_ptr + key_S, position_S, inside_S & (key_S < vocabulary))
        count_B += tl.histogram(key_S & (B - 1), B, inside_S)
    tl.store(counts_ptr + stretch * B + number_B, count_B)
    tl.store(upper_counts_ptr + stretch * UPPER_B + tl.arange(0, UPPER_B), tl.zeros((UPPER_B,), tl.int32))
    for first in range(stretch * CLEARED, counters, tl.num_programs(0) * CLEARED):
        at_C = first + tl.arange(0, CLEARED)
        tl.store(counter_ptr + at_C, tl.zeros((CLEARED,), tl.int32), at_C < counters)


@triton.jit
def _place_kernel(
    placed_ptr,
    source_ptr,
    counts_ptr,
    upper_counts_ptr,
    tokens,
    vocabulary,
    stretches,
    steps,
    UPPER: tl.constexpr,
    LOWER_B: tl.constexpr,
    UPPER_B: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    EARLY: tl.constexpr,
):
    """source: tokens, or where UPPER what the first pass placed: a key above and a position below."""
    B: tl.constexpr = UPPER_B if UPPER else LOWER_B
    stretch, number_B, number_S = tl.program_id(0), tl.arange(0, B), tl.arange(0, S)
    begin = stretch * steps * S
    if UPPER and EARLY:
        gdc_launch_dependents()
        gdc_wait()
    source_S = tl.load(source_ptr + begin + number_S, begin + number_S < tokens, 0)
    if EARLY and not UPPER:
        # The second pass begins after this: what follows it may rely on `_count_kernel` without waiting.
        gdc_wait()
        gdc_launch_dependents()
    total_RB = tl.zeros((R, B), tl.int32)
    before_RB = tl.zeros((R, B), tl.int32)
    for first in tl.range(0, stretches, R, loop_unroll_factor=8):
        row_R1 = first + tl.arange(0, R)[:, None]
        count_RB = tl.load(counts_ptr + row_R1 * B + number_B[None, :], row_R1 < stretches, 0)
        total_RB += count_RB
        before_RB += tl.where(row_R1 < stretch, count_RB, 0)
    total_B = tl.sum(total_RB, 0)
    next_B = tl.cumsum(total_B, 0) - total_B + tl.sum(before_RB, 0)
    for step in range(steps):
        at_S = begin + step * S + number_S
        inside_S = at_S < tokens
        if UPPER:
            entry_S = source_S
            key_S = (entry_S >> 32).to(tl.int32)
            half_S = key_S // LOWER_B
        else:
            key_S = _key(source_S, vocabulary)
            half_S = key_S & (B - 1)
            entry_S = (key_S.to(tl.int64) << 32) | at_S
        if step + 1 < steps:
            source_S = tl.load(source_ptr + at_S + S, at_S + S < tokens, 0)
        earlier_SS = (half_S[:, None] == half_S[None, :]) & (number_S[:, None] > number_S[None, :])
        place_S = tl.gather(next_B, half_S, 0) + tl.sum(earlier_SS.to(tl.int32), 1)
        tl.store(placed_ptr + place_S, entry_S, inside_S)
        if not UPPER:
            lands_S = place_S // (steps * S)
            tl.atomic_add(upper_counts_ptr + lands_S * UPPER_B + key_S // LOWER_B, 1, inside_S, sem="relaxed")
        if step + 1 < steps:
            next_B += tl.histogram(half_S, B, inside_S)


def order(tokens_T: Tensor, vocabulary: int, counter_C: Tensor, early: bool) -> tuple[Tensor, Tensor]:
    """(token << 32 | position) in order, and marks: token v occurs if 0 <= mark[v] < T and tokens[mark[v]] = v.

    Tokens outside the vocabulary count as the vocabulary's size. The counters become zero. Marks of tokens that do not
    occur are whatever the memory held.
    early: launches begin while those before them end; the next may begin so too. It may read marks and counters at
        once, and the order after `gdc_wait`.
    """
    tokens = tokens_T.numel()
    bits = vocabulary.bit_length()
    lower_values = 1 << max(5, ceil_div(bits, 2))
    upper_values = 1 << max(5, bits // 2)
    steps = ceil_div(max(LEAST_STRETCH, ceil_div(tokens, MOST_STRETCHES)), RANKED)
    stretches = ceil_div(tokens, RANKED * steps)
    counts_NB = tokens_T.new_empty((stretches, lower_values), dtype=torch.int32)
    upper_counts_NB = tokens_T.new_empty((stretches, upper_values), dtype=torch.int32)
    placed_T, entry_T = tokens_T.new_empty((2, tokens), dtype=torch.int64)
    mark_V = tokens_T.new_empty((vocabulary,), dtype=torch.int32)
    _count_kernel[(stretches,)](
        *(counts_NB, upper_counts_NB, counter_C, mark_V, tokens_T),
        *(tokens, vocabulary, counter_C.numel(), RANKED * steps),
        B=lower_values,
        UPPER_B=upper_values,
        S=COUNTED,
        CLEARED=CLEARED,
        EARLY=early,
        num_warps=4,
    )
    for source_T, target_T, counts, values, upper in (
        (tokens_T, placed_T, counts_NB, lower_values, False),
        (placed_T, entry_T, upper_counts_NB, upper_values, True),
    ):
        _place_kernel[(stretches,)](
            *(target_T, source_T, counts, upper_counts_NB, tokens, vocabulary, stretches, steps),
            UPPER=upper,
            LOWER_B=lower_values,
            UPPER_B=upper_values,
            S=RANKED,
            R=max(1, COUNTS // values),
            EARLY=early,
            num_warps=SORT_WARPS,
            maxnreg=SORT_REGISTERS,
            launch_pdl=early,
        )
    return entry_T, mark_V
