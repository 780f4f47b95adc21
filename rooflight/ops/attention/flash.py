"""Flash attention: softmax(q·kᵀ·scale)·v without the scores ever reaching memory, and its backward.

Dao et al. 2022 (2205.14135): unique bytes are q, k, v and the output; the scores are recomputed in the backward.
Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.attention import choice, chunked, cpu, pairs
from rooflight.ops.attention.chunked import Sight
from rooflight.ops.cost import (
    VECTOR,
    Access,
    Cost,
    Count,
    Movement,
    Part,
    Primitive,
    precision_of,
    tensor_bytes,
)
from rooflight.ops.op import Op


def _attention(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if cpu.takes(q_BQHE, k_BSKE, v_BSKU, causal, window, softcap, sinks_H):
        return cpu.forward(q_BQHE, k_BSKE, v_BSKU, scale, causal, window)
    return chunked.forward(q_BQHE, k_BSKE, v_BSKU, Sight(scale, causal, window, softcap), sinks_H)


def _attention_shape(q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q_BQHE.shape
    out = q_BQHE.new_empty((batch, queries, heads, v_BSKU.shape[-1]))
    return out, q_BQHE.new_empty((batch, heads, queries), dtype=torch.float32)


def softmax_flops(pair_count: Count, rows: Count, softcap: float, sinks: bool) -> Count:
    """Scale, maximum, subtract, exp, sum for a pair (softcap: divide, tanh, multiply); log and add for a row."""
    return pair_count * (8 if softcap else 5) + rows * (5 if sinks else 2)


def forward_parts(
    precision: str,
    pair_count: Count,
    rows: Count,
    head_dim: Count,
    value_dim: Count,
    softcap: float,
    sinks: Tensor | None,
    bytes_qk: Count,
    bytes_v: Count,
    bytes_out: Count,
) -> tuple[Part, ...]:
    """Scores, softmax and context of a fused attention; pair_count and rows already summed over heads."""
    # In fp32 the products are vector work too, and add to the division of each row.
    context = {precision: 2 * value_dim * pair_count}
    context[VECTOR] = context.get(VECTOR, 0) + rows * value_dim
    return (
        Part("scores", {precision: 2 * head_dim * pair_count}, bytes_read=bytes_qk),
        Part(
            "softmax",
            {VECTOR: softmax_flops(pair_count, rows, softcap, sinks is not None)},
            bytes_read=tensor_bytes(sinks),
        ),
        Part(
            "context",
            context,
            bytes_read=bytes_v,
            bytes_written=bytes_out,
        ),
    )


def backward_parts(
    precision: str,
    pair_count: Count,
    rows: Count,
    head_dim: Count,
    value_dim: Count,
    softcap: float,
    sinks: bool,
    read: tuple[Any, Any, Any],
    written: tuple[Any, Any, Any],
) -> tuple[Part, ...]:
    """Scores, softmax and context of a fused backward, with the tensors that each reads and writes.

    Scores again, dQ and dK over E; dP and dV over U: five products for every pair, where the forward has two.
    """
    # Scale, subtract, exp; dP − δ, times P, times scale (softcap: divide, tanh, multiply; square, 1 −, multiply).
    softmax = pair_count * (12 if softcap else 6) + rows * (2 * value_dim + (4 if sinks else 0))
    flops = (
        ("scores", {precision: 6 * head_dim * pair_count}),
        ("softmax", {VECTOR: softmax}),
        ("context", {precision: 4 * value_dim * pair_count}),
    )
    return tuple(
        Part(name, count, tensor_bytes(r), tensor_bytes(w))
        for (name, count), r, w in zip(flops, read, written, strict=True)
    )


def fused_cost(parts: tuple[Part, ...], size: tuple[Count, ...], precision: str, access: Access) -> Cost:
    """One kernel's cost as the sum of its parts."""
    flops: dict[str, Count] = {}
    read: Count = 0
    written: Count = 0
    for part in parts:
        read, written = read + part.bytes_read, written + part.bytes_written
        for name, count in part.flops.items():
            flops[name] = flops.get(name, 0) + count
    return Cost(
        flops=flops,
        bytes_read=read,
        bytes_written=written,
        primitive=Primitive.DYNAMIC,
        access=access,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=size,
        precision=precision,
        parts=parts,
    )


