"""The survey of the ranked draw: how many of a row's logits lie how deep, and between which depths the draw falls.

The depth of a logit is −log₂ of its weight over the greatest. A program counts the depths of its part of a row in
shared memory and adds the counts to the row's. A second launch bounds the cumulative weight at each depth by them, and
writes down two bands of depths: where top_p cuts, and where the draw falls.
Legend: B rows  V vocabulary  C chunks  P parts of a row  T tokens of a tile  S sums in a thread  K depths counted
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.ops.kernels.sampling import ONE, load_logits, load_peaks, log_ratio, scale_of, whole

DEPTHS = tl.constexpr(2048)  # counted; what is deeper weighs nothing
# Depths of 1/128 of a power of 2, the first 8 powers; then of 1/32, the next 32.
FINE, COARSE, FINE_POWERS = tl.constexpr(128), tl.constexpr(32), tl.constexpr(8)
COARSE_FROM = tl.constexpr(FINE_POWERS.value * (FINE.value - COARSE.value))
# A weight of 2⁻⁴⁰ is the last that is 1; more than rounding adds to it.
DEEPEST = tl.constexpr(40.5)
# Above what rounding adds to a weight, or moves a depth's edge.
SLACK = tl.constexpr(1.0 + 2.0**-14)
# Words of a row's state: tokens in the bands; tokens that top_k keeps, or 0 where its limit says nothing; whole weight;
# the draw's band, first and last depth; top_p's band; tokens gathered.
STATE = tl.constexpr(8)


@triton.jit
def depth_of(log_T):
    """Which depth a token belongs to, rising as logits fall; DEPTHS for one that weighs nothing, or is no number."""
    fall_T = -log_T
    # Rounded once, said so, for several kernels have to agree on a token's depth.
    depth_T = tl.minimum(fall_T * FINE, tl.fma(fall_T, COARSE * 1.0, COARSE_FROM * 1.0))
    counted_T = fall_T < DEEPEST
    return tl.where(counted_T, tl.minimum(tl.where(counted_T, depth_T, 0.0).to(tl.int32), DEPTHS - 1), DEPTHS)


@triton.jit
def target_of(uniform, mass):
    return (uniform * mass.to(tl.float64)).to(tl.int64)


@triton.jit
def enough_of(top_p, total):
    """⌈top_p · total⌉, and no more than the total."""
    product = top_p * total.to(tl.float64)
    below = product.to(tl.int64)
    return tl.minimum(below + (below.to(tl.float64) < product).to(tl.int64), total)


# Triton has no atomics on shared memory, which here are most of the work: a few words of PTX do. The counts are a
# variable of the kernel's, known to others by its address.
@triton.jit
def _cleared_counts():
    """Address of zeros [K] in shared memory."""
    address = tl.inline_asm_elementwise(
        "{ .shared .align 16 .b8 counts[8192]; mov.u32 $0, counts; }",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    at_K = address + 4 * tl.arange(0, DEPTHS)
    tl.inline_asm_elementwise(
        "st.shared.u32 [$1], 0; mov.u32 $0, 0;", "=r,r", [at_K], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()
    return address


@triton.jit
def _count_depths(address, depth_T):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.s32 p, $1, 2048; @p red.shared.add.u32 [$2], 1; mov.u32 $0, 0; }",
        "=r,r,r",
        [depth_T, address + 4 * depth_T],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _counts_at(address):
    tl.debug_barrier()
    at_K = address + 4 * tl.arange(0, DEPTHS)
    return tl.inline_asm_elementwise("ld.shared.u32 $0, [$1];", "=r,r", [at_K], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _bands(count_K, all_mass, likely_mass, likely, top_k, top_p, uniform):
    """(tokens kept or 0, whole weight, the draw's band, top_p's band) given a row's counts and sums."""
    depth_K = tl.arange(0, DEPTHS)
    kept = tl.maximum(tl.where(top_k > 0, tl.minimum(top_k, likely), likely), 1)
    total = tl.where(kept == likely, likely_mass, all_mass)
    counted_K = tl.cumsum(count_K, 0)
    limited = (kept != likely) & (kept < tl.sum(count_K, 0))

    # Weights of a depth lie between those of its edges; those of all depths to this one between such sums from above,
    # and from below.
    above_K = tl.where(depth_K < FINE * FINE_POWERS, depth_K * (1.0 / FINE), (depth_K - COARSE_FROM) * (1.0 / COARSE))
    width_K = tl.where(depth_K < FINE * FINE_POWERS, 1.0 / FINE, 1.0 / COARSE)
    most_K = (tl.exp2(-above_K) * (ONE * SLACK)).to(tl.int64) + 1
    least_K = tl.maximum((tl.exp2(-above_K - width_K) * (ONE / SLACK)).to(tl.int64) - 1, 0)
    least_K = tl.where(depth_K == DEPTHS - 1, 0, least_K) * count_K
    upto_most_K, upto_least_K = tl.cumsum(most_K * count_K, 0), tl.cumsum(least_K, 0)
    beyond_most_K = tl.sum(most_K * count_K, 0) - upto_most_K
    beyond_least_K = tl.sum(least_K, 0) - upto_least_K
    high_K = tl.minimum(upto_most_K, all_mass - beyond_least_K)
    low_K = tl.maximum(upto_least_K, all_mass - beyond_most_K)

    enough = enough_of(top_p, total)
    cuts = enough < total
    goal = tl.maximum(enough - 1, 0)
    first_cut = tl.minimum(tl.sum((high_K <= goal).to(tl.int32), 0), DEPTHS - 1)
    last_cut = tl.minimum(tl.sum((low_K <= goal).to(tl.int32), 0), DEPTHS - 1)
    # What top_p keeps ends with the first cumulative weight above the goal, by one token's weight at most.
    beyond = goal + tl.sum(tl.where(depth_K == first_cut, most_K, 0), 0)
    least_mass = tl.where(cuts, goal + 1, total)
    most_mass = tl.where(cuts, tl.minimum(beyond, total), total)
    last_cut = tl.where(cuts, last_cut, DEPTHS - 1)
    first = tl.sum((high_K <= target_of(uniform, least_mass)).to(tl.int32), 0)
    last = tl.minimum(tl.sum((low_K <= target_of(uniform, most_mass)).to(tl.int32), 0), last_cut)
    # Without a cut its band is empty.
    first_cut = tl.where(cuts, first_cut, DEPTHS)

    # Where top_k counts, its last token is to be found first: among all from the likeliest on.
    reach = tl.sum((counted_K < kept).to(tl.int32), 0)
    first, last = tl.where(limited, 0, tl.minimum(first, last)), tl.where(limited, reach, last)
    first_cut, last_cut = tl.where(limited, 0, first_cut), tl.where(limited, reach, last_cut)
    return tl.where(limited, kept, 0), total, first, last, first_cut, last_cut


