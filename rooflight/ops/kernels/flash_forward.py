"""Flash attention forward in plain Triton: every mask, softcap, sinks, any head and value dims, packed documents.

FlashAttention-2's loop (Dao 2023, 2307.08691): tiles of keys that a tile of queries sees whole go without a mask.
Legend: B sequences  Q queries  S keys  T tokens  H query heads  K key heads  E head dim  U value dim
        M queries of a tile  N keys of a tile
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels.flash_tile import (
    Plan,
    block_of,
    constants,
    exponents,
    key_tiles,
    numbered,
    place,
    readable,
    sees,
    squash,
    strides_of,
    tiles_of,
)
from rooflight.ops.kernels.paged_tile import LOG2_E, load_rows

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _over_keys(
    out_MU,
    peak_M,
    total_M,
    q_ME,
    k_ptr,
    v_ptr,
    position_M,
    keys,
    first,
    begin,
    end,
    count,
    k_stride,
    v_stride,
    window,
    factor,
    inner,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Running softmax (Milakov & Gimelshein 2018, 1805.02867) with `count` tiles of keys added."""
    index_N = tl.arange(0, N)
    for index in tl.range(0, count, num_stages=STAGES):
        key = numbered(index, first, begin, end, MASKED) * N
        inside_N = key + index_N < keys
        k_NE = load_rows(k_ptr + key.to(tl.int64) * k_stride, index_N * k_stride, inside_N, HEAD_DIM, BLOCK_E, MASKED)
        # Before the product with the keys, or both may lie at one place in shared memory: flash_tile.Plan.
        v_NU = load_rows(v_ptr + key.to(tl.int64) * v_stride, index_N * v_stride, inside_N, VALUE_DIM, BLOCK_U, MASKED)
        x_MN = squash(tl.dot(q_ME, tl.trans(k_NE), input_precision=PRECISION), inner, CAPPED)
        if MASKED:
            visible_MN = inside_N[None, :]
            if CAUSAL:
                visible_MN = sees(position_M[:, None], key + index_N[None, :], window, WINDOWED) & visible_MN
            x_MN = tl.where(visible_MN, x_MN, float("-inf"))
        higher_M = tl.maximum(peak_M, tl.max(x_MN, 1) * factor)
        # A row that has seen no key yet: −∞ less −∞ would be NaN.
        base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M) if MASKED else higher_M
        probs_MN = tl.exp2(x_MN * factor - base_M[:, None])
        fade_M = tl.exp2(peak_M - base_M)
        total_M = total_M * fade_M + tl.sum(probs_MN, 1)
        out_MU = tl.dot(probs_MN.to(v_NU.dtype), v_NU, out_MU * fade_M[:, None], input_precision=PRECISION)
        peak_M = higher_M
    return out_MU, peak_M, total_M


