"""The search of the ranked draw: which of a list of logits, taken from likely to unlikely, a draw falls on.

By bisecting logits several ways at a time within a band of depths, what weighs more being a sum: for the last rank
that top_k and min_p keep, the last that top_p keeps, and the one that the draw falls on. Equal logits weigh the same,
so that which of them is meant is a division, and then a search among token numbers, for the list is in no order.
Legend: B rows  V vocabulary  C chunks  P parts of a row  T logits of a tile  W ways of a bisection
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from rooflight.ops.kernels.sampling import first_of_peak, load_logits, load_peaks, log_ratio, scale_of, whole
from rooflight.ops.kernels.sampling_survey import STATE, depth_of, enough_of, target_of

TOKEN_WAYS = tl.constexpr(16)  # of the search among token numbers, which only counts


@triton.jit
def _rank_key(x, EMPTY: tl.constexpr):
    """A whole number that rises with the logit and is equal where logits are; −0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY


@triton.jit
def _weight_of(key, peak, scale, EMPTY: tl.constexpr):
    bits = key.to(tl.int32) << EMPTY
    # Of negative logits the empty bits were turned too.
    bits = tl.where(bits < 0, (bits ^ 0x7FFFFFFF) >> EMPTY << EMPTY, bits)
    return whole(tl.exp2(log_ratio(bits.to(tl.float32, bitcast=True), peak, scale)))


@triton.jit
def _listed(x_ptr, token_ptr, gathered, at, length):
    """Logits and tokens of a list: what was gathered, or else the row itself. Beyond its length −∞."""
    token = tl.load(token_ptr + at, gathered & (at < length), at)
    return load_logits(x_ptr, token, tl.where(at < length, token + 1, 0)), token


