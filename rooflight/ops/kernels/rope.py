"""Rotary kernel: turns queries and keys, or their gradients back, in one launch.

A program takes some (token, head) rows, of q or of k; a row is read and written once, from where it lies in fused QKV.
Legend: T tokens  H query heads  K key heads  E head dim  C frequencies
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2

PAIRS, WARPS = 1024, 4  # pairs of a program: 8 a thread, two 16-byte loads of bf16


@triton.jit
def _turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tile,
    tokens,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    inside = (token < tokens)[:, None]
    head = (row - token * HEADS).to(tl.int64)
    token = token.to(tl.int64)
    x_row_ptr = x_ptr + (token * token_stride + head * head_stride)[:, None]
    out_row_ptr = out_ptr + (row.to(tl.int64) * HEAD_DIM)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = inside & (channel < CHANNELS)
    cos = tl.load(cos_ptr + token[:, None] * CHANNELS + channel, mask, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token[:, None] * CHANNELS + channel, mask, 0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        run = tl.arange(0, 2 * BLOCK)[None, :]
        run_mask = inside & (run < 2 * CHANNELS)
        a, b = tl.split(tl.reshape(tl.load(x_row_ptr + run, run_mask, 0.0), (ROWS, BLOCK, 2)))
    else:
        a = tl.load(x_row_ptr + channel, mask, 0.0)
        b = tl.load(x_row_ptr + CHANNELS + channel, mask, 0.0)
    a, b = a.to(tl.float32), b.to(tl.float32)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if INTERLEAVED:
        tl.store(out_row_ptr + run, tl.reshape(tl.join(turned_a, turned_b), (ROWS, 2 * BLOCK)), run_mask)
    else:
        tl.store(out_row_ptr + channel, turned_a, mask)
        tl.store(out_row_ptr + CHANNELS + channel, turned_b, mask)
    if REST_BLOCK > 0:
        rest = 2 * CHANNELS + tl.arange(0, REST_BLOCK)[None, :]
        rest_mask = inside & (rest < HEAD_DIM)
        tl.store(out_row_ptr + rest, tl.load(x_row_ptr + rest, rest_mask), rest_mask)


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    q_tiles,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < q_tiles:
        _turn(
            q_ptr,
            cos_ptr,
            sin_ptr,
            q_out_ptr,
            tile,
            tokens,
            q_token_stride,
            q_head_stride,
            Q_HEADS,
            HEAD_DIM,
            CHANNELS,
            BLOCK,
            REST_BLOCK,
            ROWS,
            INTERLEAVED,
            INVERSE,
        )
    else:
        _turn(
            k_ptr,
            cos_ptr,
            sin_ptr,
            k_out_ptr,
            tile - q_tiles,
            tokens,
            k_token_stride,
            k_head_stride,
            K_HEADS,
            HEAD_DIM,
            CHANNELS,
            BLOCK,
            REST_BLOCK,
            ROWS,
            INTERLEAVED,
            INVERSE,
        )


def rotary(
    q_THE: Tensor, k_TKE: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """(q', k') = (q, k)·cos + rotate(q, k)·sin over the first 2·C of E dimensions, the others copied; contiguous."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q_THE, k_TKE))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    tokens, channels = cos_TC.shape
    head_dim, rest = q.shape[2], q.shape[2] - 2 * channels
    block = power_of_2(channels)
    rows = max(1, PAIRS // block)
    q_tiles, k_tiles = (ceil_div(tokens * x.shape[1], rows) for x in (q, k))
    _rotary_kernel[(q_tiles + k_tiles,)](
        q,
        k,
        cos_TC.contiguous(),
        sin_TC.contiguous(),
        q_out,
        k_out,
        tokens,
        q_tiles,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        Q_HEADS=q.shape[1],
        K_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        CHANNELS=channels,
        BLOCK=block,
        REST_BLOCK=power_of_2(rest) if rest else 0,
        ROWS=rows,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        num_warps=WARPS,
    )
    return q_out, k_out


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
