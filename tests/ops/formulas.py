"""What every operation means, as naive fp64 PyTorch that shares no code with the operations.

A formula takes an operation's own arguments. A backward operation's formula is the gradient of its forward's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gradients(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of Σ f(inputs)·grad; zeros where f does not depend on an input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = f(*leaves)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.einsum("...k,nk->...n", x, weight)
    return out if bias is None else out + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def rms_norm_backward(g: Tensor, gr: Tensor | None, x: Tensor, w: Tensor, eps: float, offset: float) -> Any:
    dx, dw = gradients(lambda a, b: rms_norm(a, b, eps, offset), (x, w), g)
    return (dx if gr is None else dx + gr), dw


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() * weight + bias


def layer_norm_backward(g: Tensor, gr: Tensor | None, x: Tensor, w: Tensor, eps: float) -> Any:
    dx, dw, db = gradients(lambda a, b, c: layer_norm(a, b, c, eps), (x, w, torch.zeros_like(w)), g)
    return (dx if gr is None else dx + gr), dw, db


def rotary_table(positions: Tensor, frequencies: Tensor, scale: float) -> Any:
    turns = torch.polar(torch.full((), scale, dtype=torch.float64), torch.outer(positions.double(), frequencies))
    return turns.real, turns.imag


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Any:
    """As a complex product of each pair of channels."""
    turn = torch.complex(cos, -sin if inverse else sin).unsqueeze(1)
    width = 2 * cos.shape[1]

    def apply(x: Tensor) -> Tensor:
        pairs = x[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
        a, b = (pairs[..., 0], pairs[..., 1]) if interleaved else (pairs[..., 0, :], pairs[..., 1, :])
        out = torch.complex(a, b) * turn
        return torch.cat((torch.stack((out.real, out.imag), -1 if interleaved else -2).flatten(-2), x[..., width:]), -1)

    return apply(q), apply(k)


def rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, key_heads: int, interleaved: bool) -> Any:
    q, k, v = qkv.unflatten(1, (heads + 2 * key_heads, -1)).split((heads, key_heads, key_heads), 1)
    return *rotary(q, k, cos, sin, interleaved, False), v.contiguous()


def rotary_qkv_backward(gq: Tensor, gk: Tensor, gv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.cat((*rotary(gq, gk, cos, sin, interleaved, True), gv), 1).flatten(1)


def activation(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return x / (1 + (-x).exp())
    if kind == "gelu":
        return x * torch.distributions.Normal(0.0, 1.0).cdf(x)
    if kind == "gelu_tanh":
        return x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
    return x * (x > 0)


def gated_activation(x: Tensor, kind: str) -> Tensor:
    if kind == "clamped_swiglu":
        gate, up = x[..., 0::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate / (1 + (-1.702 * gate).exp())
    half = x.shape[-1] // 2
    return activation(x[..., :half], kind) * x[..., half:]


def embedding(tokens: Tensor, weight: Tensor, scale: float) -> Tensor:
    return weight[tokens] * scale


def _mask(queries: int, keys: int, causal: bool, window: int) -> Tensor:
    """True where a query sees a key."""
    if not causal:
        return torch.ones(queries, keys, dtype=torch.bool)
    distance = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
    return (distance >= 0) & ((distance < window) if window else True)


def attention_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bqhe,bshe->bhqs", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))


def attention_softmax(s: Tensor, causal: bool, window: int, softcap: float, sinks: Tensor | None) -> Tensor:
    s = softcap * (s / softcap).tanh() if softcap else s
    weights = s.exp() * _mask(s.shape[2], s.shape[3], causal, window)
    total = weights.sum(-1, keepdim=True)
    return weights / (total if sinks is None else total + sinks.exp().view(1, -1, 1, 1))


def attention_context(probs: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqs,bshu->bqhu", probs, v.repeat_interleave(probs.shape[1] // v.shape[2], 2))


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = attention_scores(q, k, scale)
    out = attention_context(attention_softmax(scores, causal, window, softcap, sinks), v)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    total = (scores.exp() * _mask(q.shape[1], k.shape[1], causal, window)).sum(-1)
    return out, (total if sinks is None else total + sinks.exp().view(1, -1, 1)).log()


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    table: Tensor,
    contexts: Tensor,
    starts: Tensor,
    max_query: int,
    value_dim: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Each sequence by itself, over its keys laid side by side."""
    out = []
    for i, context in enumerate(contexts.tolist()):
        keys = torch.cat([k[block] for block in table[i]])[:context]
        values = keys[..., :value_dim] if v is None else torch.cat([v[block] for block in table[i]])[:context]
        queries = q[int(starts[i]) : int(starts[i + 1])]
        out.append(attention(queries[None], keys[None], values[None], scale, True, window, softcap, sinks)[0][0])
    return torch.cat(out)


