"""Attention in plain PyTorch, a chunk of queries at a time: every mask, softcap and sinks, on any device.

Scores of a chunk reach only the keys that some query of it may see, so that memory is chunk × reach and causal
attention does half the work. Nothing here waits for a GPU.
Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  U value dim  C queries of a chunk
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflight.ops.attention import pairs

_CHUNK = 256  # query rows at a time


@dataclass(frozen=True, slots=True)
class Sight:
    """Which keys a query sees and how its score is bent.

    firsts_Q: for each query the first key that it may see, the beginning of its document. reach: the most keys that
    any query sees, itself included, for loops that must not read firsts_Q (0: no limit known).
    """

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    firsts_Q: Tensor | None = None
    reach: int = 0


def expand_heads(x_BSKE: Tensor, heads: int) -> Tensor:
    """[B,S,K,E] to [B,H,S,E], each key head shared by its query group."""
    x_BKSE = x_BSKE.transpose(1, 2)
    groups = heads // x_BKSE.shape[1]
    return x_BKSE if groups == 1 else x_BKSE.repeat_interleave(groups, dim=1)


def sum_groups(grad_BHSE: Tensor, key_heads: int) -> Tensor:
    """[B,H,S,E] to [B,S,K,E]: gradients of a shared key head add up over its query group."""
    grad = grad_BHSE.unflatten(1, (key_heads, -1)).sum(2) if grad_BHSE.shape[1] != key_heads else grad_BHSE
    return grad.transpose(1, 2).contiguous()


def sink_grad(lse_BHQ: Tensor, delta_BHQ: Tensor, sinks_H: Tensor) -> Tensor:
    """−Σ p_sink·δ over sequences and queries: a sink's probability times what its zero value lacks."""
    probs = torch.exp(sinks_H.float().view(1, -1, 1) - lse_BHQ)
    return -(probs * delta_BHQ).sum((0, 2)).to(sinks_H.dtype)


def _chunks(queries: int, keys: int, sight: Sight) -> Iterator[tuple[slice, slice]]:
    """Query rows of a chunk and the keys that they may see; the queries are the last of the keys' positions."""
    for start in range(0, queries, _CHUNK):
        stop = min(start + _CHUNK, queries)
        limits = [n for n in (sight.window, sight.reach) if n]
        first = max(0, keys - queries + start + 1 - min(limits)) if limits and sight.causal else 0
        yield slice(start, stop), slice(first, max(0, keys - queries + stop) if sight.causal else keys)


def _scores(
    q_BHCE: Tensor, k_BHSE: Tensor, rows: slice, columns: slice, offset: int, sight: Sight
) -> tuple[Tensor, Tensor | None]:
    """fp32 scores of a chunk, softcapped and masked, and tanh of the raw scores for the backward."""
    scores = (q_BHCE @ k_BHSE.transpose(-1, -2)) * sight.scale
    tanh = None
    if sight.softcap:
        tanh = torch.tanh(scores / sight.softcap)
        scores = sight.softcap * tanh
    positions = torch.arange(rows.start + offset, rows.stop + offset, device=scores.device).unsqueeze(-1)
    key_positions = torch.arange(columns.start, columns.stop, device=scores.device)
    hidden = pairs.hidden_mask(positions, key_positions, sight.causal, sight.window)
    if sight.firsts_Q is not None:
        before = key_positions < sight.firsts_Q[rows].unsqueeze(-1)
        hidden = before if hidden is None else hidden | before
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores, tanh


def forward(
    q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, sight: Sight, sinks_H: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B,Q,H,U] and log-sum-exp [B,H,Q]."""
    batch, queries, heads, _ = q_BQHE.shape
    keys = k_BSKE.shape[1]
    k, v = (expand_heads(x, heads).float() for x in (k_BSKE, v_BSKU))
    out = q_BQHE.new_empty((batch, queries, heads, v_BSKU.shape[-1]))
    lse = q_BQHE.new_empty((batch, heads, queries), dtype=torch.float32)
    for rows, columns in _chunks(queries, keys, sight):
        q = q_BQHE[:, rows].transpose(1, 2).float()
        scores, _ = _scores(q, k[:, :, columns], rows, columns, keys - queries, sight)
        chunk_lse = torch.logsumexp(scores, dim=-1)
        if sinks_H is not None:
            # A sink is one more logit in the denominator that carries no value (gpt-oss).
            chunk_lse = torch.logaddexp(chunk_lse, sinks_H.float().view(1, -1, 1))
        probs = torch.exp(scores - chunk_lse.unsqueeze(-1))
        out[:, rows] = (probs @ v[:, :, columns]).transpose(1, 2).to(out.dtype)
        lse[:, :, rows] = chunk_lse
    return out, lse


def backward(
    grad_BQHU: Tensor,
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    out_BQHU: Tensor,
    lse_BHQ: Tensor,
    sight: Sight,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks (empty without them); probabilities come again from the log-sum-exp."""
    queries, heads = q_BQHE.shape[1:3]
    keys, key_heads = k_BSKE.shape[1:3]
    k, v = (expand_heads(x, heads).float() for x in (k_BSKE, v_BSKU))
    dq = torch.empty_like(q_BQHE, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    delta_BHQ = (grad_BQHU.float() * out_BQHU.float()).sum(-1).transpose(1, 2)
    for rows, columns in _chunks(queries, keys, sight):
        q, grad = (x[:, rows].transpose(1, 2).float() for x in (q_BQHE, grad_BQHU))
        k_seen, v_seen = k[:, :, columns], v[:, :, columns]
        scores, tanh = _scores(q, k_seen, rows, columns, keys - queries, sight)
        probs = torch.exp(scores - lse_BHQ[:, :, rows].unsqueeze(-1))
        dv[:, :, columns] += probs.transpose(-1, -2) @ grad
        ds = probs * (grad @ v_seen.transpose(-1, -2) - delta_BHQ[:, :, rows].unsqueeze(-1))
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
        ds = ds * sight.scale
        dq[:, rows] = (ds @ k_seen).transpose(1, 2).to(dq.dtype)
        dk[:, :, columns] += ds.transpose(-1, -2) @ q
    dtype = q_BQHE.dtype
    grad_sinks = q_BQHE.new_zeros((0,)) if sinks_H is None else sink_grad(lse_BHQ, delta_BHQ, sinks_H)
    return dq, sum_groups(dk, key_heads).to(dtype), sum_groups(dv, key_heads).to(dtype), grad_sinks
