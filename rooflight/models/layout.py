"""How the tokens of one step lie: dense rows of equal length, or ragged over a paged KV cache.

Legend: T tokens  B sequences  M blocks a sequence at most  N blocks  P tokens a block
        K key heads  E key dim  U value dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflight.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer in blocks; with MLA one latent vector a token and no values."""

    keys: tuple[Tensor, ...]  # a layer each: [N, P, K, E]
    values: tuple[Tensor | None, ...]  # a layer each: [N, P, K, U]

    @staticmethod
    def allocate(config: ModelConfig, blocks: Any, block_size: int, dtype: torch.dtype, device: Any) -> KVCache:
        """Uninitialised cache of `blocks` blocks in each layer."""
        heads, dim = config.kv_heads, config.head_dim
        if config.latent is not None:
            heads, dim = 1, config.latent.kv_rank + config.latent.rope_dim

        def one() -> Tensor:
            return torch.empty((blocks, block_size, heads, dim), dtype=dtype, device=device)

        layers = range(len(config.layers))
        return KVCache(
            tuple(one() for _ in layers), tuple(None if config.latent is not None else one() for _ in layers)
        )


@dataclass(frozen=True, slots=True)
class Paged:
    """Where each sequence's blocks lie and where the new tokens go.

    equal_context: every sequence's context length where all are equal, else None; only naive attention asks.
    """

    cache: KVCache
    block_table_BM: Tensor
    context_lengths_B: Tensor
    query_starts_B1: Tensor
    slots_T: Tensor
    max_query: Any
    equal_context: Any = None


@dataclass(frozen=True, slots=True)
class Layout:
    """dense (B, Q): the T tokens are B whole sequences of Q. paged: they continue what stands in the cache.

    Both: whole new sequences, attended densely, whose keys and values are also written to the cache.
    attention: flash | naive.
    """

    dense: tuple[Any, Any] | None = None
    paged: Paged | None = None
    attention: str = "flash"