def _attention_cost(
    out: tuple[Tensor, Tensor],
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> Cost:
    batch, queries, heads, head_dim = q_BQHE.shape
    keys, key_heads = k_BSKE.shape[1], k_BSKE.shape[2]
    count = batch * heads * pairs.visible_pairs(queries, keys, causal, window)
    parts = forward_parts(
        precision_of(q_BQHE),
        count,
        batch * heads * queries,
        head_dim,
        v_BSKU.shape[-1],
        softcap,
        sinks_H,
        tensor_bytes((q_BQHE, k_BSKE)),
        tensor_bytes(v_BSKU),
        tensor_bytes(out),
    )
    size = (batch, heads, queries, head_dim, key_heads)
    return fused_cost(parts, size, precision_of(q_BQHE), Access.SEQUENTIAL)


def _attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cpu.takes(q_BQHE, k_BSKE, v_BSKU, causal, window, softcap, sinks_H):
        grads = cpu.backward(grad_BQHU, q_BQHE, k_BSKE, v_BSKU, out_BQHU, lse_BHQ, scale, causal, window)
        return *grads, q_BQHE.new_zeros((0,))
    sight = Sight(scale, causal, window, softcap)
    return chunked.backward(grad_BQHU, q_BQHE, k_BSKE, v_BSKU, out_BQHU, lse_BHQ, sight, sinks_H)


def _attention_backward_shape(
    grad_BQHU: Tensor, q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks_H = rest[-1]
    grad_sinks = q_BQHE.new_empty((0,)) if sinks_H is None else sinks_H.new_empty(sinks_H.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_BQHE, k_BSKE, v_BSKU))
    return dq, dk, dv, grad_sinks


def _attention_backward_cost(
    out: tuple[Tensor, ...],
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
) -> Cost:
    batch, queries, heads, head_dim = q_BQHE.shape
    value_dim, precision = v_BSKU.shape[-1], precision_of(q_BQHE)
    count = batch * heads * pairs.visible_pairs(queries, k_BSKE.shape[1], causal, window)
    rows = batch * heads * queries
    parts = backward_parts(
        precision,
        count,
        rows,
        head_dim,
        value_dim,
        softcap,
        sinks_H is not None,
        read=((q_BQHE, k_BSKE), (out_BQHU, lse_BHQ, sinks_H), (grad_BQHU, v_BSKU)),
        written=(out[:2], out[3], out[2]),
    )
    size = (batch, heads, queries, head_dim, k_BSKE.shape[2])
    return fused_cost(parts, size, precision, Access.SEQUENTIAL)


attention_backward = Op(
    "attention_backward",
    _attention_backward,
    cost=_attention_backward_cost,
    shape=_attention_backward_shape,
    kernel=choice.backward,
    kernel_takes=choice.takes_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal, ctx.window, ctx.softcap, sinks = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, sinks)


def _backward(ctx: Any, grad_BQHU: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, sinks = ctx.saved_tensors
    dq, dk, dv, grad_sinks = attention_backward(
        grad_BQHU, q, k, v, out, lse, ctx.scale, ctx.causal, ctx.window, ctx.softcap, sinks
    )
    return dq, dk, dv, None, None, None, None, None if sinks is None else grad_sinks


attention = Op(
    "attention",
    _attention,
    cost=_attention_cost,
    shape=_attention_shape,
    kernel=choice.forward,
    kernel_takes=choice.takes_forward,
    backward=_backward,
    setup=_setup,
)