def gather_kv(
    k: Tensor, v: Tensor | None, table: Tensor, context: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    keys = torch.stack([torch.cat([k[block] for block in blocks]) for blocks in table])
    values = keys if v is None else torch.stack([torch.cat([v[block] for block in blocks]) for blocks in table])
    return keys[:, :context], values[:, :context, :, :value_dim]


def write_kv(k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor) -> None:
    block = k_cache.shape[1]
    for t, slot in enumerate(slots.tolist()):
        k_cache[slot // block, slot % block] = k[t]
        if v is not None and v_cache is not None:
            v_cache[slot // block, slot % block] = v[t]


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, softcap: float) -> tuple[Tensor, Tensor]:
    z = softcap * (logits / softcap).tanh() if softcap else logits
    lse = z.exp().sum(-1).log()
    losses = [lse[t] - z[t, int(target)] for t, target in enumerate(targets) if target != ignore_index]
    return torch.stack(losses).mean(), lse


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int) -> Tensor:
    return cross_entropy(x @ weight.T, targets, ignore_index, softcap)[0]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Filter after filter on normalised probabilities, token by token."""
    out = []
    for b, row in enumerate(logits):
        if temperature[b] == 0:
            out.append(int(row.argmax()))
            continue
        probs = (row / temperature[b]).softmax(-1)
        probs = torch.where(probs >= min_p[b] * probs.max(), probs, 0.0)
        ranked = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
        if top_k[b] > 0:
            probs[ranked[int(top_k[b]) :]] = 0
        probs, mass, kept = probs / probs.sum(), 0.0, []
        for i in ranked:
            if kept and mass >= top_p[b]:
                break
            kept.append(i)
            mass += float(probs[i])
        draw, upto, token = float(uniform[b]) * mass, 0.0, kept[-1]
        for i in kept:
            upto += float(probs[i])
            if upto >= draw:
                token = i
                break
        out.append(token)
    return torch.tensor(out)


def adamw(
    p: Any, g: Any, m: Any, v: Any, masters: Any, step: int, lr: float, b1: float, b2: float, eps: float, wd: float
) -> None:
    """The published update, bias corrections on the moments themselves."""
    for i, param in enumerate(p):
        value = masters[i] if masters else param
        m[i].copy_(b1 * m[i] + (1 - b1) * g[i])
        v[i].copy_(b2 * v[i] + (1 - b2) * g[i] ** 2)
        mean, square = m[i] / (1 - b1**step), v[i] / (1 - b2**step)
        value.copy_(value - lr * wd * value - lr * mean / (square.sqrt() + eps))
        param.copy_(value)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """Token by token, choosing by Python's own sort."""
    weights, experts = [], []
    for row in logits:
        scores = {"softmax": row.softmax(-1), "sigmoid": 1 / (1 + (-row).exp()), "softmax_topk": row}[scoring]
        choice = (scores if bias is None else scores + bias).tolist()
        size = len(choice) // groups
        best = 1 if group_score == "max" else 2
        ranks = [sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -ranks[g])[:top_groups]
        allowed = [x for x in range(len(choice)) if x // size in kept]
        chosen = sorted(allowed, key=lambda x: -choice[x])[:top_k]
        picked = scores[chosen]
        if scoring == "softmax_topk":
            picked = picked.softmax(-1)
        elif normalize:
            picked = picked / picked.sum()
        weights.append(picked * scale)
        experts.append(torch.tensor(chosen))
    return torch.stack(weights), torch.stack(experts)


def route_backward(
    grad: Tensor, logits: Tensor, experts: Tensor, scoring: str, normalize: bool, scale: float
) -> Tensor:
    def weights(logits: Tensor) -> Tensor:
        scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
        if scoring == "softmax_topk":
            return logits.gather(1, experts).softmax(-1) * scale
        picked = scores.gather(1, experts)
        return (picked / picked.sum(-1, keepdim=True) if normalize else picked) * scale

    return gradients(weights, (logits,), grad)[0]


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = experts.flatten().tolist()
    source = sorted(range(len(flat)), key=lambda r: flat[r])
    counts = torch.tensor([flat.count(e) for e in range(num_experts)])
    return x[[r // experts.shape[1] for r in source]], torch.tensor(source), counts


def unpermute(y: Tensor, weights: Tensor, source: Tensor) -> Tensor:
    rows = y[torch.argsort(source)].view(*weights.shape, -1)
    return torch.einsum("tkd,tk->td", rows, weights)


def _expert_of_row(counts: Tensor) -> list[int]:
    return [e for e, count in enumerate(counts.tolist()) for _ in range(count)]


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    expert = _expert_of_row(counts)
    out = torch.einsum("rk,rnk->rn", x, weight[expert])
    return out if bias is None else out + bias[expert]
