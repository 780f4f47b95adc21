"""Kernels that choose a token by its number: greedily, or plainly drawn; and what the ranked draw shares with them.

A row is cut into chunks, one program each. The first launch leaves each chunk's greatest logit, the second each chunk's
whole weight; the last program of a row to be done looks for the chunk, the tile and the token that the draw falls on.
Weights are whole numbers, so that no order of adding matters: a draw is the reference's bit for bit.
Legend: B rows  V vocabulary  C chunks  R tiles of a chunk  T tokens of a tile
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from rooflight.ops.kernels import ceil_div, counters_of, power_of_2, processors

LOG2_E = tl.constexpr(1.4426950408889634)
ONE = tl.constexpr(2.0**40)
LEAST_TEMPERATURE = tl.constexpr(1e-30)
TILE, WARPS = 1024, 4  # 8 logits a thread: one 16-byte load of bf16
MOST_TILES = 8  # of a chunk, all on their way at once
PROGRAMS = 16  # of a launch on each multiprocessor, beyond which chunks grow
MOST_CHUNKS = 256
COUNTERS = 1 << 16


@triton.jit
def scale_of(temperature):
    """log2(e) / temperature, rounded as the reference rounds it."""
    return tl.div_rn(1.0, tl.maximum(temperature, LEAST_TEMPERATURE)) * LOG2_E


@triton.jit
def log_ratio(x, peak, scale):
    return (x - peak) * scale


@triton.jit
def whole(ratio):
    return (ratio * ONE).to(tl.int64)


@triton.jit
def load_logits(x_ptr, at, vocabulary):
    """fp32; beyond the vocabulary −∞, which weighs nothing."""
    return tl.load(x_ptr + at, at < vocabulary, float("-inf")).to(tl.float32)


@triton.jit
def load_peaks(peak_ptr, chunks, CHUNK_BLOCK: tl.constexpr):
    chunk_C = tl.arange(0, CHUNK_BLOCK)
    return tl.load(peak_ptr + chunk_C, chunk_C < chunks, float("-inf"), cache_modifier=".cg")


@triton.jit
def is_last(counter_ptr, programs):
    """Whether all other programs of the row are done, whose stores this one may read; the count is then 0 again."""
    # Every warp's stores come before the count, which publishes them.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def first_of_peak(
    x_ptr, peak_C, vocabulary, chunks, CHUNK_BLOCK: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):
    """The first token of the greatest logit; some token where there is none."""
    chunk_C = tl.arange(0, CHUNK_BLOCK)
    peak = tl.max(peak_C, 0)
    chunk = tl.minimum(tl.min(tl.where(peak_C == peak, chunk_C, CHUNK_BLOCK), 0), chunks - 1)
    token = vocabulary - 1
    for tile in tl.static_range(TILES):
        at_T = (chunk * TILES + tile) * TILE + tl.arange(0, TILE)
        x_T = load_logits(x_ptr, at_T, vocabulary)
        token = tl.minimum(token, tl.min(tl.where(x_T == peak, at_T, vocabulary), 0))
    return token


@triton.jit(do_not_specialize=["chunks"])
def _peak_kernel(
    out_ptr,
    peak_ptr,
    counter_ptr,
    zeros_ptr,
    x_ptr,
    row_stride,
    vocabulary,
    chunks,
    GREEDY: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    ZEROS: tl.constexpr,
    SHARE: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1)
    x_ptr += row.to(tl.int64) * row_stride
    peak_ptr += row * chunks
    if ZEROS > 0:
        # A launch that adds to a row's words finds zeros, each chunk's program having written its share.
        at_Z = chunk * SHARE + tl.arange(0, SHARE)
        tl.store(zeros_ptr + row.to(tl.int64) * ZEROS + at_Z, 0, at_Z < ZEROS)
    peak_T = tl.full((TILE,), float("-inf"), tl.float32)
    for tile in tl.static_range(TILES):
        at_T = (chunk * TILES + tile) * TILE + tl.arange(0, TILE)
        peak_T = tl.maximum(peak_T, load_logits(x_ptr, at_T, vocabulary))
    tl.store(peak_ptr + chunk, tl.max(peak_T, 0))
    if GREEDY and is_last(counter_ptr + row, chunks):
        peak_C = load_peaks(peak_ptr, chunks, CHUNK_BLOCK)
        tl.store(out_ptr + row, first_of_peak(x_ptr, peak_C, vocabulary, chunks, CHUNK_BLOCK, TILES, TILE))


@triton.jit
def _token_at(
    x_ptr,
    mass_ptr,
    peak,
    scale,
    uniform,
    vocabulary,
    chunks,
    CHUNK_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first token whose cumulative weight is above ⌊uniform · total⌋: its chunk, its tile, then itself."""
    chunk_C = tl.arange(0, CHUNK_BLOCK)
    mass_C = tl.load(mass_ptr + chunk_C, chunk_C < chunks, 0, cache_modifier=".cg")
    upto_C = tl.cumsum(mass_C, 0)
    target = (uniform * tl.sum(mass_C, 0).to(tl.float64)).to(tl.int64)
    chunk = tl.minimum(tl.sum((upto_C <= target).to(tl.int32), 0), chunks - 1)
    target -= tl.sum(tl.where(chunk_C < chunk, mass_C, 0), 0)
    start = chunk * (TILES * TILE)
    if TILES > 1:
        tile_R = tl.arange(0, TILES)
        at_RT = start + tile_R[:, None] * TILE + tl.arange(0, TILE)[None, :]
        weight_RT = whole(tl.exp2(log_ratio(load_logits(x_ptr, at_RT, vocabulary), peak, scale)))
        mass_R = tl.sum(weight_RT, 1)
        tile = tl.minimum(tl.sum((tl.cumsum(mass_R, 0) <= target).to(tl.int32), 0), TILES - 1)
        target -= tl.sum(tl.where(tile_R < tile, mass_R, 0), 0)
        start += tile * TILE
    x_T = load_logits(x_ptr, start + tl.arange(0, TILE), vocabulary)
    upto_T = tl.cumsum(whole(tl.exp2(log_ratio(x_T, peak, scale))), 0)
    return tl.minimum(start + tl.sum((upto_T <= target).to(tl.int32), 0), vocabulary - 1)


