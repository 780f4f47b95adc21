"""Paged attention on a CPU by torch's fused kernel: the blocks in use are gathered, and query heads go in by groups.

Reading keys is what decoding costs, so the query heads that share a key head become rows of one query. The kernel would
otherwise read the keys once a head, and in bf16 pack them anew each time: for 16 sequences of 160 tokens, 12 heads on
4, on two cores of a Zen 5, 1.7 ms and as rows 0.2. Sequences that decode one token go together, others one by one.
Legend: T new tokens  B sequences  N blocks  P tokens a block  M blocks a sequence at most  R sequences taken together
        C blocks gathered a sequence  S keys  Q queries  H query heads  K key heads  G = H/K  E head dim  U value dim
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from rooflight.ops.attention import pairs

# Queries whose keys are cut off at one place: of 64, 128 and 256 the fastest at 128 to 2,048 queries.
_TILE = 64
# Bytes of keys gathered at once: more would leave the caches before they are read, and grow without bound.
_GATHERED = 8 * 2**20

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def takes(q_THE: Tensor, k_NPKE: Tensor, v_NPKU: Tensor | None, softcap: float) -> bool:
    """Whether the fused kernel computes this call: on a CPU, without a softcap, values as wide as keys or a part."""
    alike = v_NPKU is None or (v_NPKU.shape == k_NPKE.shape and v_NPKU.dtype == k_NPKE.dtype)
    return q_THE.device.type == "cpu" and not softcap and alike and {q_THE.dtype, k_NPKE.dtype} <= _DTYPES


def paged_attention(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKU: Tensor | None,
    block_table_BM: Tensor,
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    value_dim: int,
    scale: float,
    window: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's new tokens over its context, as the operation `paged_attention`: [T, H, U]."""
    starts, contexts = tuple(query_starts_B1.tolist()), tuple(context_lengths_B.tolist())
    cache = _Cache(k_NPKE, v_NPKU, scale, window, sinks_H)
    most = _GATHERED // (cache.block * cache.key_heads * k_NPKE.shape[3] * k_NPKE.element_size())
    plan = _plan(starts, contexts, cache.block, window, most, q_THE.dtype)
    if plan.whole is not None:
        out_THE = cache.decode(q_THE, plan.whole, block_table_BM)
        return out_THE if value_dim == out_THE.shape[-1] else out_THE[..., :value_dim].contiguous()
    out_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
    for group in plan.decoding:
        out_THE[group.tokens_R] = cache.decode(q_THE[group.tokens_R], group, block_table_BM)
    for b in plan.filling:
        new = slice(starts[b], starts[b + 1])
        cache.prefill(q_THE[new], out_THE[new], block_table_BM[b], contexts[b])
    return out_THE if value_dim == out_THE.shape[-1] else out_THE[..., :value_dim].contiguous()


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that decode together.

    tokens_R, rows_R: their new tokens and rows of the block table; rows_R is None where they are all, in order.
    columns_RC: the columns of the table that they see, where not all begin at the first; else the first `blocks`.
    mask: what is added to the scores, [R, 1, 1, S]; None where every key gathered is seen.
    """

    tokens_R: Tensor
    rows_R: Tensor | None
    columns_RC: Tensor | None
    blocks: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """The groups of sequences with one new token, and the sequences with more."""

    decoding: tuple[_Group, ...]
    filling: tuple[int, ...]

    @property
    def whole(self) -> _Group | None:
        """The one group that all sequences are of, if they are."""
        return self.decoding[0] if self.decoding and self.decoding[0].rows_R is None else None


# Every layer of a step asks for the same plan, or for one of two where some layers have a window.
@lru_cache(maxsize=4)
def _plan(
    starts: tuple[int, ...], contexts: tuple[int, ...], block: int, window: int, most: int, dtype: torch.dtype
) -> _Plan:
    """How to take a step's sequences; most: blocks that are gathered at once."""
    new = [stop - start for start, stop in pairwise(starts)]
    spans = {b: _span(contexts[b], 1, block, window) for b, count in enumerate(new) if count == 1}
    groups = []
    for rows in _alike({b: count for b, (_, count) in spans.items()}, most):
        firsts, counts = zip(*(spans[b] for b in rows), strict=True)
        blocks = max(counts)
        columns_RC = None
        if any(firsts):
            # A shorter one's last columns repeat what it has; the mask hides them.
            last_R1 = torch.tensor(firsts).unsqueeze(-1) + torch.tensor(counts).unsqueeze(-1) - 1
            columns_RC = (torch.tensor(firsts).unsqueeze(-1) + torch.arange(blocks)).minimum(last_R1)
        newest_R1 = torch.tensor([[contexts[b] - spans[b][0] * block - 1] for b in rows])
        hidden_RS = pairs.hidden_mask(newest_R1, torch.arange(blocks * block), True, window)
        mask = None if hidden_RS is None or not hidden_RS.any() else _additive(hidden_RS, dtype)[:, None, None]
        rows_R = torch.tensor(rows) if len(rows) < len(contexts) else None
        groups.append(_Group(torch.tensor([starts[b] for b in rows]), rows_R, columns_RC, blocks, mask))
    return _Plan(tuple(groups), tuple(b for b, count in enumerate(new) if count > 1))


