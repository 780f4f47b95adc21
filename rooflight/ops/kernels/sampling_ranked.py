"""Kernels that draw from likely to unlikely under top_k, top_p and min_p, without sorting.

The first launch leaves each chunk's greatest logit; the second counts how deep below it logits lie, and the third finds
the bands of depths where top_p cuts and where the draw falls (`sampling_survey`). The fourth gathers the tokens of the
bands, a few of the vocabulary as a rule, and sums up the weights above them. The fifth searches in the bands
(`sampling_search`).
Sums are of whole numbers: a draw is the reference's bit for bit.
Legend: B rows  V vocabulary  P parts of a row  T tokens of a tile  S sums in a thread  K depths  G gathered
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.ops.kernels import ceil_div, early_launch, power_of_2, processors
from rooflight.ops.kernels.sampling import (
    TILE,
    by_rows,
    load_logits,
    load_peaks,
    log_ratio,
    peaks,
    scale_of,
    tiles_of,
    whole,
)
from rooflight.ops.kernels.sampling_search import choose_kernel
from rooflight.ops.kernels.sampling_survey import DEPTHS, STATE, bands_kernel, depth_of, survey_kernel

# Tokens of a tile that the programs of the second and fourth launch read at once, their warps, and how many of them a
# multiprocessor is given.
PART_TILE, PART_WARPS, PARTS = 2048, 8, 4
BAND_WARPS = 8
# Tokens; where bands hold more, the search is over the whole row. A quarter of a vocabulary, for logits that are whole
# numbers, or all nearly the same, are that many to a band.
GATHERED = 32768
WAYS = 8
# A search's tile of a list, each with all ways, and its warps: more where programs are fewer than multiprocessors.
FEW_ROWS, MANY_ROWS = (1024, 8), (512, 4)
# Bits of a widened logit that say nothing: those that its own type lacks.
EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit(do_not_specialize=["chunks", "tiles"])
def _gather_kernel(
    token_ptr,
    above_ptr,
    state_ptr,
    peak_ptr,
    x_ptr,
    temperature_ptr,
    row_stride,
    vocabulary,
    chunks,
    tiles,
    GATHERED: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    part, parts, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0:
        state_ptr += row * STATE
        near = tl.load(state_ptr)
        first, last = tl.load(state_ptr + 3).to(tl.int32), tl.load(state_ptr + 4).to(tl.int32)
        first_cut, last_cut = tl.load(state_ptr + 5).to(tl.int32), tl.load(state_ptr + 6).to(tl.int32)
        x_ptr += row.to(tl.int64) * row_stride
        token_ptr += row.to(tl.int64) * GATHERED
        peak = tl.max(load_peaks(peak_ptr + row * chunks, chunks, CHUNK_BLOCK), 0)
        scale = scale_of(temperature)
        SUMS: tl.constexpr = TILE // VECTOR
        above_S, above_cut_S = tl.zeros((SUMS,), tl.int64), tl.zeros((SUMS,), tl.int64)
        for tile in range(tiles):
            at_T = (part * tiles + tile) * TILE + tl.arange(0, TILE)
            log_T = log_ratio(load_logits(x_ptr, at_T, vocabulary), peak, scale)
            depth_T, weight_T = depth_of(log_T), whole(tl.exp2(log_T))
            above_S += tl.sum(tl.where(depth_T < first, weight_T, 0).reshape(SUMS, VECTOR), 1)
            above_cut_S += tl.sum(tl.where(depth_T < first_cut, weight_T, 0).reshape(SUMS, VECTOR), 1)
            inside_T = ((depth_T >= first) & (depth_T <= last)) | ((depth_T >= first_cut) & (depth_T <= last_cut))
            inside = tl.sum(inside_T.to(tl.int32), 0)
            if (inside > 0) & (near <= GATHERED):
                # Parts come in any order, which the search does not mind.
                start = tl.atomic_add(state_ptr + 7, inside.to(tl.int64), sem="relaxed").to(tl.int32)
                to_T = start + tl.cumsum(inside_T.to(tl.int32), 0) - 1
                tl.store(token_ptr + to_T, at_T, inside_T)
        above_ptr += (row * parts + part) * 2
        tl.store(above_ptr, tl.sum(above_S, 0))
        tl.store(above_ptr + 1, tl.sum(above_cut_S, 0))


def _parts(rows: int, vocabulary: int, multiprocessors: int, tile: int, resident: int) -> tuple[int, int]:
    """(parts of a row, tiles of a part) for so many programs a multiprocessor, or more."""
    tiles = ceil_div(ceil_div(vocabulary, tile), ceil_div(resident * multiprocessors, rows))
    return ceil_div(ceil_div(vocabulary, tile), tiles), tiles


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
    most: int = 0,
    part: tuple[int, int, int] | None = None,
    gathered: int = GATHERED,
    search: tuple[int, int] | None = None,
) -> Tensor:
    """`ops.sampling.sample` in five launches, whatever was promised by `most`.

    part (tile, warps, programs a multiprocessor), tokens that may be gathered, (tile, warps) of the search: instead of
    the rules'.
    """
    logits_BV = by_rows(logits_BV)
    (rows, vocabulary), device = logits_BV.shape, logits_BV.device
    multiprocessors, early = processors(device), early_launch(rows)
    tile, warps, resident = part or (PART_TILE, PART_WARPS, PARTS)
    parts, tiles = _parts(rows, vocabulary, multiprocessors, tile, resident)
    list_tile, list_warps = search or (FEW_ROWS if rows <= multiprocessors else MANY_ROWS)
    temperature_B, top_p_B, uniform_B = temperature_B.contiguous(), top_p_B.contiguous(), uniform_B.contiguous()
    chunk_tiles, row_stride = tiles_of(rows, vocabulary, multiprocessors), logits_BV.stride(0)

    count_BK = torch.empty((rows, DEPTHS.value), dtype=torch.int32, device=device)
    peak_BC = peaks(logits_BV, chunk_tiles, zeros_BZ=count_BK, early=early)
    chunks = peak_BC.shape[1]
    likely_BP = torch.empty((rows, parts), dtype=torch.int32, device=device)
    state_B8 = torch.empty((rows, STATE.value), dtype=torch.int64, device=device)
    mass_BP2 = torch.empty((rows, parts, 2), dtype=torch.int64, device=device)
    shape = {"TILE": tile, "VECTOR": 16 // logits_BV.element_size(), "CHUNK_BLOCK": power_of_2(chunks), "EARLY": early}
    survey_kernel[(parts, rows)](
        *(count_BK, mass_BP2, likely_BP, peak_BC, logits_BV, temperature_B, min_p_B.contiguous()),
        *(row_stride, vocabulary, chunks, tiles),
        **shape,
        # Triton's interpreter knows no PTX.
        INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1",
        num_warps=warps,
        launch_pdl=early,
    )
    bands_kernel[(rows,)](
        *(state_B8, count_BK, mass_BP2, likely_BP, temperature_B, top_k_B.contiguous(), top_p_B, uniform_B, parts),
        PART_BLOCK=power_of_2(parts),
        EARLY=early,
        num_warps=BAND_WARPS,
        launch_pdl=early,
    )
    token_BG = torch.empty((rows, gathered), dtype=torch.int32, device=device)
    above_BP2 = torch.empty((rows, parts, 2), dtype=torch.int64, device=device)
    _gather_kernel[(parts, rows)](
        *(token_BG, above_BP2, state_B8, peak_BC, logits_BV, temperature_B),
        *(row_stride, vocabulary, chunks, tiles),
        GATHERED=gathered,
        **shape,
        num_warps=warps,
        launch_pdl=early,
    )
    out_B = torch.empty((rows,), dtype=torch.int64, device=device)
    choose_kernel[(rows,)](
        *(out_B, token_BG, above_BP2, state_B8, peak_BC, logits_BV, temperature_B, top_p_B, uniform_B),
        *(row_stride, vocabulary, chunks, parts),
        EMPTY=EMPTY_BITS[logits_BV.dtype],
        GATHERED=gathered,
        CHUNK_BLOCK=power_of_2(chunks),
        PART_BLOCK=power_of_2(parts),
        TILES=chunk_tiles,
        TILE=TILE,
        LIST=list_tile,
        WAYS=WAYS,
        EARLY=early,
        num_warps=list_warps,
        launch_pdl=early,
    )
    return out_B
