"""The search of the ranked draw: which of a list of logits, taken from likely to unlikely, a draw falls on.

By bisecting logits several ways at a time: for the last rank that top_k and min_p keep, the last that top_p keeps, and
the one that the draw falls on. Equal logits weigh the same, so that which of them is meant is a division.
Legend: B rows  V vocabulary  C chunks  T logits of a tile  W ways of a bisection
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from rooflight.ops.kernels.sampling import first_of_peak, load_logits, load_peaks, log_ratio, scale_of, whole

STATE = tl.constexpr(3)  # what the search wants to know of a row: tokens gathered, tokens kept, whole weight


@triton.jit
def target_of(uniform, mass):
    return (uniform * mass.to(tl.float64)).to(tl.int64)


@triton.jit
def enough_of(top_p, total):
    """⌈top_p · total⌉, and no more than the total."""
    product = top_p * total.to(tl.float64)
    below = product.to(tl.int64)
    return tl.minimum(below + (below.to(tl.float64) < product).to(tl.int64), total)


@triton.jit
def _rank_key(x, EMPTY: tl.constexpr):
    """A whole number that rises with the logit and is equal where logits are; −0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY


@triton.jit
def _logit_of(key, EMPTY: tl.constexpr):
    bits = key << EMPTY
    # Of negative logits the empty bits were turned too.
    bits = tl.where(bits < 0, (bits ^ 0x7FFFFFFF) >> EMPTY << EMPTY, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _search(
    x_ptr, length, peak, scale, top, width, goal, BY_MASS: tl.constexpr, EMPTY: tl.constexpr, LIST: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """(depth, tokens above it, their weight) of the first logit, from above, at which tokens or weight pass the goal.

    Depths count the keys from the greatest, `top`, down; width: a power of WAYS beyond them.
    """
    way_W = tl.arange(0, WAYS)
    depth, above, above_mass = tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    while width > 1:
        width = width // WAYS
        end_W = depth + (way_W + 1) * width
        upto_TW, upto_mass_TW = tl.zeros((LIST, WAYS), tl.int32), tl.zeros((LIST, WAYS), tl.int64)
        for start in range(0, length, LIST):
            at_T = start + tl.arange(0, LIST)
            x_T = load_logits(x_ptr, at_T, length)
            depth_T = tl.where(at_T < length, top - _rank_key(x_T, EMPTY).to(tl.int64), 1 << 40)
            weight_T = whole(tl.exp2(log_ratio(x_T, peak, scale)))
            inside_TW = depth_T[:, None] < end_W[None, :]
            upto_TW += inside_TW.to(tl.int32)
            upto_mass_TW += tl.where(inside_TW, weight_T[:, None], 0)
        upto_W, upto_mass_W = tl.sum(upto_TW, 0).to(tl.int64), tl.sum(upto_mass_TW, 0)
        passed_W = (upto_mass_W if BY_MASS else upto_W) > goal
        way = tl.minimum(WAYS - tl.sum(passed_W.to(tl.int32), 0), WAYS - 1)
        if way > 0:
            before_W = way_W == way - 1
            above = tl.sum(tl.where(before_W, upto_W, 0), 0)
            above_mass = tl.sum(tl.where(before_W, upto_mass_W, 0), 0)
        depth += way * width
    return depth, above, above_mass


@triton.jit
def _choose(
    x_ptr, length, peak, scale, kept, total, top_p, uniform, vocabulary, EMPTY: tl.constexpr, LIST: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """Position of the token that the draw falls on in a list of logits, which holds the likeliest by token number."""
    top = _rank_key(peak, EMPTY).to(tl.int64)
    least_T = tl.full((LIST,), float("inf"), tl.float32)
    for start in range(0, length, LIST):
        at_T = start + tl.arange(0, LIST)
        x_T = tl.load(x_ptr + at_T, at_T < length, float("inf")).to(tl.float32)
        least_T = tl.minimum(least_T, x_T)
    span = top - _rank_key(tl.min(least_T, 0), EMPTY).to(tl.int64) + 1
    width = tl.full((), 1, tl.int64)
    while width < span:
        width *= WAYS
    if kept < vocabulary:
        depth, above, above_mass = _search(x_ptr, length, peak, scale, top, width, kept - 1, False, EMPTY, LIST, WAYS)
        weight = whole(tl.exp2(log_ratio(_logit_of((top - depth).to(tl.int32), EMPTY), peak, scale)))
        total = above_mass + (kept - above) * weight
    enough = enough_of(top_p, total)
    mass = total
    if enough < total:
        # What top_p keeps ends with the first cumulative weight that is enough, and weighs as much.
        goal = tl.maximum(enough - 1, 0)
        depth, above, above_mass = _search(x_ptr, length, peak, scale, top, width, goal, True, EMPTY, LIST, WAYS)
        weight = whole(tl.exp2(log_ratio(_logit_of((top - depth).to(tl.int32), EMPTY), peak, scale)))
        mass = above_mass + ((goal - above_mass) // tl.maximum(weight, 1) + 1) * weight
    goal = target_of(uniform, mass)
    depth, above, above_mass = _search(x_ptr, length, peak, scale, top, width, goal, True, EMPTY, LIST, WAYS)
    key = (top - depth).to(tl.int32)
    weight = whole(tl.exp2(log_ratio(_logit_of(key, EMPTY), peak, scale)))
    # Of equal logits, which one.
    which = (goal - above_mass) // tl.maximum(weight, 1)
    position, seen = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
    for start in range(0, length, LIST):
        at_T = start + tl.arange(0, LIST)
        equal_T = (_rank_key(load_logits(x_ptr, at_T, length), EMPTY) == key) & (at_T < length)
        before_T = seen + tl.cumsum(equal_T.to(tl.int32), 0) - 1
        position += tl.sum(tl.where(equal_T & (before_T == which), at_T, 0), 0)
        seen += tl.sum(equal_T.to(tl.int32), 0)
    return position


@triton.jit(do_not_specialize=["chunks"])
def choose_kernel(
    out_ptr,
    near_ptr,
    token_ptr,
    state_ptr,
    peak_ptr,
    x_ptr,
    temperature_ptr,
    top_p_ptr,
    uniform_ptr,
    row_stride,
    vocabulary,
    chunks,
    EMPTY: tl.constexpr,
    GATHERED: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    LIST: tl.constexpr,
    WAYS: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    peak_C = load_peaks(peak_ptr + row * chunks, chunks, CHUNK_BLOCK)
    if temperature > 0:
        top_p, uniform = tl.load(top_p_ptr + row).to(tl.float64), tl.load(uniform_ptr + row).to(tl.float64)
        near = tl.load(state_ptr + row * STATE)
        kept, total = tl.load(state_ptr + row * STATE + 1), tl.load(state_ptr + row * STATE + 2)
        # Too many to be gathered, or none for want of numbers: the list is the row itself.
        gathered = (near > 0) & (near <= GATHERED)
        length = tl.where(gathered, near, vocabulary).to(tl.int32)
        list_ptr = x_ptr
        if gathered:
            list_ptr = near_ptr + row.to(tl.int64) * GATHERED
        peak, scale = tl.max(peak_C, 0), scale_of(temperature)
        token = _choose(list_ptr, length, peak, scale, kept, total, top_p, uniform, vocabulary, EMPTY, LIST, WAYS)
        if gathered:
            token = tl.load(token_ptr + row.to(tl.int64) * GATHERED + token)
        tl.store(out_ptr + row, token)
    else:
        tl.store(out_ptr + row, first_of_peak(x_ptr, peak_C, vocabulary, chunks, CHUNK_BLOCK, TILES, TILE))
