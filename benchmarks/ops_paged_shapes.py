"""The steps that `ops_paged` times, and their inputs in a paged cache."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch

from rooflight.ops.attention import attention_schedule

COLD_BYTES = 256 * 2**20
MOST_SETS = 64
PAGE, HEAD_DIM, MODEL_LENGTH = 16, 128, 40960

Args = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """New tokens and contexts of a step's sequences."""

    label: str
    heads: int
    key_heads: int
    queries: tuple[int, ...]
    contexts: tuple[int, ...]

    @property
    def bytes(self) -> int:
        cached = 2 * sum(self.contexts) * self.key_heads * HEAD_DIM
        return 2 * (cached + 2 * sum(self.queries) * self.heads * HEAD_DIM)

    @property
    def flops(self) -> int:
        pairs = sum(q * (c - q) + q * (q + 1) // 2 for q, c in zip(self.queries, self.contexts))
        return 4 * pairs * self.heads * HEAD_DIM


def decode(batch: int, context: int, heads: int, key_heads: int) -> Shape:
    label = f"decode {batch}×{context} {heads}:{key_heads}"
    return Shape(label, heads, key_heads, (1,) * batch, (context,) * batch)


def ragged(batch: int, heads: int, key_heads: int) -> Shape:
    """As an offline run decodes: requests at every point of their lives."""
    draw = random.Random(batch)
    contexts = tuple(draw.randint(100, 2048) for _ in range(batch))
    return Shape(f"ragged {batch}×U(100,2048) {heads}:{key_heads}", heads, key_heads, (1,) * batch, contexts)


def prefill(batch: int, tokens: int, heads: int, key_heads: int) -> Shape:
    return Shape(
        f"prefill {batch}×{tokens} {heads}:{key_heads}", heads, key_heads, (tokens,) * batch, (tokens,) * batch
    )


DECODES = [
    *(
        decode(b, c, 32, 8)
        for b, c in ((1, 8192), (1, 65536), (8, 8192), (32, 4096), (128, 2048), (128, 512), (128, 300))
    ),
    decode(1, 65536, 64, 8),
    *(decode(b, c, 16, 8) for b, c in ((256, 600), (128, 256), (1, 256), (8, 256), (32, 256), (1, 1024), (1, 8192))),
]
RAGGED = [ragged(b, h, 8) for h in (16, 32, 64) for b in (256, 128, 64, 16)]
PREFILLS = [prefill(b, t, h, 8) for h in (16, 32) for b, t in ((1, 1024), (1, 8192), (16, 1024))]
MIXED = [
    Shape("mixed 64×1024, chunk 1×1984 of 4096, 16:8", 16, 8, (1,) * 64 + (1984,), (1024,) * 64 + (4096,)),
    Shape("mixed 64×1024, chunk 1×1984 of 4096, 32:8", 32, 8, (1,) * 64 + (1984,), (1024,) * 64 + (4096,)),
    Shape("chunk 1×2048 of 16384, 32:8", 32, 8, (2048,), (16384,)),
    Shape("chunk 1×64 of 16384, 32:8", 32, 8, (64,), (16384,)),
]
SHAPES: dict[str, list[Shape]] = {"decode": DECODES, "ragged": RAGGED, "prefill": PREFILLS, "mixed": MIXED}


def sets_of(shape: Shape) -> list[Args]:
    """Arguments that take turns: blocks of one cache in a random order, none of them twice before it has gone cold."""
    needed = [-(-c // PAGE) for c in shape.contexts]
    count = min(MOST_SETS, max(2, -(-COLD_BYTES // shape.bytes)))
    blocks = count * sum(needed)
    k, v = (torch.randn(blocks, PAGE, shape.key_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    order = torch.randperm(blocks, dtype=torch.int32, device="cuda").split(needed * count)
    starts = torch.tensor([0, *itertools.accumulate(shape.queries)], dtype=torch.int32, device="cuda")
    contexts = torch.tensor(shape.contexts, dtype=torch.int32, device="cuda")
    width = max(MODEL_LENGTH // PAGE, *needed)
    # Made once a step, for all layers: no part of an attention's time.
    schedule = attention_schedule(contexts, starts, width * PAGE, shape.key_heads, 0)
    sets = []
    for first in range(0, len(order), len(needed)):
        table = torch.zeros(len(needed), width, dtype=torch.int32, device="cuda")
        for row, chosen in zip(table, order[first:]):
            row[: len(chosen)] = chosen
        q = torch.randn(sum(shape.queries), shape.heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        mask = (HEAD_DIM**-0.5, 0, 0.0, None)
        sets.append((q, k, v, table, contexts, starts, max(shape.queries), HEAD_DIM, *mask, schedule))
    return sets
