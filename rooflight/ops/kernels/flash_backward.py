"""Flash attention backward in plain Triton: gradients for every call that the forward beside it computes.

δ = Σ grad·out a row, a kernel for dK and dV, and one for dQ. No two programs add to one element, so that the same call
gives the same bits; the price is that scores and dP are computed twice: seven products where FlashAttention-2's atomic
additions need five (Dao 2023, 2307.08691).
Legend: B sequences  Q queries  S keys  T tokens  H query heads  K key heads  E head dim  U value dim  R rows of a tile
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.attention.chunked import sink_grad
from rooflight.ops.kernels import ceil_div
from rooflight.ops.kernels.flash_backward_keys import keys_kernel
from rooflight.ops.kernels.flash_backward_queries import queries_kernel
from rooflight.ops.kernels.flash_tile import (
    Plan,
    block_of,
    constants,
    exponents,
    readable,
    strides_of,
    tiles_of,
)
from rooflight.ops.kernels.paged_tile import load_rows

DELTA_ROWS = 32


@triton.jit(do_not_specialize=["rows", "queries"])
def _delta_kernel(
    delta_ptr, grad_ptr, out_ptr, rows, queries,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_U: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < rows
    at_R = row_R.to(tl.int64) * VALUE_DIM
    grad_RU = load_rows(grad_ptr, at_R, inside_R, VALUE_DIM, BLOCK_U, True).to(tl.float32)
    out_RU = load_rows(out_ptr, at_R, inside_R, VALUE_DIM, BLOCK_U, True).to(tl.float32)
    head_R = row_R % HEADS
    token_R = row_R // HEADS
    to_R = (token_R // queries * HEADS + head_R).to(tl.int64) * queries + token_R % queries
    tl.store(delta_ptr + to_R, tl.sum(grad_RU * out_RU, 1), inside_R)


def delta_of(grad: Tensor, out: Tensor) -> Tensor:
    """δ = Σ grad·out over the value channels in fp32: [B,H,Q] of [B,Q,H,U], [H,T] of [T,H,U]."""
    *batch, queries, heads, value_dim = out.shape
    delta = out.new_empty((*batch, heads, queries), dtype=torch.float32)
    rows = delta.numel()
    if rows:
        _delta_kernel[(ceil_div(rows, DELTA_ROWS),)](
            delta,
            grad.contiguous(),
            out.contiguous(),
            rows,
            queries,
            HEADS=heads,
            VALUE_DIM=value_dim,
            BLOCK_U=block_of(value_dim),
            ROWS=DELTA_ROWS,
        )
    return delta


def plans_of(head_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Plan, Plan]:
    """Launch constants of the kernel for dK and dV and of that for dQ, for heads of these widths."""
    width = max(block_of(head_dim), block_of(value_dim))
    if dtype == torch.float32:
        small = Plan(16, 16, 4 if width <= 128 else 8, 2)
        return (Plan(16, 32, 4, 2), Plan(32, 32, 4, 2)) if width <= 64 else (small, small)
    if width <= 64:
        return Plan(64, 128, 8, 3), Plan(128, 64, 8, 3)
    return (Plan(64, 128, 8, 2), Plan(128, 64, 8, 2)) if width <= 128 else (Plan(16, 64, 8, 2), Plan(128, 32, 8, 2))


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_N1: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    plans: tuple[Plan, Plan] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense or packed, whichever the tensors and `starts_N1` are."""
    grad, q, k, v, lse = readable(grad), readable(q), readable(k), readable(v), lse.contiguous()
    queries, heads, keys, key_heads = q.shape[-3], q.shape[-2], k.shape[-3], k.shape[-2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = delta_of(grad, out)
    sequences = q.shape[0] if starts_N1 is None else 1
    documents = 0 if starts_N1 is None else starts_N1.shape[0] - 1
    lse_strides = (1 if starts_N1 is not None else lse.stride(0), lse.stride(-2))
    inputs = (q, k, v, grad, lse, delta, starts_N1, scale, *exponents(scale, softcap))
    strides = tuple(stride for x in (q, k, v, grad) for stride in strides_of(x))
    plan_keys, plan_queries = plans or plans_of(q.shape[-1], v.shape[-1], q.dtype)
    if k.numel():
        tiles = tiles_of(keys, plan_keys.keys, starts_N1)
        outputs = (*strides_of(dk), *strides_of(dv))
        keys_kernel[(tiles * key_heads * sequences,)](
            *(dk, dv, *inputs, tiles, documents, queries, keys, window, *outputs, *strides, *lse_strides),
            **constants(q, k, v, causal, window, softcap, plan_keys),
        )
    if q.numel():
        tiles = tiles_of(queries, plan_queries.queries, starts_N1)
        queries_kernel[(tiles * heads * sequences,)](
            *(dq, *inputs, tiles, documents, queries, keys, window, *strides_of(dq), *strides, *lse_strides),
            **constants(q, k, v, causal, window, softcap, plan_queries),
        )
    if sinks_H is None:
        return dq, dk, dv, q.new_empty((0,))
    # A packed row is a batch of one.
    lse_BHQ, delta_BHQ = (x if x.dim() == 3 else x.unsqueeze(0) for x in (lse, delta))
    return dq, dk, dv, sink_grad(lse_BHQ, delta_BHQ, sinks_H)


def attention_backward(
    grad_BQHU: Tensor,
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    out_BQHU: Tensor,
    lse_BHQ: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    plans: tuple[Plan, Plan] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks (empty without them); probabilities come again from the log-sum-exp.

    plans: for dK and dV and for dQ, instead of the rule's.
    """
    tensors = (grad_BQHU, q_BQHE, k_BSKE, v_BSKU, out_BQHU, lse_BHQ)
    return _backward(*tensors, None, scale, causal, window, softcap, sinks_H, plans)


def packed_attention_backward(
    grad_THU: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    out_THU: Tensor,
    lse_HT: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    plans: tuple[Plan, Plan] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same within each document, causal. The host reads no length, `max_length` included."""
    tensors = (grad_THU, q_THE, k_TKE, v_TKU, out_THU, lse_HT)
    return _backward(*tensors, starts_N1, scale, True, window, softcap, sinks_H, plans)
