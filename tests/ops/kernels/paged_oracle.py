"""Paged attention's test cases and oracle: caches where all that no query may see is NaN, and fp64 row by row."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Setup:
    """Sequences of one step, the heads, the cache and the mask; pad: rows of q beyond the last sequence's."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16
    page: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    pad: int = 0
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    index: torch.dtype = torch.int32


def numbers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in `dtype`; of fp8 no subnormal ones, of which the interpreter loses bits."""
    x = torch.randn(shape, generator=generator).to(dtype)
    if dtype == FP8:
        x = torch.where(x.float().abs() < torch.finfo(FP8).smallest_normal, 0.0, x.float()).to(FP8)
    return x


def build(setup: Setup, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    """The operation's arguments. Blocks lie in a random order; table entries that no query needs point nowhere."""
    g = torch.Generator().manual_seed(seed)
    s, page = setup, setup.page
    most = max(1, *(-(-c // page) for c in s.contexts)) + 1
    total = sum(-(-c // page) for c in s.contexts) + 3
    order = torch.randperm(total, generator=g).tolist()
    wide = [torch.full((total, page, s.key_heads, s.head_dim), float("nan")).to(s.cache_dtype) for _ in range(2)]
    table = torch.full((len(s.contexts), most), 10**8)
    for b, (query, context) in enumerate(zip(s.queries, s.contexts)):
        oldest = max(0, context - query - s.window + 1) if s.window else 0
        for m in range(oldest // page, -(-context // page)):
            table[b, m] = block = order.pop()
            first, last = max(oldest - m * page, 0), min(page, context - m * page)
            for cache in wide:
                cache[block, first:last] = numbers((last - first, s.key_heads, s.head_dim), s.cache_dtype, g)
    starts = torch.tensor([0, *s.queries]).cumsum(0)
    q = numbers((int(starts[-1]) + s.pad, s.heads, s.head_dim), s.dtype, g)
    sinks = numbers((s.heads,), s.dtype, g) if s.sinks else None
    table, contexts, starts = (x.to(device, s.index) for x in (table, torch.tensor(s.contexts), starts))
    q, k, v = (x.to(device) for x in (q, *wide))
    scale = s.head_dim**-0.5
    most_query = max(1, *s.queries)
    return (
        *(q, k, v, table, contexts, starts, most_query, s.head_dim, scale, s.window, s.softcap),
        None if sinks is None else sinks.to(device),
    )


def exact(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    table_BM: Tensor,
    contexts_B: Tensor,
    starts_B1: Tensor,
    max_query: int,
    value_dim: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each query by itself over the keys that it sees, laid side by side; rows of no sequence are zeros."""
    out_THE = torch.zeros_like(q_THE, dtype=dtype)
    group, page = q_THE.shape[1] // k_NPKE.shape[2], k_NPKE.shape[1]
    starts = starts_B1.tolist()
    for b, context in enumerate(contexts_B.tolist()):
        at = torch.arange(context, device=q_THE.device)
        oldest = max(0, context - (starts[b + 1] - starts[b]) - window + 1) if window else 0
        block = table_BM[b].long()[at[oldest:] // page]
        keys, values = (x[block, at[oldest:] % page].to(dtype).repeat_interleave(group, 1) for x in (k_NPKE, v_NPKE))
        for row in range(starts[b], starts[b + 1]):
            position = context - starts[b + 1] + row
            if position < 0:
                continue
            first = max(0, position - window + 1) if window else 0
            seen = slice(first - oldest, position + 1 - oldest)
            scores = torch.einsum("he,she->hs", q_THE[row].to(dtype), keys[seen]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks_H is not None:
                scores = torch.cat((scores, sinks_H.to(dtype).unsqueeze(1)), 1)
            probs = scores.softmax(1)[:, : position + 1 - first]
            out_THE[row] = torch.einsum("hs,she->he", probs, values[seen])
    return out_THE


def drawn(seed: int) -> Setup:
    """A random case: ragged queries with some of one token and some empty, contexts about the sizes of tiles."""
    r = random.Random(seed)
    sequences = r.choice((1, 2, 5))
    decode = r.random() < 0.4
    queries = tuple(1 if decode else r.choice((0, 1, 1, 2, 17, 70)) for _ in range(sequences))
    contexts = tuple(q + r.choice((0, 1, 14, 63, 64, 65, 130)) for q in queries)
    key_heads = r.choice((1, 2, 3))
    return Setup(
        queries,
        contexts,
        heads=key_heads * r.choice((1, 2, 3, 7, 16)),
        key_heads=key_heads,
        head_dim=r.choice((8, 16, 24, 64)),
        page=r.choice((8, 16, 32, 128)),
        window=r.choice((0, 0, 1, 20, 100)),
        softcap=r.choice((0.0, 0.0, 3.0)),
        sinks=r.random() < 0.4,
        pad=r.choice((0, 3, 40)),
        index=r.choice((torch.int32, torch.int64)),
    )


def with_types(setup: Setup, dtype: torch.dtype, cache_dtype: torch.dtype) -> Setup:
    return replace(setup, dtype=dtype, cache_dtype=cache_dtype)
