"""Flash attention: softmax(q·kᵀ·scale)·v without the scores ever reaching memory, and its backward.

Dao et al. 2022 (2205.14135): unique bytes are q, k, v and the output; the scores are recomputed in the backward.
Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.attention import cuda, pairs
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

_CHUNK = 256  # query rows at a time: bounds the reference's scores to chunk × S
_aten = torch.ops.aten


def _expand_heads(x_BSKE: Tensor, heads: int) -> Tensor:
    """[B,S,K,E] to [B,H,S,E], each key head shared by its query group."""
    x_BKSE = x_BSKE.transpose(1, 2)
    groups = heads // x_BKSE.shape[1]
    return x_BKSE if groups == 1 else x_BKSE.repeat_interleave(groups, dim=1)


def _torch_has_it(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, softcap: float, sinks: Any) -> bool:
    """Whether torch's own fused attention computes this case; its causal mask is aligned to the first query."""
    plain = not softcap and sinks is None and (not window or window >= k.shape[1])
    return plain and (not causal or q.shape[1] == k.shape[1]) and q.shape[-1] == v.shape[-1]


def _scores(
    q: Tensor, k: Tensor, first: int, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """fp32 scores of a chunk of queries, softcapped and masked, and tanh of the raw scores for the backward."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    tanh = None
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores = softcap * tanh
    rows = torch.arange(q.shape[-2], device=q.device).unsqueeze(-1) + first
    hidden = pairs.hidden_mask(rows, torch.arange(k.shape[-2], device=q.device), causal, window)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, tanh


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
    heads, queries, keys = q_BQHE.shape[2], q_BQHE.shape[1], k_BSKE.shape[1]
    q, k, v = q_BQHE.transpose(1, 2), _expand_heads(k_BSKE, heads), _expand_heads(v_BSKU, heads)
    if q.device.type == "cpu" and _torch_has_it(q_BQHE, k_BSKE, v_BSKU, causal, window, softcap, sinks_H):
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    out = q_BQHE.new_empty((*q_BQHE.shape[:-1], v_BSKU.shape[-1]))
    lse = q_BQHE.new_empty((q.shape[0], heads, queries), dtype=torch.float32)
    for start in range(0, queries, _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores, _ = _scores(q[:, :, rows], k, keys - queries + start, scale, causal, window, softcap)
        chunk_lse = torch.logsumexp(scores, dim=-1)
        if sinks_H is not None:
            # A sink is one more logit in the denominator that carries no value (gpt-oss).
            chunk_lse = torch.logaddexp(chunk_lse, sinks_H.float().view(1, -1, 1))
        probs = torch.exp(scores - chunk_lse.unsqueeze(-1))
        out[:, rows] = (probs @ v.float()).transpose(1, 2).to(out.dtype)
        lse[:, :, rows] = chunk_lse
    return out, lse


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
    return (
        Part("scores", {precision: 2 * head_dim * pair_count}, bytes_read=bytes_qk),
        Part(
            "softmax",
            {VECTOR: softmax_flops(pair_count, rows, softcap, sinks is not None)},
            bytes_read=tensor_bytes(sinks),
        ),
        Part(
            "context",
            {precision: 2 * value_dim * pair_count, VECTOR: rows * value_dim},
            bytes_read=bytes_v,
            bytes_written=bytes_out,
        ),
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


def _sum_groups(grad_BHSE: Tensor, key_heads: int) -> Tensor:
    """[B,H,S,E] to [B,S,K,E]: gradients of a shared key head add up over its query group."""
    grad = grad_BHSE.unflatten(1, (key_heads, -1)).sum(2) if grad_BHSE.shape[1] != key_heads else grad_BHSE
    return grad.transpose(1, 2).contiguous()


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
    heads, key_heads = q_BQHE.shape[2], k_BSKE.shape[2]
    queries, keys = q_BQHE.shape[1], k_BSKE.shape[1]
    q, k, v = q_BQHE.transpose(1, 2), _expand_heads(k_BSKE, heads), _expand_heads(v_BSKU, heads)
    grad, out = grad_BQHU.transpose(1, 2), out_BQHU.transpose(1, 2)
    grad_sinks = q_BQHE.new_zeros((0,)) if sinks_H is None else torch.zeros_like(sinks_H, dtype=torch.float32)
    if q.device.type == "cpu" and _torch_has_it(q_BQHE, k_BSKE, v_BSKU, causal, window, softcap, sinks_H):
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse_BHQ, 0.0, causal, scale=scale
        )
        return dq.transpose(1, 2).contiguous(), _sum_groups(dk, key_heads), _sum_groups(dv, key_heads), grad_sinks
    dq = torch.empty_like(q, dtype=torch.float32)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    for start in range(0, queries, _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores, tanh = _scores(q[:, :, rows], k, keys - queries + start, scale, causal, window, softcap)
        lse = lse_BHQ[:, :, rows].unsqueeze(-1)
        probs, g = torch.exp(scores - lse), grad[:, :, rows].float()
        dv += probs.transpose(-1, -2) @ g
        ds = probs * (g @ v.float().transpose(-1, -2) - delta[:, :, rows])
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
        ds = ds * scale
        dq[:, :, rows] = ds @ k.float()
        dk += ds.transpose(-1, -2) @ q[:, :, rows].float()
        if sinks_H is not None:
            sink_probs = torch.exp(sinks_H.float().view(1, -1, 1, 1) - lse)
            grad_sinks -= (sink_probs * delta[:, :, rows]).sum((0, 2, 3))
    dtype = q_BQHE.dtype
    return (
        dq.transpose(1, 2).to(dtype).contiguous(),
        _sum_groups(dk, key_heads).to(dtype),
        _sum_groups(dv, key_heads).to(dtype),
        grad_sinks if sinks_H is None else grad_sinks.to(sinks_H.dtype),
    )


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
    # Scores again, dQ and dK over E; dP and dV over U. Five products for every pair, where the forward has two.
    scores = Part("scores", {precision: 6 * head_dim * count}, tensor_bytes((q_BQHE, k_BSKE)), tensor_bytes(out[:2]))
    # Scale, subtract, exp; dP − δ, times P, times scale (softcap: divide, tanh, multiply; square, 1 −, multiply).
    softmax = Part(
        "softmax",
        {VECTOR: count * (12 if softcap else 6) + rows * (2 * value_dim + (4 if sinks_H is not None else 0))},
        tensor_bytes((out_BQHU, lse_BHQ, sinks_H)),
        tensor_bytes(out[3]),
    )
    context = Part(
        "context", {precision: 4 * value_dim * count}, tensor_bytes((grad_BQHU, v_BSKU)), tensor_bytes(out[2])
    )
    size = (batch, heads, queries, head_dim, k_BSKE.shape[2])
    return fused_cost((scores, softmax, context), size, precision, Access.SEQUENTIAL)


attention_backward = Op(
    "attention_backward",
    _attention_backward,
    cost=_attention_backward_cost,
    shape=_attention_backward_shape,
    kernel=cuda.backward,
    kernel_takes=cuda.takes_backward,
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
    kernel=cuda.forward,
    kernel_takes=cuda.takes_forward,
    backward=_backward,
    setup=_setup,
)