def _span(context: int, queries: int, block: int, window: int) -> tuple[int, int]:
    """The first block that the last `queries` tokens see, and how many blocks from there to the context's end."""
    first = max(0, context - queries - window + 1) // block if window else 0
    return first, -(-context // block) - first


def _alike(blocks: dict[int, int], most: int) -> Iterator[list[int]]:
    """Sequences to take together, in rising order: none padded to over twice its blocks, and no more than `most`."""
    left = sorted(blocks, key=lambda b: -blocks[b])
    while left:
        longest = blocks[left[0]]
        fit = max(1, most // longest)
        count = next((i for i, b in enumerate(left[:fit]) if 2 * blocks[b] < longest), min(fit, len(left)))
        yield sorted(left[:count])
        left = left[count:]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: −∞ where a query must not see a key."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


class _Cache:
    """One layer's cache, and how it is attended."""

    def __init__(
        self, k_NPKE: Tensor, v_NPKU: Tensor | None, scale: float, window: int, sinks_H: Tensor | None
    ) -> None:
        self.keys, self.values = k_NPKE, v_NPKU
        self.scale, self.window, self.sinks_H = scale, window, sinks_H
        self.block, self.key_heads = k_NPKE.shape[1], k_NPKE.shape[2]

    def gather(self, blocks_RC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks, [R, K, S, E] each; a latent cache's values are its keys."""
        # Rows of whole blocks: indexing the cache itself copies a head at a time.
        shape, chosen = (blocks_RC.shape[0], -1, *self.keys.shape[2:]), blocks_RC.flatten()

        def of(cache_NPKE: Tensor) -> Tensor:
            taken = cache_NPKE.flatten(1).index_select(0, chosen).view(shape).transpose(1, 2)
            return taken if taken.dtype == dtype else taken.to(dtype)

        k_RKSE = of(self.keys)
        return k_RKSE, k_RKSE if self.values is None else of(self.values)

    def attend(self, q_RKQE: Tensor, k_RKSE: Tensor, v_RKSE: Tensor, mask: Tensor | None) -> Tensor:
        """The fused kernel, and then what each head's sink takes; neighbouring queries are the heads of a group."""
        out_RKQE, lse_RKQ = _fused(q_RKQE, k_RKSE, v_RKSE, 0.0, False, attn_mask=mask, scale=self.scale)
        if self.sinks_H is None:
            return out_RKQE
        sinks_KG = self.sinks_H.float().view(self.key_heads, -1)
        left_RKQ = torch.sigmoid(lse_RKQ - sinks_KG.repeat(1, q_RKQE.shape[2] // sinks_KG.shape[1]))
        return out_RKQE * left_RKQ.unsqueeze(-1).to(out_RKQE.dtype)

    def decode(self, q_RHE: Tensor, group: _Group, table_BM: Tensor) -> Tensor:
        """One new token of each sequence of the group: [R, H, E]."""
        table = table_BM if group.rows_R is None else table_BM[group.rows_R]
        blocks_RC = table[:, : group.blocks] if group.columns_RC is None else table.gather(1, group.columns_RC)
        k, v = self.gather(blocks_RC, q_RHE.dtype)
        return self.attend(q_RHE.unflatten(1, (self.key_heads, -1)), k, v, group.mask).reshape(q_RHE.shape)

    def prefill(self, q_QHE: Tensor, out_QHE: Tensor, table_M: Tensor, context: int) -> None:
        """The last Q tokens of one sequence, a tile of them at a time with the keys that it sees, into out_QHE."""
        queries, window = q_QHE.shape[0], self.window
        first, count = _span(context, queries, self.block, window)
        k, v = self.gather(table_M[None, first : first + count], q_QHE.dtype)
        heads = (self.key_heads, q_QHE.shape[1] // self.key_heads)
        offset = context - queries - first * self.block
        tile = min(_TILE, queries)
        width = min(offset + queries, tile + window - 1) if window else offset + queries
        # Aligned to its lower right corner, one mask serves every tile.
        newest = torch.arange(width - tile, width).repeat_interleave(heads[1]).unsqueeze(-1)
        hidden = pairs.hidden_mask(newest, torch.arange(width), True, window)
        mask = None if hidden is None else _additive(hidden, q_QHE.dtype)
        for start in range(0, queries, tile):
            stop = min(start + tile, queries)
            seen = slice(max(0, offset + start - window + 1) if window else 0, offset + stop)
            part = None
            if mask is not None:
                part = mask[(tile - (stop - start)) * heads[1] :, width - (seen.stop - seen.start) :]
            rows_KQE = q_QHE[start:stop].unflatten(1, heads).transpose(0, 1).flatten(1, 2)
            out_KQE = self.attend(rows_KQE.unsqueeze(0), k[:, :, seen], v[:, :, seen], part)[0]
            out_QHE[start:stop] = out_KQE.unflatten(1, (stop - start, -1)).transpose(0, 1).flatten(1, 2)
