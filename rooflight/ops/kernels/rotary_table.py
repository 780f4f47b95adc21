"""Cosines and sines of a step's rotary positions, in one launch.

Legend: T tokens  C frequencies
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2

PAIRS, WARPS = 1024, 4  # pairs of a program: 8 a thread


@triton.jit(do_not_specialize=["tokens"])
def _table_kernel(
    cos_ptr,
    sin_ptr,
    positions_ptr,
    frequencies_ptr,
    tokens,
    scale,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    frequency = tl.load(frequencies_ptr + channel, channel < CHANNELS, 0.0)
    angle = tl.load(positions_ptr + row, row < tokens, 0).to(tl.float32)[:, None] * frequency[None, :]
    at = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    mask = (row < tokens)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(cos_ptr + at, tl.cos(angle) * scale, mask)
    tl.store(sin_ptr + at, tl.sin(angle) * scale, mask)


def rotary_table(positions_T: Tensor, frequencies_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, times a scale, in fp32: [T, C] each."""
    tokens, channels = positions_T.shape[0], frequencies_C.shape[0]
    cos_TC, sin_TC = (frequencies_C.new_empty((tokens, channels)) for _ in range(2))
    block = power_of_2(channels)
    rows = max(1, PAIRS // block)
    _table_kernel[(ceil_div(tokens, rows),)](
        cos_TC,
        sin_TC,
        positions_T,
        frequencies_C,
        tokens,
        scale,
        CHANNELS=channels,
        BLOCK=block,
        ROWS=rows,
        num_warps=WARPS,
    )
    return cos_TC, sin_TC
