"""Naive attention: scores, softmax and context as three operations, with the Q×S matrix in memory between them.

Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.attention import pairs
from rooflight.ops.cost import (
    VECTOR,
    Access,
    Cost,
    Count,
    Movement,
    Primitive,
    elementwise_cost,
    precision_of,
    tensor_bytes,
)
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy, same_kernel_dtype

_KERNELS = "rooflight.ops.kernels.softmax"


def _grouped(x_BQHE: Tensor, key_heads: int) -> Tensor:
    """[B,Q,H,E] to [B,K,G·Q,E]: the queries that share a key head stand side by side."""
    return x_BQHE.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _product(
    batch: Count, heads: Count, m: Count, n: Count, k: Count, x: Tensor, reads: Any, writes: Any, products: int = 1
) -> Cost:
    """`products` batched matrix products of m×n×k for each sequence and head."""
    precision = precision_of(x)
    return Cost(
        flops={precision: products * 2 * batch * heads * m * n * k},
        bytes_read=tensor_bytes(reads),
        bytes_written=tensor_bytes(writes),
        primitive=Primitive.MATMUL,
        access=Access.STRIDED,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=(batch * heads, m, n, k),
        precision=precision,
        curve="bmm",
    )


def _scores(q_BQHE: Tensor, k_BSKE: Tensor, scale: float) -> Tensor:
    batch, queries, heads, _ = q_BQHE.shape
    key_heads = k_BSKE.shape[2]
    scores = (_grouped(q_BQHE, key_heads) * scale) @ k_BSKE.permute(0, 2, 3, 1)
    return scores.view(batch, heads, queries, k_BSKE.shape[1])


def _scores_shape(q_BQHE: Tensor, k_BSKE: Tensor, scale: float) -> Tensor:
    return q_BQHE.new_empty((q_BQHE.shape[0], q_BQHE.shape[2], q_BQHE.shape[1], k_BSKE.shape[1]))


def _scores_cost(out_BHQS: Tensor, q_BQHE: Tensor, k_BSKE: Tensor, scale: float) -> Cost:
    batch, queries, heads, head_dim = q_BQHE.shape
    cost = _product(batch, heads, queries, k_BSKE.shape[1], head_dim, q_BQHE, (q_BQHE, k_BSKE), out_BHQS)
    return _plus_vector(cost, q_BQHE.numel())


def _plus_vector(cost: Cost, flops: Count) -> Cost:
    return replace(cost, flops={**cost.flops, VECTOR: cost.flops.get(VECTOR, 0) + flops})


def _scores_backward(grad_BHQS: Tensor, q_BQHE: Tensor, k_BSKE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, head_dim = q_BQHE.shape
    key_heads = k_BSKE.shape[2]
    grad = grad_BHQS.unflatten(1, (key_heads, -1)).flatten(2, 3)
    dq = (grad @ k_BSKE.transpose(1, 2)) * scale
    dk = (grad.transpose(-1, -2) @ _grouped(q_BQHE, key_heads)) * scale
    dq = dq.view(batch, heads, queries, head_dim).transpose(1, 2)
    return dq.contiguous(), dk.transpose(1, 2).contiguous()


def _scores_backward_shape(grad_BHQS: Tensor, q_BQHE: Tensor, k_BSKE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q_BQHE.new_empty(q_BQHE.shape), k_BSKE.new_empty(k_BSKE.shape)


def _scores_backward_cost(
    out: tuple[Tensor, Tensor], grad_BHQS: Tensor, q_BQHE: Tensor, k_BSKE: Tensor, scale: float
) -> Cost:
    batch, queries, heads, head_dim = q_BQHE.shape
    reads = (grad_BHQS, q_BQHE, k_BSKE)
    cost = _product(batch, heads, queries, head_dim, k_BSKE.shape[1], q_BQHE, reads, out, products=2)
    return _plus_vector(cost, q_BQHE.numel() + k_BSKE.numel())


scores_backward = Op(
    "attention_scores_backward", _scores_backward, cost=_scores_backward_cost, shape=_scores_backward_shape
)


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale = inputs
    ctx.save_for_backward(q, k)


attention_scores = Op(
    "attention_scores",
    _scores,
    cost=_scores_cost,
    shape=_scores_shape,
    backward=lambda ctx, grad: (*scores_backward(grad, *ctx.saved_tensors, ctx.scale), None),
    setup=_scores_setup,
)


def _softmax(
    scores_BHQS: Tensor, causal: bool = True, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None
) -> Tensor:
    queries, keys = scores_BHQS.shape[-2:]
    scores = scores_BHQS.float()
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(queries, device=scores.device).unsqueeze(-1) + (keys - queries)
    hidden = pairs.hidden_mask(rows, torch.arange(keys, device=scores.device), causal, window)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks_H is None:
        return torch.softmax(scores, dim=-1).to(scores_BHQS.dtype)
    lse = torch.logaddexp(torch.logsumexp(scores, -1, keepdim=True), sinks_H.float().view(1, -1, 1, 1))
    return torch.exp(scores - lse).to(scores_BHQS.dtype)


def _softmax_takes(scores_BHQS: Tensor, causal: bool, window: int, softcap: float, sinks_H: Tensor | None) -> bool:
    sinks = sinks_H is None or sinks_H.dtype in KERNEL_DTYPES
    return same_kernel_dtype(scores_BHQS) and scores_BHQS.numel() > 0 and sinks


def _softmax_shape(
    scores_BHQS: Tensor, causal: bool = True, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None
) -> Tensor:
    return scores_BHQS.new_empty(scores_BHQS.shape)


def _softmax_cost(
    out_BHQS: Tensor, scores_BHQS: Tensor, causal: bool, window: int, softcap: float, sinks_H: Tensor | None
) -> Cost:
    rows = scores_BHQS.shape[0] * scores_BHQS.shape[1] * scores_BHQS.shape[2]
    # Maximum, subtract, exp, sum, divide over the whole matrix, masked entries too: they are in memory.
    flops = scores_BHQS.numel() * (8 if softcap else 5) + (0 if sinks_H is None else 3 * rows)
    return elementwise_cost(
        flops,
        (scores_BHQS, sinks_H),
        (out_BHQS,),
        size=(rows, scores_BHQS.shape[3]),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION, Movement.BROADCAST),
    ).named("softmax")


def _softmax_backward(
    grad_BHQS: Tensor, probs_BHQS: Tensor, scores_BHQS: Tensor | None, softcap: float, sinks: bool
) -> tuple[Tensor, Tensor]:
    probs, grad = probs_BHQS.float(), grad_BHQS.float()
    inner = (probs * grad).sum(-1, keepdim=True)
    out = probs * (grad - inner)
    if scores_BHQS is not None:
        tanh = torch.tanh(scores_BHQS.float() / softcap)
        out = out * (1 - tanh * tanh)
    # A sink takes what probability the row's keys leave over.
    left = 1 - probs.sum(-1, keepdim=True)
    grad_sinks = -(left * inner).sum((0, 2, 3)) if sinks else grad.new_empty((0,))
    return out.to(grad_BHQS.dtype), grad_sinks


def _softmax_backward_takes(
    grad_BHQS: Tensor, probs_BHQS: Tensor, scores_BHQS: Tensor | None, softcap: float, sinks: bool
) -> bool:
    return same_kernel_dtype(grad_BHQS, probs_BHQS, scores_BHQS) and grad_BHQS.numel() > 0


def _softmax_backward_shape(
    grad_BHQS: Tensor, probs_BHQS: Tensor, scores_BHQS: Tensor | None, softcap: float, sinks: bool
) -> tuple[Tensor, Tensor]:
    heads = grad_BHQS.shape[1] if sinks else 0
    return grad_BHQS.new_empty(grad_BHQS.shape), grad_BHQS.new_empty((heads,), dtype=torch.float32)


def _softmax_backward_cost(
    out: tuple[Tensor, Tensor],
    grad_BHQS: Tensor,
    probs_BHQS: Tensor,
    scores_BHQS: Tensor | None,
    softcap: float,
    sinks: bool,
) -> Cost:
    rows = grad_BHQS.shape[0] * grad_BHQS.shape[1] * grad_BHQS.shape[2]
    # Multiply, sum, subtract, multiply (softcap: divide, tanh, square, 1 −, multiply; sinks: sum over the row).
    per_element = 4 + (5 if softcap else 0) + (1 if sinks else 0)
    return elementwise_cost(
        grad_BHQS.numel() * per_element + (3 * rows if sinks else 0),
        (grad_BHQS, probs_BHQS, scores_BHQS),
        out,
        size=(rows, grad_BHQS.shape[3]),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION, Movement.BROADCAST),
    ).named("softmax_backward")


softmax_backward = Op(
    "attention_softmax_backward",
    _softmax_backward,
    cost=_softmax_backward_cost,
    shape=_softmax_backward_shape,
    kernel=lazy(_KERNELS, "attention_softmax_backward"),
    kernel_takes=_softmax_backward_takes,
)


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, _, _, ctx.softcap, sinks = inputs
    ctx.sinks_dtype = None if sinks is None else sinks.dtype
    ctx.save_for_backward(output, scores if ctx.softcap else None)


def _softmax_op_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    probs, scores = ctx.saved_tensors
    out, grad_sinks = softmax_backward(grad, probs, scores, ctx.softcap, ctx.sinks_dtype is not None)
    return out, None, None, None, None if ctx.sinks_dtype is None else grad_sinks.to(ctx.sinks_dtype)


attention_softmax = Op(
    "attention_softmax",
    _softmax,
    cost=_softmax_cost,
    shape=_softmax_shape,
    kernel=lazy(_KERNELS, "attention_softmax"),
    kernel_takes=_softmax_takes,
    backward=_softmax_op_backward,
    setup=_softmax_setup,
)


def _context(probs_BHQS: Tensor, v_BSKU: Tensor) -> Tensor:
    batch, heads, queries, _ = probs_BHQS.shape
    grouped = probs_BHQS.unflatten(1, (v_BSKU.shape[2], -1)).flatten(2, 3)
    out = grouped @ v_BSKU.transpose(1, 2)
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous()


def _context_shape(probs_BHQS: Tensor, v_BSKU: Tensor) -> Tensor:
    batch, heads, queries, _ = probs_BHQS.shape
    return probs_BHQS.new_empty((batch, queries, heads, v_BSKU.shape[-1]))


def _context_cost(out_BQHU: Tensor, probs_BHQS: Tensor, v_BSKU: Tensor) -> Cost:
    batch, heads, queries, keys = probs_BHQS.shape
    return _product(batch, heads, queries, v_BSKU.shape[-1], keys, v_BSKU, (probs_BHQS, v_BSKU), out_BQHU)


def _context_backward(grad_BQHU: Tensor, probs_BHQS: Tensor, v_BSKU: Tensor) -> tuple[Tensor, Tensor]:
    key_heads = v_BSKU.shape[2]
    grad = _grouped(grad_BQHU, key_heads)
    probs = probs_BHQS.unflatten(1, (key_heads, -1)).flatten(2, 3)
    grad_probs = (grad @ v_BSKU.permute(0, 2, 3, 1)).view(probs_BHQS.shape)
    return grad_probs, (probs.transpose(-1, -2) @ grad).transpose(1, 2).contiguous()


def _context_backward_shape(grad_BQHU: Tensor, probs_BHQS: Tensor, v_BSKU: Tensor) -> tuple[Tensor, Tensor]:
    return probs_BHQS.new_empty(probs_BHQS.shape), v_BSKU.new_empty(v_BSKU.shape)


def _context_backward_cost(out: tuple[Tensor, Tensor], grad_BQHU: Tensor, probs_BHQS: Tensor, v_BSKU: Tensor) -> Cost:
    batch, heads, queries, keys = probs_BHQS.shape
    reads = (grad_BQHU, probs_BHQS, v_BSKU)
    return _product(batch, heads, queries, keys, v_BSKU.shape[-1], v_BSKU, reads, out, products=2)


context_backward = Op(
    "attention_context_backward", _context_backward, cost=_context_backward_cost, shape=_context_backward_shape
)
attention_context = Op(
    "attention_context",
    _context,
    cost=_context_cost,
    shape=_context_shape,
    backward=lambda ctx, grad: context_backward(grad, *ctx.saved_tensors),
    setup=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def naive_attention(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale)·v with scores and probabilities of B·H·Q·S elements each written to memory and read back."""
    scores = attention_scores(q_BQHE, k_BSKE, scale)
    probs = attention_softmax(scores, causal, window, softcap, sinks_H)
    return attention_context(probs, v_BSKU)
