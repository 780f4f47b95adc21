"""How the tokens of one step lie: dense rows of equal length, packed documents, or ragged over a paged KV cache.

Legend: T tokens  B sequences  M blocks a sequence at most  N blocks  P tokens a block
        K key heads  E key dim  U value dim  (N1 of Documents: documents + 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.ops.attention import attention_schedule
from rooflight.ops.batch import Batch


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
    schedules: a window's each, of `attention_schedule`, where layers share them.
    """

    cache: KVCache
    block_table_BM: Tensor
    context_lengths_B: Tensor
    query_starts_B1: Tensor
    slots_T: Tensor
    max_query: Any
    equal_context: Any = None
    schedules: Mapping[int, Tensor] = field(default_factory=dict)

    def scheduled(self, windows: Iterable[int]) -> Paged:
        """With a schedule for each window of a model's layers."""
        longest = self.block_table_BM.shape[1] * self.cache.keys[0].shape[1]
        of = (self.context_lengths_B, self.query_starts_B1, longest, self.cache.keys[0].shape[2])
        return replace(self, schedules={window: attention_schedule(*of, window) for window in windows})


@dataclass(frozen=True, slots=True)
class Documents:
    """Where each document begins in the flat tokens: int32 from 0 to T, rising; no document exceeds max_length.

    A document may be empty, so that a step of fewer documents can have the shapes of one of more.
    """

    starts_N1: Tensor
    max_length: Any


@dataclass(frozen=True, slots=True)
class Layout:
    """dense (B, Q): the T tokens are B whole sequences of Q. paged: they continue what stands in the cache.

    Both: whole new sequences, attended densely, whose keys and values are also written to the cache.
    documents: the T tokens are whole sequences of any lengths, one after the other; neither dense nor paged.
    attention: flash | naive.
    """

    dense: tuple[Any, Any] | None = None
    paged: Paged | None = None
    attention: str = "flash"
    documents: Documents | None = None

    @property
    def whole(self) -> bool:
        """Whether the tokens are whole sequences, which attend to themselves and not to the cache."""
        return self.dense is not None or self.documents is not None

    @property
    def cached(self) -> Paged | None:
        """Where the cache is that the tokens attend to, as a serving step's do."""
        return None if self.whole else self.paged

    @staticmethod
    def of_documents(lengths: Sequence[int], device: Any = None, max_length: int = 0) -> tuple[Layout, Batch]:
        """Documents of these lengths packed one after the other, and the `Batch` that prices them.

        max_length: a bound that stays the same from step to step; the longest document's length when 0.
        Raises InvalidValue on a negative length, no token at all, or a document beyond max_length.
        """
        longest = max(lengths, default=0)
        if longest < 1 or min(lengths) < 0:
            raise InvalidValue(f"document lengths {list(lengths)} need a token at least, and none may be negative")
        if max_length and longest > max_length:
            raise InvalidValue(f"a document of {longest} tokens exceeds max_length {max_length}; cut it into pieces")
        starts_N1 = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        return Layout(documents=Documents(starts_N1, max_length or longest)), Batch.of(lengths, lengths)
