"""Head norms, rotation and cache write of fused qkv in one launch: every element is read once and written once.

A program takes some (token, head) rows of q, of k or of v. Between the stages it rounds to the tensors' type, as the
kernels of norm and rope do, so that fusing them changes nothing but the order of a norm's sum.
Legend: T tokens  H query heads  K key heads  E head dim  W = (H + 2K)·E  C frequencies  N blocks  P tokens a block
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.ops.kernels import ceil_div, early_attention, power_of_2, processors


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements of a program, and its warps; 16 elements a thread are two 16-byte loads of bf16."""

    elements: int
    warps: int


# Few rows take as long as one row's loads, sum and stores: one warp, which waits for no other. Many want more at once.
SMALL, LARGE = Tile(512, 1), Tile(2048, 4)
SMALL_PROGRAMS = 16  # of a multiprocessor, beyond which rows are many


@triton.jit
def _pairs(row_ptr, inside, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second members of the pairs of each row: [ROWS, BLOCK]."""
    if INTERLEAVED:
        run = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.load(row_ptr + run, inside & (run < 2 * CHANNELS), 0.0)
        first, second = tl.split(tl.reshape(x, (ROWS, BLOCK, 2)))
    else:
        channel = tl.arange(0, BLOCK)[None, :]
        mask = inside & (channel < CHANNELS)
        first = tl.load(row_ptr + channel, mask, 0.0)
        second = tl.load(row_ptr + CHANNELS + channel, mask, 0.0)
    return first, second


@triton.jit
def _write(row_ptr, at, x, like, mask):
    """x rounded to the type of `like` and stored; by way of fp32, for fp16 has no cast to some of the cache's types."""
    tl.store(row_ptr + at, x.to(like.dtype).to(tl.float32).to(row_ptr.dtype.element_ty), mask)


@triton.jit
def _norm_and_turn(
    row_ptr,
    out_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    token,
    inside,
    kept,
    eps,
    offset,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of heads from row_ptr to out_ptr, [ROWS, 1] both: where `inside` they are read, where `kept` written."""
    channel = tl.arange(0, BLOCK)[None, :]
    rest = 2 * CHANNELS + tl.arange(0, REST_BLOCK if REST_BLOCK > 0 else 1)[None, :]
    raw_a, raw_b = _pairs(row_ptr, inside, CHANNELS, BLOCK, ROWS, INTERLEAVED)
    a, b = raw_a.to(tl.float32), raw_b.to(tl.float32)
    at = token * CHANNELS + channel
    cos = tl.load(cos_ptr + at, inside & (channel < CHANNELS), 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, inside & (channel < CHANNELS), 0.0).to(tl.float32)
    if REST_BLOCK > 0:
        c = tl.load(row_ptr + rest, inside & (rest < HEAD_DIM), 0.0).to(tl.float32)
    if weight_ptr is not None:
        weight_row_ptr = weight_ptr + tl.zeros_like(token)
        weight_a, weight_b = _pairs(weight_row_ptr, inside, CHANNELS, BLOCK, ROWS, INTERLEAVED)
        squares = tl.sum(a * a + b * b, 1)
        if REST_BLOCK > 0:
            squares += tl.sum(c * c, 1)
        rstd = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        # What turns is the normed row as it would be stored.
        a = (a * rstd * (weight_a.to(tl.float32) + offset)).to(raw_a.dtype).to(tl.float32)
        b = (b * rstd * (weight_b.to(tl.float32) + offset)).to(raw_a.dtype).to(tl.float32)
        if REST_BLOCK > 0:
            c *= rstd * (tl.load(weight_row_ptr + rest, rest < HEAD_DIM, 0.0).to(tl.float32) + offset)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if INTERLEAVED:
        run = tl.arange(0, 2 * BLOCK)[None, :]
        turned = tl.reshape(tl.join(turned_a, turned_b), (ROWS, 2 * BLOCK))
        _write(out_ptr, run, turned, raw_a, kept & (run < 2 * CHANNELS))
    else:
        _write(out_ptr, channel, turned_a, raw_a, kept & (channel < CHANNELS))
        _write(out_ptr, CHANNELS + channel, turned_b, raw_a, kept & (channel < CHANNELS))
    if REST_BLOCK > 0:
        _write(out_ptr, rest, c, raw_a, kept & (rest < HEAD_DIM))


@triton.jit
def _rows(tile, tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """(token, head) of a tile's rows, [ROWS, 1] both."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // HEADS
    return token.to(tl.int64), row - token * HEADS


@triton.jit(do_not_specialize=["tokens"])
def _rotate_and_cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    tokens,
    stride,
    eps,
    offset,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        # In this order: the next kernel may read at its start what is older than this one.
        gdc_wait()
        gdc_launch_dependents()
    q_tiles, k_tiles = tl.cdiv(tokens * HEADS, ROWS), tl.cdiv(tokens * KEY_HEADS, ROWS)
    tile = tl.program_id(0)
    if tile < q_tiles:
        token, head = _rows(tile, tokens, HEADS, ROWS)
        inside = token < tokens
        _norm_and_turn(
            qkv_ptr + token * stride + head * HEAD_DIM,
            out_ptr + (token * HEADS + head) * HEAD_DIM,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            token,
            inside,
            inside,
            eps,
            offset,
            HEAD_DIM,
            CHANNELS,
            BLOCK,
            REST_BLOCK,
            ROWS,
            INTERLEAVED,
        )
    else:
        is_value = tile >= q_tiles + k_tiles
        token, head = _rows(tile - q_tiles - (k_tiles if is_value else 0), tokens, KEY_HEADS, ROWS)
        inside = token < tokens
        slot = tl.load(slots_ptr + token, inside, -1).to(tl.int64)
        kept = inside & (slot >= 0)
        row_ptr = qkv_ptr + token * stride + (HEADS + head) * HEAD_DIM
        at = (slot * KEY_HEADS + head) * HEAD_DIM
        if is_value:
            column = tl.arange(0, WIDE_BLOCK)[None, :]
            v = tl.load(row_ptr + KEY_HEADS * HEAD_DIM + column, inside & (column < HEAD_DIM), 0.0)
            _write(v_cache_ptr + at, column, v, v, kept & (column < HEAD_DIM))
        else:
            _norm_and_turn(
                row_ptr,
                k_cache_ptr + at,
                k_weight_ptr,
                cos_ptr,
                sin_ptr,
                token,
                inside,
                kept,
                eps,
                offset,
                HEAD_DIM,
                CHANNELS,
                BLOCK,
                REST_BLOCK,
                ROWS,
                INTERLEAVED,
            )


def tile_of(elements: int, multiprocessors: int) -> Tile:
    """The tile for as many elements of qkv."""
    return SMALL if elements <= SMALL_PROGRAMS * multiprocessors * SMALL.elements else LARGE


def rotate_and_cache(
    qkv_TW: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    slots_T: Tensor,
    heads: int,
    interleaved: bool = False,
    q_weight_E: Tensor | None = None,
    k_weight_E: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    tile: Tile | None = None,
    early: bool | None = None,
) -> Tensor:
    """q' = rotary(norm(q)), contiguous; rotary(norm(k)) and v to the cache's slots, those below 0 left out.

    The norms are RMSNorm over E by (offset + weight), left out without a weight; the first 2·C of E dimensions turn.
    Slot n·P + p is place p of block n. Two tokens with one slot leave either's. tile, early: instead of the rule's.
    """
    qkv = qkv_TW if qkv_TW.stride(1) == 1 else qkv_TW.contiguous()
    tokens, channels = cos_TC.shape
    key_heads, head_dim = k_NPKE.shape[2:]
    out_THE = qkv.new_empty((tokens, heads, head_dim))
    if not tokens:
        return out_THE
    wide_block, rest = power_of_2(head_dim), head_dim - 2 * channels
    tile = tile or tile_of(qkv.numel(), processors(qkv.device))
    rows = max(1, tile.elements // wide_block)
    early = early_attention(tokens, heads * head_dim) if early is None else early
    programs = ceil_div(tokens * heads, rows) + 2 * ceil_div(tokens * key_heads, rows)
    _rotate_and_cache_kernel[(programs,)](
        qkv,
        cos_TC.contiguous(),
        sin_TC.contiguous(),
        None if q_weight_E is None else q_weight_E.contiguous(),
        None if k_weight_E is None else k_weight_E.contiguous(),
        out_THE,
        k_NPKE,
        v_NPKE,
        slots_T,
        tokens,
        qkv.stride(0),
        eps,
        offset,
        HEADS=heads,
        KEY_HEADS=key_heads,
        HEAD_DIM=head_dim,
        CHANNELS=channels,
        BLOCK=power_of_2(channels),
        REST_BLOCK=power_of_2(rest) if rest else 0,
        WIDE_BLOCK=wide_block,
        ROWS=rows,
        INTERLEAVED=interleaved,
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
    return out_THE