@triton.jit(do_not_specialize=["chunks"])
def _draw_kernel(
    out_ptr,
    peak_ptr,
    mass_ptr,
    counter_ptr,
    x_ptr,
    temperature_ptr,
    uniform_ptr,
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
    mass_ptr += row * chunks
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    uniform = tl.load(uniform_ptr + row).to(tl.float64)
    peak_C = load_peaks(peak_ptr + row * chunks, chunks, CHUNK_BLOCK)
    peak, scale = tl.max(peak_C, 0), scale_of(temperature)
    if temperature > 0:
        mass_T = tl.zeros((TILE,), tl.int64)
        for tile in tl.static_range(TILES):
            at_T = (chunk * TILES + tile) * TILE + tl.arange(0, TILE)
            mass_T += whole(tl.exp2(log_ratio(load_logits(x_ptr, at_T, vocabulary), peak, scale)))
        tl.store(mass_ptr + chunk, tl.sum(mass_T, 0))
        if is_last(counter_ptr + row, chunks):
            token = _token_at(x_ptr, mass_ptr, peak, scale, uniform, vocabulary, chunks, CHUNK_BLOCK, TILES, TILE)
            tl.store(out_ptr + row, token)
    elif chunk == 0:
        tl.store(out_ptr + row, first_of_peak(x_ptr, peak_C, vocabulary, chunks, CHUNK_BLOCK, TILES, TILE))


def tiles_of(rows: int, vocabulary: int, multiprocessors: int) -> int:
    """Tiles of a chunk: as few as keep the machine busy with small programs, and chunks few enough to be summed up."""
    tiles = 1
    while (tiles < MOST_TILES and rows * ceil_div(vocabulary, tiles * TILE) > PROGRAMS * multiprocessors) or (
        ceil_div(vocabulary, tiles * TILE) > MOST_CHUNKS
    ):
        tiles *= 2
    return tiles


def by_rows(x_BV: Tensor) -> Tensor:
    """The logits with contiguous rows, which may lie apart from one another, or all be the same."""
    return x_BV if x_BV.stride(1) == 1 or x_BV.shape[1] == 1 else x_BV.contiguous()


def peaks(
    logits_BV: Tensor,
    tiles: int,
    out_B: Tensor | None = None,
    zeros_BZ: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """Greatest logit [B, C] of each chunk of so many tiles; with out_B also its first token's number.

    zeros_BZ: words that are made zeros. early: the launch that follows waits for this one by itself.
    """
    rows, vocabulary = logits_BV.shape
    chunks = ceil_div(vocabulary, tiles * TILE)
    peak_BC = torch.empty((rows, chunks), dtype=torch.float32, device=logits_BV.device)
    zeros = 0 if zeros_BZ is None else zeros_BZ.shape[1]
    _peak_kernel[(chunks, rows)](
        out_B,
        peak_BC,
        None if out_B is None else counters_of(logits_BV.device, "draw", COUNTERS),
        zeros_BZ,
        logits_BV,
        logits_BV.stride(0),
        vocabulary,
        chunks,
        GREEDY=out_B is not None,
        CHUNK_BLOCK=power_of_2(chunks),
        TILES=tiles,
        TILE=TILE,
        ZEROS=zeros,
        SHARE=power_of_2(max(1, ceil_div(zeros, chunks))),
        EARLY=early,
        num_warps=WARPS,
    )
    return peak_BC


def greedy(logits_BV: Tensor, tiles: int = 0) -> Tensor:
    """The first of each row's greatest logits, in one launch. tiles: instead of the rule's."""
    logits_BV = by_rows(logits_BV)
    out_B = torch.empty((logits_BV.shape[0],), dtype=torch.int64, device=logits_BV.device)
    peaks(logits_BV, tiles or tiles_of(*logits_BV.shape, processors(logits_BV.device)), out_B)
    return out_B


def sample_plain(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor, tiles: int = 0) -> Tensor:
    """`ops.sampling.sample_plain` in two launches that read the logits once each. tiles: instead of the rule's."""
    logits_BV = by_rows(logits_BV)
    rows, vocabulary = logits_BV.shape
    tiles = tiles or tiles_of(rows, vocabulary, processors(logits_BV.device))
    peak_BC = peaks(logits_BV, tiles)
    chunks = peak_BC.shape[1]
    out_B = torch.empty((rows,), dtype=torch.int64, device=logits_BV.device)
    _draw_kernel[(chunks, rows)](
        out_B,
        peak_BC,
        torch.empty((rows, chunks), dtype=torch.int64, device=logits_BV.device),
        counters_of(logits_BV.device, "draw", COUNTERS),
        logits_BV,
        temperature_B.contiguous(),
        uniform_B.contiguous(),
        logits_BV.stride(0),
        vocabulary,
        chunks,
        CHUNK_BLOCK=power_of_2(chunks),
        TILES=tiles,
        TILE=TILE,
        num_warps=WARPS,
    )
    return out_B
