"""What the paged kernels share: a tile of keys and values as it lies in the cache, and its way into a running softmax.

Legend: R rows (query tokens × heads of a group)  N keys of a tile  E head dim
"""

# ruff: noqa: ANN001, ANN201 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Finite, so that a row that sees none of a tile's keys makes no NaN: what it adds is faded out by its first real score.
HIDDEN = tl.constexpr(-1.0e30)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Launch constants: rows and keys of a tile, warps of a program, and stages of its pipeline.

    A tile passes through the pipeline twice, for its blocks' numbers and then for itself: of 5 stages, 2 are tiles.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def precision_of(dtype: torch.dtype) -> str:
    """How products round their operands: fp32 not at all, for the reference does not either."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def cache_rows(
    table_ptr, position_N, inside_N, block_rows, TOKEN_STRIDE: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr
):
    """Offsets at which the keys of these positions lie; block_rows: tokens' rows from one block to the next."""
    if MASKED:
        block_N = tl.load(table_ptr + position_N // PAGE, inside_N, 0)
    else:
        block_N = tl.load(table_ptr + position_N // PAGE)
    # Rows fit into 32 bits, and what they are multiplied by is known: one instruction. Elements may not fit.
    return (block_N.to(tl.int32) * block_rows + position_N % PAGE).to(tl.int64) * TOKEN_STRIDE


@triton.jit
def load_rows(ptr, rows_N, inside_N, HEAD_DIM: tl.constexpr, BLOCK_E: tl.constexpr, MASKED: tl.constexpr):
    """[N, E] from these offsets; zeros outside, where memory may hold anything."""
    channel = tl.arange(0, BLOCK_E)
    at_NE = ptr + rows_N[:, None] + channel[None, :]
    if HEAD_DIM == BLOCK_E:
        x_NE = tl.load(at_NE, inside_N[:, None], 0.0) if MASKED else tl.load(at_NE)
    else:
        mask_NE = (channel < HEAD_DIM)[None, :]
        if MASKED:
            mask_NE = mask_NE & inside_N[:, None]
        x_NE = tl.load(at_NE, mask_NE, 0.0)
    return x_NE


@triton.jit
def absorb(
    out_RE,
    peak_R,
    total_R,
    q_RE,
    k_NE,
    v_NE,
    visible_RN,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running softmax (Milakov & Gimelshein 2018, 1805.02867) with these keys added.

    Peaks are exponents of two; scale is positive.
    """
    scores_RN = tl.dot(q_RE, tl.trans(k_NE.to(q_RE.dtype)), input_precision=PRECISION)
    if CAPPED:
        # tanh(x) = 1 − 2/(exp(2x) + 1): libdevice's does not run in Triton's interpreter.
        scores_RN = softcap - 2.0 * softcap / (tl.exp2(scores_RN * (2.0 * LOG2_E * scale / softcap)) + 1.0)
        factor = LOG2_E
    else:
        factor = scale * LOG2_E
    if MASKED:
        scores_RN = tl.where(visible_RN, scores_RN, HIDDEN)
    higher_R = tl.maximum(peak_R, tl.max(scores_RN, 1) * factor)
    probs_RN = tl.exp2(scores_RN * factor - higher_R[:, None])
    fade_R = tl.exp2(peak_R - higher_R)
    total_R = total_R * fade_R + tl.sum(probs_RN, 1)
    v_NE = v_NE.to(q_RE.dtype)
    out_RE = tl.dot(probs_RN.to(q_RE.dtype), v_NE, out_RE * fade_R[:, None], input_precision=PRECISION)
    return out_RE, higher_R, total_R
