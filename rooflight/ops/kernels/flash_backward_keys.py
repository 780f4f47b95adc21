"""dK and dV of flash attention: a program holds a tile of keys and passes over the queries of all heads that share it.

So no two programs add to one element, and the same call gives the same bits.
Legend: E head dim  U value dim  M queries of a tile  N keys of a tile
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from rooflight.ops.kernels.flash_tile import numbered, place, query_tiles, sees, squash
from rooflight.ops.kernels.paged_tile import LOG2_E, load_rows


@triton.jit
def _over_queries(
    dk_NE,
    dv_NU,
    k_NE,
    v_NU,
    q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    key_N,
    offset,
    queries,
    first,
    begin,
    end,
    count,
    q_token,
    q_head,
    grad_token,
    grad_head,
    lse_head,
    window,
    factor,
    inner,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_U: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dK (to be scaled) and dV with `count` tiles of queries of each head added, one head after the other."""
    index_M = tl.arange(0, M)
    for index in tl.range(0, GROUP * count, num_stages=STAGES):
        head = (index // count).to(tl.int64)
        row = numbered(index % count, first, begin, end, MASKED) * M
        inside_M = row + index_M < queries
        row_64 = row.to(tl.int64)
        # Queries beyond the last are zeros, as are their grad, lse and δ: they add nothing.
        q_ME = load_rows(
            q_ptr + head * q_head + row_64 * q_token, index_M * q_token, inside_M, HEAD_DIM, BLOCK_E, MASKED
        )
        stat_at_M = head * lse_head + row + index_M
        lse_M = (tl.load(lse_ptr + stat_at_M, inside_M, 0.0) if MASKED else tl.load(lse_ptr + stat_at_M)) * LOG2_E
        x_NM = squash(tl.dot(k_NE, tl.trans(q_ME), input_precision=PRECISION), inner, CAPPED)
        probs_NM = tl.exp2(x_NM * factor - lse_M[None, :])
        if MASKED and CAUSAL:
            visible_NM = sees((row + offset + index_M)[None, :], key_N[:, None], window, WINDOWED)
            probs_NM = tl.where(visible_NM, probs_NM, 0.0)
        grad_MU = load_rows(
            grad_ptr + head * grad_head + row_64 * grad_token,
            index_M * grad_token,
            inside_M,
            VALUE_DIM,
            BLOCK_U,
            MASKED,
        )
        dv_NU = tl.dot(probs_NM.to(grad_MU.dtype), grad_MU, dv_NU, input_precision=PRECISION)
        delta_M = tl.load(delta_ptr + stat_at_M, inside_M, 0.0) if MASKED else tl.load(delta_ptr + stat_at_M)
        dp_NM = tl.dot(v_NU, tl.trans(grad_MU), input_precision=PRECISION)
        ds_NM = probs_NM * (dp_NM - delta_M[None, :])
        if CAPPED:
            ds_NM = ds_NM * (1.0 - x_NM * x_NM)
        dk_NE = tl.dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, input_precision=PRECISION)
    return dk_NE, dv_NU


@triton.jit(do_not_specialize=["tiles", "documents", "queries", "keys", "window", "lse_head"])
def keys_kernel(
    dk_ptr,
    dv_ptr,
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
    dk_sequence,
    dk_token,
    dk_head,
    dv_sequence,
    dv_token,
    dv_head,
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
    program = tl.program_id(0)
    key_head = program // tiles % KEY_HEADS
    # The first keys are seen by the most queries, and their tiles begin first.
    first_token, queries, keys, tile = place(
        program % tiles, program // tiles // KEY_HEADS, starts_ptr, documents, queries, keys, N, SEARCHED
    )
    key = tile * N
    if key >= keys:
        return
    sequence = first_token.to(tl.int64)
    key_64 = key.to(tl.int64)
    index_N = tl.arange(0, N)
    inside_N = key + index_N < keys
    k_ptr += sequence * k_sequence + key_64 * k_token + key_head * k_head
    v_ptr += sequence * v_sequence + key_64 * v_token + key_head * v_head
    k_NE = load_rows(k_ptr, index_N * k_token, inside_N, HEAD_DIM, BLOCK_E, True)
    v_NU = load_rows(v_ptr, index_N * v_token, inside_N, VALUE_DIM, BLOCK_U, True)
    head = key_head * GROUP
    q_ptr += sequence * q_sequence + head * q_head
    grad_ptr += sequence * grad_sequence + head * grad_head
    lse_ptr += sequence * lse_sequence + head.to(tl.int64) * lse_head
    delta_ptr += sequence * lse_sequence + head.to(tl.int64) * lse_head
    dk_NE = tl.zeros((N, BLOCK_E), tl.float32)
    dv_NU = tl.zeros((N, BLOCK_U), tl.float32)
    first, begin, end, last = query_tiles(key, queries, keys, window, CAUSAL, WINDOWED, M, N)
    for MASKED in tl.static_range(2):
        dk_NE, dv_NU = _over_queries(
            dk_NE,
            dv_NU,
            k_NE,
            v_NU,
            q_ptr,
            grad_ptr,
            lse_ptr,
            delta_ptr,
            key + index_N,
            keys - queries,
            queries,
            first,
            begin,
            end,
            last - first - (end - begin) if MASKED else end - begin,
            q_token,
            q_head,
            grad_token,
            grad_head,
            lse_head,
            window,
            factor,
            inner,
            GROUP,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_E,
            BLOCK_U,
            CAUSAL,
            WINDOWED,
            CAPPED,
            PRECISION,
            M,
            STAGES,
            MASKED,
        )
    channel_E = tl.arange(0, BLOCK_E)
    channel_U = tl.arange(0, BLOCK_U)
    dk_ptr += sequence * dk_sequence + key_64 * dk_token + key_head * dk_head
    dv_ptr += sequence * dv_sequence + key_64 * dv_token + key_head * dv_head
    tl.store(
        dk_ptr + index_N[:, None] * dk_token + channel_E[None, :],
        (dk_NE * scale).to(dk_ptr.dtype.element_ty),
        inside_N[:, None] & (channel_E < HEAD_DIM)[None, :],
    )
    tl.store(
        dv_ptr + index_N[:, None] * dv_token + channel_U[None, :],
        dv_NU.to(dv_ptr.dtype.element_ty),
        inside_N[:, None] & (channel_U < VALUE_DIM)[None, :],
    )