@triton.jit(do_not_specialize=["chunks", "tiles"])
def survey_kernel(
    count_ptr,
    mass_ptr,
    likely_ptr,
    peak_ptr,
    x_ptr,
    temperature_ptr,
    min_p_ptr,
    row_stride,
    vocabulary,
    chunks,
    tiles,
    CHUNK_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EARLY: tl.constexpr,
):
    # From the last row to the first: the logits that the launch before read last are the ones that L2 still holds.
    part, parts, row = tl.program_id(0), tl.num_programs(0), tl.num_programs(1) - 1 - tl.program_id(1)
    if not INTERPRETED:
        address = _cleared_counts()
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x_ptr += row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    if temperature > 0:
        peak = tl.max(load_peaks(peak_ptr + row * chunks, chunks, CHUNK_BLOCK), 0)
        scale = scale_of(temperature)
        SUMS: tl.constexpr = TILE // VECTOR
        mass_S, likely_mass_S = tl.zeros((SUMS,), tl.int64), tl.zeros((SUMS,), tl.int64)
        likely_S = tl.zeros((SUMS,), tl.int32)
        count_K = tl.zeros((DEPTHS,), tl.int32)
        for tile in range(tiles):
            at_T = (part * tiles + tile) * TILE + tl.arange(0, TILE)
            log_T = log_ratio(load_logits(x_ptr, at_T, vocabulary), peak, scale)
            depth_T, ratio_T = depth_of(log_T), tl.exp2(log_T)
            if INTERPRETED:
                count_K += tl.histogram(tl.minimum(depth_T, DEPTHS - 1), DEPTHS, depth_T < DEPTHS)
            else:
                _count_depths(address, depth_T)
            weight_T, is_likely_T = whole(ratio_T), (ratio_T >= min_p) & (at_T < vocabulary)
            mass_S += tl.sum(weight_T.reshape(SUMS, VECTOR), 1)
            likely_mass_S += tl.sum(tl.where(is_likely_T, weight_T, 0).reshape(SUMS, VECTOR), 1)
            likely_S += tl.sum(is_likely_T.to(tl.int32).reshape(SUMS, VECTOR), 1)
        if not INTERPRETED:
            count_K = _counts_at(address)
        depth_K = tl.arange(0, DEPTHS)
        count_ptr += row.to(tl.int64) * DEPTHS
        tl.atomic_add(count_ptr + depth_K, count_K, count_K > 0, sem="relaxed")
        mass_ptr += row * parts * 2
        likely_ptr += row * parts
        tl.store(mass_ptr + part * 2, tl.sum(mass_S, 0))
        tl.store(mass_ptr + part * 2 + 1, tl.sum(likely_mass_S, 0))
        tl.store(likely_ptr + part, tl.sum(likely_S, 0))


@triton.jit(do_not_specialize=["parts"])
def bands_kernel(
    state_ptr,
    count_ptr,
    mass_ptr,
    likely_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    parts,
    PART_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if tl.load(temperature_ptr + row) > 0:
        part_P, depth_K = tl.arange(0, PART_BLOCK), tl.arange(0, DEPTHS)
        mass_ptr += row * parts * 2
        count_K = tl.load(count_ptr + row.to(tl.int64) * DEPTHS + depth_K)
        kept, total, first, last, first_cut, last_cut = _bands(
            count_K,
            tl.sum(tl.load(mass_ptr + part_P * 2, part_P < parts, 0), 0),
            tl.sum(tl.load(mass_ptr + part_P * 2 + 1, part_P < parts, 0), 0),
            tl.sum(tl.load(likely_ptr + row * parts + part_P, part_P < parts, 0), 0),
            tl.load(top_k_ptr + row).to(tl.int64),
            tl.load(top_p_ptr + row).to(tl.float64),
            tl.load(uniform_ptr + row).to(tl.float64),
        )
        inside_K = ((depth_K >= first) & (depth_K <= last)) | ((depth_K >= first_cut) & (depth_K <= last_cut))
        state_ptr += row * STATE
        tl.store(state_ptr, tl.sum(tl.where(inside_K, count_K, 0), 0).to(tl.int64))
        tl.store(state_ptr + 1, kept.to(tl.int64))
        tl.store(state_ptr + 2, total)
        tl.store(state_ptr + 3, first.to(tl.int64))
        tl.store(state_ptr + 4, last.to(tl.int64))
        tl.store(state_ptr + 5, first_cut.to(tl.int64))
        tl.store(state_ptr + 6, last_cut.to(tl.int64))
        tl.store(state_ptr + 7, tl.zeros((), tl.int64))