@triton.jit
def _search(
    x_ptr, token_ptr, gathered, length, peak, scale, first, last, goal, BY_MASS: tl.constexpr, EMPTY: tl.constexpr,
    LIST: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """(key, tokens above it, their weight) of the first logit, from above, at which tokens or weight pass the goal.

    Of logits of the depths first to last alone.
    """
    most_T, least_T = tl.full((LIST,), -(2**31), tl.int32), tl.full((LIST,), 2**31 - 1, tl.int32)
    for start in range(0, length, LIST):
        x_T, _ = _listed(x_ptr, token_ptr, gathered, start + tl.arange(0, LIST), length)
        depth_T, key_T = depth_of(log_ratio(x_T, peak, scale)), _rank_key(x_T, EMPTY)
        inside_T = (depth_T >= first) & (depth_T <= last)
        most_T = tl.maximum(most_T, tl.where(inside_T, key_T, -(2**31)))
        least_T = tl.minimum(least_T, tl.where(inside_T, key_T, 2**31 - 1))
    top = tl.max(most_T, 0).to(tl.int64)
    span = top - tl.min(least_T, 0) + 1
    width = tl.full((), 1, tl.int64)
    while width < span:
        width *= WAYS
    way_W = tl.arange(0, WAYS)
    fall, above, above_mass = tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    while width > 1:
        width = width // WAYS
        end_W = fall + (way_W + 1) * width
        upto_TW, upto_mass_TW = tl.zeros((LIST, WAYS), tl.int32), tl.zeros((LIST, WAYS), tl.int64)
        for start in range(0, length, LIST):
            x_T, _ = _listed(x_ptr, token_ptr, gathered, start + tl.arange(0, LIST), length)
            log_T = log_ratio(x_T, peak, scale)
            depth_T, weight_T = depth_of(log_T), whole(tl.exp2(log_T))
            fall_T = top - _rank_key(x_T, EMPTY).to(tl.int64)
            fall_T = tl.where((depth_T >= first) & (depth_T <= last), fall_T, 1 << 40)
            inside_TW = fall_T[:, None] < end_W[None, :]
            upto_TW += inside_TW.to(tl.int32)
            upto_mass_TW += tl.where(inside_TW, weight_T[:, None], 0)
        upto_W, upto_mass_W = tl.sum(upto_TW, 0).to(tl.int64), tl.sum(upto_mass_TW, 0)
        passed_W = (upto_mass_W if BY_MASS else upto_W) > goal
        way = tl.minimum(WAYS - tl.sum(passed_W.to(tl.int32), 0), WAYS - 1)
        if way > 0:
            before_W = way_W == way - 1
            above = tl.sum(tl.where(before_W, upto_W, 0), 0)
            above_mass = tl.sum(tl.where(before_W, upto_mass_W, 0), 0)
        fall += way * width
    return top - fall, above, above_mass


@triton.jit
def _nth_token(x_ptr, token_ptr, gathered, length, key, nth, vocabulary, EMPTY: tl.constexpr, LIST: tl.constexpr):
    """The nth number, from 0, among the tokens of the logits of a key."""
    width = tl.full((), 1, tl.int32)
    while width < vocabulary:
        width *= TOKEN_WAYS
    way_W = tl.arange(0, TOKEN_WAYS)
    token = tl.zeros((), tl.int32)
    while width > 1:
        # A row itself is in the order of its tokens, so that only the part in question is read again.
        begin, end = tl.where(gathered, 0, token), tl.where(gathered, length, tl.minimum(token + width, length))
        width = width // TOKEN_WAYS
        end_W = token + (way_W + 1) * width
        upto_TW = tl.zeros((LIST, TOKEN_WAYS), tl.int32)
        for start in range(begin, end, LIST):
            at_T = start + tl.arange(0, LIST)
            x_T, token_T = _listed(x_ptr, token_ptr, gathered, at_T, length)
            equal_T = (_rank_key(x_T, EMPTY) == key) & (at_T < length) & (token_T >= token)
            upto_TW += (equal_T[:, None] & (token_T[:, None] < end_W[None, :])).to(tl.int32)
        upto_W = tl.sum(upto_TW, 0)
        way = tl.sum((upto_W <= nth).to(tl.int32), 0)
        nth -= tl.sum(tl.where(way_W == way - 1, upto_W, 0), 0)
        token += way * width
    return tl.minimum(token, vocabulary - 1)


@triton.jit(do_not_specialize=["chunks", "parts"])
def choose_kernel(
    out_ptr,
    token_ptr,
    above_ptr,
    state_ptr,
    peak_ptr,
    x_ptr,
    temperature_ptr,
    top_p_ptr,
    uniform_ptr,
    row_stride,
    vocabulary,
    chunks,
    parts,
    EMPTY: tl.constexpr,
    GATHERED: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    LIST: tl.constexpr,
    WAYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * row_stride
    if EARLY:
        gdc_wait()
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    peak_C = load_peaks(peak_ptr + row * chunks, chunks, CHUNK_BLOCK)
    if temperature > 0:
        top_p, uniform = tl.load(top_p_ptr + row).to(tl.float64), tl.load(uniform_ptr + row).to(tl.float64)
        state_ptr += row * STATE
        near, kept, total = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
        first, last = tl.load(state_ptr + 3).to(tl.int32), tl.load(state_ptr + 4).to(tl.int32)
        first_cut, last_cut = tl.load(state_ptr + 5).to(tl.int32), tl.load(state_ptr + 6).to(tl.int32)
        part_P = tl.arange(0, PART_BLOCK)
        above_ptr += row * parts * 2
        band_mass = tl.sum(tl.load(above_ptr + part_P * 2, part_P < parts, 0), 0)
        cut_mass = tl.sum(tl.load(above_ptr + part_P * 2 + 1, part_P < parts, 0), 0)
        # Too many to be gathered, or none for want of numbers: the list is the row itself.
        gathered = (near > 0) & (near <= GATHERED)
        length = tl.where(gathered, near, vocabulary).to(tl.int32)
        token_ptr += row.to(tl.int64) * GATHERED
        peak, scale = tl.max(peak_C, 0), scale_of(temperature)

        if kept > 0:
            key, above, above_mass = _search(
                x_ptr, token_ptr, gathered, length, peak, scale, first, last, kept - 1, False, EMPTY, LIST, WAYS
            )
            total = above_mass + (kept - above) * _weight_of(key, peak, scale, EMPTY)
        enough = enough_of(top_p, total)
        mass = total
        if enough < total:
            # What top_p keeps ends with the first cumulative weight that is enough, and weighs as much.
            goal = tl.maximum(enough - 1, 0) - cut_mass
            key, above, above_mass = _search(
                x_ptr, token_ptr, gathered, length, peak, scale, first_cut, last_cut, goal, True, EMPTY, LIST, WAYS
            )
            weight = _weight_of(key, peak, scale, EMPTY)
            mass = cut_mass + above_mass + ((goal - above_mass) // tl.maximum(weight, 1) + 1) * weight
        goal = target_of(uniform, mass) - band_mass
        key, above, above_mass = _search(
            x_ptr, token_ptr, gathered, length, peak, scale, first, last, goal, True, EMPTY, LIST, WAYS
        )
        # Of equal logits, which one.
        nth = ((goal - above_mass) // tl.maximum(_weight_of(key, peak, scale, EMPTY), 1)).to(tl.int32)
        token = _nth_token(x_ptr, token_ptr, gathered, length, key, nth, vocabulary, EMPTY, LIST)
        tl.store(out_ptr + row, token.to(tl.int64))
    else:
        tl.store(out_ptr + row, first_of_peak(x_ptr, peak_C, vocabulary, chunks, CHUNK_BLOCK, TILES, TILE))
