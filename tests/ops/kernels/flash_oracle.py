"""Flash attention's oracle: every query against every key over a mask, in any precision, with autograd's gradients.

Legend: B sequences  Q queries  S keys  T tokens  N documents  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Setup:
    """A call: dense where `documents` is empty, else packed documents of these lengths."""

    queries: int = 0
    keys: int = 0
    documents: tuple[int, ...] = ()
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 24
    value_dim: int = 40
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    scale: float = 0.3

    @property
    def options(self) -> tuple[Any, ...]:
        """Between the scale and the sinks: of the operation over packed documents, which is causal, one fewer."""
        return (self.window, self.softcap) if self.documents else (self.causal, self.window, self.softcap)


@dataclass(frozen=True, slots=True)
class Tensors:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    sinks: Tensor | None


def drawn(seed: int, most: int = 90) -> Setup:
    """A case with everything at random, lengths up to `most`."""
    r = random.Random(seed)
    key_heads = r.choice((1, 2, 3))
    queries = r.randint(1, most)
    causal = r.random() < 0.7
    setup = Setup(
        queries,
        queries if causal and r.random() < 0.6 else r.randint(queries if causal else 1, most),
        batch=r.randint(1, 2),
        heads=key_heads * r.choice((1, 2, 3)),
        key_heads=key_heads,
        head_dim=r.choice((8, 16, 24, 40)),
        value_dim=r.choice((8, 16, 24, 40)),
        causal=causal,
        window=r.choice((0, 0, 1, 7, 16, 33, 200)),
        softcap=r.choice((0.0, 0.0, 2.0)),
        sinks=r.random() < 0.4,
    )
    if r.random() < 0.4:
        documents = tuple(r.choice((0, 1, r.randint(1, most // 2), r.randint(1, most))) for _ in range(r.randint(1, 5)))
        return replace(setup, documents=(*documents, 3), batch=1, causal=True)
    return setup


def starts_of(setup: Setup) -> Tensor:
    return torch.tensor([0, *accumulate(setup.documents)], dtype=torch.int32)


def build(setup: Setup, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensors:
    """Normal values; q, k and v are slices of one projection's output, as in a model."""
    g = torch.Generator().manual_seed(seed)
    packed = bool(setup.documents)
    batch = () if packed else (setup.batch,)
    queries = sum(setup.documents) if packed else setup.queries
    keys = queries if packed else setup.keys

    def slices(tokens: int) -> list[Tensor]:
        widths = [setup.heads * setup.head_dim, setup.key_heads * setup.head_dim, setup.key_heads * setup.value_dim]
        wide = torch.randn(*batch, tokens, sum(widths), generator=g).to(device, dtype)
        heads = (setup.heads, setup.key_heads, setup.key_heads)
        return [x.unflatten(-1, (n, -1)) for x, n in zip(wide.split(widths, -1), heads, strict=True)]

    _, k, v = slices(keys)
    grad = torch.randn(*batch, queries, setup.heads, setup.value_dim, generator=g).to(device, dtype)
    sinks = torch.randn(setup.heads, generator=g).to(device, dtype) if setup.sinks else None
    return Tensors(slices(queries)[0], k, v, grad, sinks)


def hidden_of(setup: Setup, queries: int, keys: int, device: Any) -> Tensor:
    age = torch.arange(keys - queries, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    hidden = torch.zeros_like(age, dtype=torch.bool)
    if setup.causal:
        hidden = age < 0
        if setup.window:
            hidden = hidden | (age >= setup.window)
    if setup.documents:
        document = torch.repeat_interleave(torch.arange(len(setup.documents)), torch.tensor(setup.documents))
        hidden = hidden | (document.unsqueeze(1) != document).to(device)
    return hidden


def attend(setup: Setup, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, in the precision of the tensors."""
    if setup.documents:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhe,bshe->bhqs", q, k) * setup.scale
    if setup.softcap:
        scores = setup.softcap * torch.tanh(scores / setup.softcap)
    scores = scores.masked_fill(hidden_of(setup, q.shape[1], k.shape[1], q.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    out = torch.einsum("bhqs,bshu->bqhu", scores.softmax(-1)[..., : k.shape[1]], v)
    lse = scores.logsumexp(-1)
    return (out[0], lse[0]) if setup.documents else (out, lse)


def exact(setup: Setup, tensors: Tensors, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and gradients of q, k, v and, where there are any, sinks; on the same values."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    sinks = None if tensors.sinks is None else tensors.sinks.detach().to(dtype).requires_grad_()
    out, lse = attend(setup, q, k, v, sinks)
    leaves = [q, k, v, *([] if sinks is None else [sinks])]
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, tensors.grad.to(dtype))


def arguments(setup: Setup, tensors: Tensors, device: str = "cpu") -> tuple[Any, ...]:
    """Of the operation's forward."""
    tail = (*setup.options, tensors.sinks)
    if not setup.documents:
        return tensors.q, tensors.k, tensors.v, setup.scale, *tail
    starts = starts_of(setup).to(device)
    return tensors.q, tensors.k, tensors.v, starts, max(setup.documents), setup.scale, *tail
