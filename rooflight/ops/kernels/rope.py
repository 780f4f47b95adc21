"""Rotary kernel: turns queries and keys, or their gradients back, and copies values along, in one launch.

A program takes some (token, head) rows, of q, of k or of v; a row is read and written once, from where it lies in
fused QKV, or to where it belongs in the gradient of fused QKV.
Legend: T tokens  H query heads  K key heads  E head dim  C frequencies  W = (H + 2K)·E
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2

PAIRS, WARPS = 1024, 4  # pairs of a program: 8 a thread, two 16-byte loads of bf16


@triton.jit
def _rows(tile, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """(token, head) of a tile's rows, [ROWS] both."""
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    return token.to(tl.int64), (row - token * HEADS).to(tl.int64)


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
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token, head = _rows(tile, HEADS, ROWS)
    inside = (token < tokens)[:, None]
    x_row_ptr = x_ptr + (token * token_stride + head * head_stride)[:, None]
    out_row_ptr = out_ptr + (token * out_stride + head * HEAD_DIM)[:, None]
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
def _copy(
    x_ptr,
    out_ptr,
    tile,
    tokens,
    token_stride,
    head_stride,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, head = _rows(tile, HEADS, ROWS)
    column = tl.arange(0, WIDE_BLOCK)[None, :]
    mask = (token < tokens)[:, None] & (column < HEAD_DIM)
    x = tl.load(x_ptr + (token * token_stride + head * head_stride)[:, None] + column, mask)
    tl.store(out_ptr + (token * out_stride + head * HEAD_DIM)[:, None] + column, x, mask)


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    tokens,
    q_tiles,
    k_tiles,
    q_token_stride,
    q_head_stride,
    q_out_stride,
    k_token_stride,
    k_head_stride,
    k_out_stride,
    v_token_stride,
    v_head_stride,
    v_out_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
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
            q_out_stride,
            Q_HEADS,
            HEAD_DIM,
            CHANNELS,
            BLOCK,
            REST_BLOCK,
            ROWS,
            INTERLEAVED,
            INVERSE,
        )
    elif tile < q_tiles + k_tiles:
        _turn(
            k_ptr,
            cos_ptr,
            sin_ptr,
            k_out_ptr,
            tile - q_tiles,
            tokens,
            k_token_stride,
            k_head_stride,
            k_out_stride,
            K_HEADS,
            HEAD_DIM,
            CHANNELS,
            BLOCK,
            REST_BLOCK,
            ROWS,
            INTERLEAVED,
            INVERSE,
        )
    elif v_ptr is not None:
        _copy(
            v_ptr,
            v_out_ptr,
            tile - q_tiles - k_tiles,
            tokens,
            v_token_stride,
            v_head_stride,
            v_out_stride,
            K_HEADS,
            HEAD_DIM,
            WIDE_BLOCK,
            ROWS,
        )


def _launch(
    parts: Sequence[Tensor], out: Sequence[Tensor], cos_TC: Tensor, sin_TC: Tensor, interleaved: bool, inverse: bool
) -> None:
    """q and k of (q, k) or (q, k, v) turned, v copied, into `out`, whose heads lie one after the other."""
    q, k, *values = (x if x.stride(2) == 1 else x.contiguous() for x in parts)
    v, v_out = (values[0], out[2]) if values else (None, None)
    tokens, channels = cos_TC.shape
    head_dim, rest = q.shape[2], q.shape[2] - 2 * channels
    block = power_of_2(channels)
    rows = max(1, PAIRS // block)
    q_tiles, k_tiles = (ceil_div(tokens * x.shape[1], rows) for x in (q, k))
    _rotary_kernel[(q_tiles + k_tiles * (1 if v is None else 2),)](
        q,
        k,
        v,
        cos_TC.contiguous(),
        sin_TC.contiguous(),
        out[0],
        out[1],
        v_out,
        tokens,
        q_tiles,
        k_tiles,
        q.stride(0),
        q.stride(1),
        out[0].stride(0),
        k.stride(0),
        k.stride(1),
        out[1].stride(0),
        0 if v is None else v.stride(0),
        0 if v is None else v.stride(1),
        0 if v_out is None else v_out.stride(0),
        Q_HEADS=q.shape[1],
        K_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        CHANNELS=channels,
        BLOCK=block,
        REST_BLOCK=power_of_2(rest) if rest else 0,
        WIDE_BLOCK=power_of_2(head_dim),
        ROWS=rows,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        num_warps=WARPS,
    )


def rotary(
    q_THE: Tensor, k_TKE: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """(q', k') = (q, k)·cos + rotate(q, k)·sin over the first 2·C of E dimensions, the others copied; contiguous."""
    q_out, k_out = q_THE.new_empty(q_THE.shape), k_TKE.new_empty(k_TKE.shape)
    _launch((q_THE, k_TKE), (q_out, k_out), cos_TC, sin_TC, interleaved, inverse)
    return q_out, k_out


def _heads_of(qkv_TW: Tensor, heads: int, key_heads: int) -> tuple[Tensor, ...]:
    """q, k and v as views."""
    return qkv_TW.unflatten(1, (heads + 2 * key_heads, -1)).split((heads, key_heads, key_heads), dim=1)


def rotary_qkv(
    qkv_TW: Tensor, cos_TC: Tensor, sin_TC: Tensor, heads: int, key_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(q', k', v) out of a fused projection, as of `rotary`, v copied; contiguous."""
    parts = _heads_of(qkv_TW, heads, key_heads)
    q, k, v = (x.new_empty(x.shape) for x in parts)
    _launch(parts, (q, k, v), cos_TC, sin_TC, interleaved, False)
    return q, k, v


def rotary_qkv_backward(
    grad_q_THE: Tensor,
    grad_k_TKE: Tensor,
    grad_v_TKE: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """The fused projection's gradient [T, W]: those of q and k turned back, that of v copied."""
    (tokens, heads, head_dim), key_heads = grad_q_THE.shape, grad_k_TKE.shape[1]
    grad_TW = grad_q_THE.new_empty((tokens, (heads + 2 * key_heads) * head_dim))
    out = _heads_of(grad_TW, heads, key_heads)
    _launch((grad_q_THE, grad_k_TKE, grad_v_TKE), out, cos_TC, sin_TC, interleaved, True)
    return grad_TW
