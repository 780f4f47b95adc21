"""dQ of flash attention: a program holds a tile of queries and passes over the keys that they see.

Legend: E head dim  U value dim  M queries of a tile  N keys of a tile
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from rooflight.ops.kernels.flash_tile import key_tiles, numbered, place, sees, squash
from rooflight.ops.kernels.paged_tile import LOG2_E, load_rows


@triton.jit
def _over_keys(
    dq_ME,
    q_ME,
    grad_MU,
    lse_M,
    delta_M,
    k_ptr,
    v_ptr,
    position_M,
    keys,
    first,
    begin,
    end,
    count,
    k_token,
    v_token,
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
    """dQ (to be scaled) with `count` tiles of keys added."""
    index_N = tl.arange(0, N)
    for index in tl.range(0, count, num_stages=STAGES):
        key = numbered(index, first, begin, end, MASKED) * N
        inside_N = key + index_N < keys
        key_64 = key.to(tl.int64)
        k_NE = load_rows(k_ptr + key_64 * k_token, index_N * k_token, inside_N, HEAD_DIM, BLOCK_E, MASKED)
        v_NU = load_rows(v_ptr + key_64 * v_token, index_N * v_token, inside_N, VALUE_DIM, BLOCK_U, MASKED)
        x_MN = squash(tl.dot(q_ME, tl.trans(k_NE), input_precision=PRECISION), inner, CAPPED)
        probs_MN = tl.exp2(x_MN * factor - lse_M[:, None])
        if MASKED:
            visible_MN = inside_N[None, :]
            if CAUSAL:
                visible_MN = sees(position_M[:, None], key + index_N[None, :], window, WINDOWED) & visible_MN
            probs_MN = tl.where(visible_MN, probs_MN, 0.0)
        dp_MN = tl.dot(grad_MU, tl.trans(v_NU), input_precision=PRECISION)
        ds_MN = probs_MN * (dp_MN - delta_M[:, None])
        if CAPPED:
            ds_MN = ds_MN * (1.0 - x_MN * x_MN)
        dq_ME = tl.dot(ds_MN.to(k_NE.dtype), k_NE, dq_ME, input_precision=PRECISION)
    return dq_ME


@triton.jit(do_not_specialize=["tiles", "documents", "queries", "keys", "window", "lse_head"])
def queries_kernel(
    dq_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    starts_ptr,
    scale,
    factor,
    inner,
    tiles,
    documents,
    queries,
    keys,
    window,
    dq_sequence,
    dq_token,
    dq_head,
    q_sequence,
    q_token,
    q_head,
    k_sequence,
    k_token,
    k_head,
    v_sequence,
    v_token,
    v_head,
    grad_sequence,
    grad_token,
    grad_head,
    lse_sequence,
    lse_head,
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
    # The last queries see the most keys: they begin first.
    tile = tiles - 1 - program % tiles
    first_token, queries, keys, tile = place(
        tile, program // tiles // HEADS, starts_ptr, documents, queries, keys, M, SEARCHED
    )
    row = tile * M
    if row >= queries:
        return
    sequence = first_token.to(tl.int64)
    row_64 = row.to(tl.int64)
    index_M = tl.arange(0, M)
    inside_M = row + index_M < queries
    q_ptr += sequence * q_sequence + row_64 * q_token + head * q_head
    grad_ptr += sequence * grad_sequence + row_64 * grad_token + head * grad_head
    q_ME = load_rows(q_ptr, index_M * q_token, inside_M, HEAD_DIM, BLOCK_E, True)
    grad_MU = load_rows(grad_ptr, index_M * grad_token, inside_M, VALUE_DIM, BLOCK_U, True)
    stat_at_M = sequence * lse_sequence + head.to(tl.int64) * lse_head + row + index_M
    lse_M = tl.load(lse_ptr + stat_at_M, inside_M, 0.0) * LOG2_E
    delta_M = tl.load(delta_ptr + stat_at_M, inside_M, 0.0)
    k_ptr += sequence * k_sequence + head // GROUP * k_head
    v_ptr += sequence * v_sequence + head // GROUP * v_head
    position_M = row + index_M + keys - queries
    dq_ME = tl.zeros((M, BLOCK_E), tl.float32)
    first, begin, end, last = key_tiles(row, queries, keys, window, CAUSAL, WINDOWED, M, N)
    for MASKED in tl.static_range(2):
        dq_ME = _over_keys(
            dq_ME,
            q_ME,
            grad_MU,
            lse_M,
            delta_M,
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
    channel_E = tl.arange(0, BLOCK_E)
    dq_ptr += sequence * dq_sequence + row_64 * dq_token + head * dq_head
    tl.store(
        dq_ptr + index_M[:, None] * dq_token + channel_E[None, :],
        (dq_ME * scale).to(dq_ptr.dtype.element_ty),
        inside_M[:, None] & (channel_E < HEAD_DIM)[None, :],
    )