# Lengths change from step to step: no variant of the kernel for some of them.
@triton.jit(do_not_specialize=["tiles", "documents", "queries", "keys", "window", "lse_head"])
def _forward_kernel(
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    starts_ptr,
    factor,
    inner,
    tiles,
    documents,
    queries,
    keys,
    window,
    out_sequence,
    out_token,
    out_head,
    lse_sequence,
    lse_head,
    q_sequence,
    q_token,
    q_head,
    k_sequence,
    k_token,
    k_head,
    v_sequence,
    v_token,
    v_head,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    SEARCHED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    HEADS: tl.constexpr = KEY_HEADS * GROUP
    program = tl.program_id(0)
    head = program // tiles % HEADS
    # The last queries see the most keys: they begin first. A head's tiles run together, for its keys to stay in L2.
    tile = tiles - 1 - program % tiles
    first_token, queries, keys, tile = place(
        tile, program // tiles // HEADS, starts_ptr, documents, queries, keys, M, SEARCHED
    )
    row = tile * M
    if row >= queries:
        return
    sequence = first_token.to(tl.int64)
    index_M = tl.arange(0, M)
    inside_M = row + index_M < queries
    position_M = row + index_M + keys - queries
    q_ptr += sequence * q_sequence + row.to(tl.int64) * q_token + head * q_head
    q_ME = load_rows(q_ptr, index_M * q_token, inside_M, HEAD_DIM, BLOCK_E, True)
    k_ptr += sequence * k_sequence + head // GROUP * k_head
    v_ptr += sequence * v_sequence + head // GROUP * v_head
    out_MU = tl.zeros((M, BLOCK_U), tl.float32)
    if sinks_ptr is None:
        peak_M = tl.full((M,), float("-inf"), tl.float32)
        total_M = tl.zeros((M,), tl.float32)
    else:
        # A sink is a score without a value (gpt-oss).
        peak_M = tl.zeros((M,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total_M = tl.full((M,), 1.0, tl.float32)
    first, begin, end, last = key_tiles(row, queries, keys, window, CAUSAL, WINDOWED, M, N)
    for MASKED in tl.static_range(2):
        out_MU, peak_M, total_M = _over_keys(
            out_MU,
            peak_M,
            total_M,
            q_ME,
            k_ptr,
            v_ptr,
            position_M,
            keys,
            first,
            begin,
            end,
            last - first - (end - begin) if MASKED else end - begin,
            k_token,
            v_token,
            window,
            factor,
            inner,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_E,
            BLOCK_U,
            CAUSAL,
            WINDOWED,
            CAPPED,
            PRECISION,
            N,
            STAGES,
            MASKED,
        )
    # A row without any key is zeros, and its log-sum-exp −∞.
    total_M = tl.where(total_M == 0.0, 1.0, total_M)
    channel_U = tl.arange(0, BLOCK_U)
    out_ptr += sequence * out_sequence + row.to(tl.int64) * out_token + head * out_head
    out_at_MU = out_ptr + index_M[:, None] * out_token + channel_U[None, :]
    out_MU = out_MU / total_M[:, None]
    tl.store(out_at_MU, out_MU.to(out_ptr.dtype.element_ty), inside_M[:, None] & (channel_U < VALUE_DIM)[None, :])
    lse_ptr += sequence * lse_sequence + head.to(tl.int64) * lse_head + row
    tl.store(lse_ptr + index_M, (peak_M + tl.log2(total_M)) * LN_2, inside_M)


def plan_of(head_dim: int, value_dim: int, dtype: torch.dtype) -> Plan:
    """Launch constants for heads of these widths."""
    width = max(block_of(head_dim), block_of(value_dim))
    if dtype == torch.float32:
        return Plan(32, 32, 4, 2) if width <= 128 else Plan(16, 16, 8, 2)
    return Plan(128, 128, 8, 2) if width <= 128 else Plan(128, 64 if head_dim <= 192 else 32, 8, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_N1: Tensor | None,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    plan: Plan | None,
) -> tuple[Tensor, Tensor]:
    """Dense or packed, whichever the tensors and `starts_N1` are."""
    q, k, v = readable(q), readable(k), readable(v)
    heads, head_dim, value_dim = q.shape[-2], q.shape[-1], v.shape[-1]
    out = q.new_empty((*q.shape[:-1], value_dim))
    plan = plan or plan_of(head_dim, value_dim, q.dtype)
    tiles = tiles_of(q.shape[-3], plan.queries, starts_N1)
    sequences = q.shape[0] if starts_N1 is None else 1
    if not q.numel():
        return out, lse
    _forward_kernel[(tiles * heads * sequences,)](
        out,
        lse,
        q,
        k,
        v,
        None if sinks_H is None else readable(sinks_H),
        starts_N1,
        *exponents(scale, softcap),
        tiles,
        0 if starts_N1 is None else starts_N1.shape[0] - 1,
        q.shape[-3],
        k.shape[-3],
        window,
        *strides_of(out),
        1 if starts_N1 is not None else lse.stride(0),
        lse.stride(-2),
        *strides_of(q),
        *strides_of(k),
        *strides_of(v),
        **constants(q, k, v, causal, window, softcap, plan),
    )
    return out, lse


def attention(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap·tanh(q·kᵀ·scale/softcap))·v and its log-sum-exp: [B,Q,H,U] and fp32 [B,H,Q].

    plan: instead of the rule's.
    """
    batch, queries, heads, _ = q_BQHE.shape
    lse_BHQ = q_BQHE.new_empty((batch, heads, queries), dtype=torch.float32)
    return _forward(q_BQHE, k_BSKE, v_BSKU, None, lse_BHQ, scale, causal, window, softcap, sinks_H, plan)


def packed_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """The same within each document, causal: [T,H,U] and fp32 [H,T]. The host reads no length, max_length included."""
    lse_HT = q_THE.new_empty((q_THE.shape[1], q_THE.shape[0]), dtype=torch.float32)
    return _forward(q_THE, k_TKE, v_TKU, starts_N1, lse_HT, scale, True, window, softcap, sinks_H, plan)
