"""Attention over rows, packed documents and a paged cache, and that cache's schedule, for `bench ops`.

Legend: B sequences  Q queries  S keys  T tokens  H query heads  K key heads  E head dim  N blocks  P tokens a block
        M blocks a sequence at most  U parts of a schedule  X numbers of a part
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rooflight.ops.attention import attention, attention_schedule, packed_attention, paged_attention
from rooflight.ops.batch import Batch, Group
from rooflight.workload.op_bench import installed
from rooflight.workload.op_bench.case import Absent, Args, Draw, Operation, Peer
from rooflight.workload.op_bench.dense import fused_qkv

PAGE = 16
Groups = tuple[tuple[int, int, int], ...]


def _head(q_QE: Tensor, k_SE: Tensor, v_SE: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale)·v as it is written, the last query seeing the last key."""
    hidden_QS = torch.ones(q_QE.shape[0], k_SE.shape[0], dtype=torch.bool, device=q_QE.device)
    hidden_QS = hidden_QS.triu(1 + k_SE.shape[0] - q_QE.shape[0])
    return (q_QE @ k_SE.t() * scale).masked_fill(hidden_QS, float("-inf")).softmax(-1) @ v_SE


def written_out(q_BQHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, scale: float) -> Tensor:
    """Attention head by head, so that only one head's scores are in memory, in the backward too."""
    group = q_BQHE.shape[2] // k_BSKE.shape[2]
    sequences = []
    for q_QHE, k_SKE, v_SKE in zip(q_BQHE, k_BSKE, v_BSKE):
        heads: list[Any] = []
        for h in range(q_QHE.shape[1]):
            tensors = q_QHE[:, h], k_SKE[:, h // group], v_SKE[:, h // group]
            heads.append(checkpoint(_head, *tensors, scale, use_reentrant=False))
        sequences.append(torch.stack(heads, 1))
    return torch.stack(sequences)


def _rows(draw: Draw, sequences: int, heads: int, key_heads: int, tokens: int, head_dim: int) -> Args:
    q, k, v = (draw(sequences, tokens, count, head_dim) for count in (heads, key_heads, key_heads))
    return q, k, v, head_dim**-0.5


def _rows_label(sequences: int, heads: int, key_heads: int, tokens: int, head_dim: int) -> str:
    return f"{sequences}×{_ratio(heads, key_heads)}×{tokens} d{head_dim}"


def _ratio(heads: int, key_heads: int) -> str:
    return f"{heads}" if heads == key_heads else f"{heads}:{key_heads}"


def _causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


def _rows_masked(create: Any, q_BQHE: Tensor, k: Tensor, v: Tensor, scale: float) -> Args:
    tokens = q_BQHE.shape[1]
    return q_BQHE, k, v, scale, create(_causal, None, None, tokens, tokens, device=q_BQHE.device)


def _rows_peers(device: torch.device) -> list[Peer]:
    return [
        *installed.sdpa_backends(device),
        *installed.flex(device, _rows_masked),
        *installed.flash_attention(
            device,
            "flash_attn_func",
            lambda function, q, k, v, scale: function(q, k, v, softmax_scale=scale, causal=True),
        ),
    ]


def _lengths(documents: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    return tuple(length for count, length in documents for _ in range(count))


def _documents(draw: Draw, documents: Any, heads: int, key_heads: int, head_dim: int) -> Args:
    lengths = _lengths(documents)
    q, k, v = fused_qkv(draw, sum(lengths), heads, key_heads, head_dim)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=draw.device)
    return q.contiguous(), k.contiguous(), v.contiguous(), starts, lengths, head_dim**-0.5


def _documents_label(documents: Any, heads: int, key_heads: int, head_dim: int) -> str:
    told = "+".join(f"{count}×{length}" for count, length in documents)
    return f"{told}, {_ratio(heads, key_heads)} d{head_dim}"


def _each(attend: Any, q_THE: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Any, scale: float) -> Tensor:
    """`attend` over one document after the other."""
    parts = zip(*(x.split(lengths) for x in (q_THE, k, v)))
    return torch.cat([attend(*(x.unsqueeze(0) for x in part), scale)[0] for part in parts])


def _documents_masked(
    create: Any, q_THE: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Any, scale: float
) -> Args:
    tokens = q_THE.shape[0]
    of_T = torch.searchsorted(starts[1:], torch.arange(tokens, device=starts.device, dtype=starts.dtype), right=True)

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (of_T[query] == of_T[key])

    block_mask = create(mask, None, None, tokens, tokens, device=q_THE.device)
    return q_THE, k, v, scale, block_mask


def _documents_peers(device: torch.device) -> list[Peer]:
    def flat(peer: Peer) -> Peer:
        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            return peer.call(*(x.unsqueeze(0) for x in (q, k, v)), *rest)[0]

        return Peer(peer.name, call, peer.prepare)

    def varlen(function: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Any, scale: float) -> Any:
        longest = max(lengths)
        return function(q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=True)

    return [
        *map(flat, installed.flex(device, _documents_masked)),
        *installed.flash_attention(device, "flash_attn_varlen_func", varlen),
    ]


def blocks(tokens: int) -> int:
    return -(-tokens // PAGE)


def _step(draw: Draw, groups: Groups) -> tuple[Tensor, Tensor]:
    """(context_lengths_B, query_starts_B1) of a step."""
    contexts = [context for count, _, context in groups for _ in range(count)]
    starts = accumulate((query for count, query, _ in groups for _ in range(count)), initial=0)
    lengths_B, starts_B1 = (torch.tensor(list(x), dtype=torch.int32, device=draw.device) for x in (contexts, starts))
    return lengths_B, starts_B1


def _pages(draw: Draw, groups: Groups, heads: int, key_heads: int, head_dim: int) -> Args:
    """A cache of just the blocks that the sequences hold, in a random order."""
    needed = [blocks(context) for count, _, context in groups for _ in range(count)]
    order = draw.order(sum(needed)).int()
    table_BM = torch.zeros(len(needed), max(needed), dtype=torch.int32, device=draw.device)
    for row, chosen in zip(table_BM, order.split(needed)):
        row[: len(chosen)] = chosen
    k, v = (draw(sum(needed), PAGE, key_heads, head_dim) for _ in range(2))
    q = draw(sum(count * query for count, query, _ in groups), heads, head_dim)
    lengths, starts = _step(draw, groups)
    # The engine makes it once a step, for all layers: no part of an attention's time.
    schedule_UX = attention_schedule(lengths, starts, table_BM.shape[1] * PAGE, key_heads, 0)
    return q, k, v, table_BM, lengths, starts, schedule_UX, head_dim**-0.5, groups


def _groups_label(groups: Groups) -> str:
    def told(count: int, query: int, context: int) -> str:
        if query == context:
            return f"prefill {count}×{context}"
        return f"decode {count}×{context}" if query == 1 else f"chunk {count}×{query} of {context}"

    if len(groups) > 4:
        contexts = [context for _, _, context in groups]
        return f"decode {len(groups)}×{min(contexts)}…{max(contexts)}"
    return " + ".join(told(*group) for group in groups)


def _pages_label(groups: Groups, heads: int, key_heads: int, head_dim: int) -> str:
    return f"{_groups_label(groups)}, {_ratio(heads, key_heads)} d{head_dim}"


def _ours_paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, starts: Tensor, *rest: Any) -> Tensor:
    schedule, scale, groups = rest
    longest = max(query for _, query, _ in groups)
    layout = (table, lengths, starts, longest)
    return paged_attention(q, k, v, *layout, q.shape[-1], scale, schedule_UX=schedule)


def _gathered(q_THE: Tensor, k_NPKE: Tensor, v_NPKE: Tensor, table_BM: Tensor, groups: Groups) -> Iterator[Args]:
    """(q [B,Q,H,E], k and v [B,S,K,E]) of each group, out of the cache."""
    row = token = 0
    for count, query, context in groups:
        table = table_BM[row : row + count, : blocks(context)].long()
        k, v = (cache[table].flatten(1, 2)[:, :context] for cache in (k_NPKE, v_NPKE))
        yield q_THE[token : token + count * query].unflatten(0, (count, query)), k, v
        row, token = row + count, token + count * query


def _each_group(attend: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, *rest: Any) -> Tensor:
    scale, groups = rest[-2:]
    return torch.cat([attend(*part, scale).flatten(0, 1) for part in _gathered(q, k, v, table, groups)])


def _pages_peers(device: torch.device) -> list[Peer]:
    def contiguous(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *rest: Any) -> Args:
        scale, groups = rest[-2:]
        if len(groups) > 1 or groups[0][1] not in (1, groups[0][2]):
            raise Absent
        return *next(_gathered(q, k, v, table, groups)), scale

    def flat(peer: Peer) -> Peer:
        return Peer(peer.name, lambda *args: peer.call(*args).flatten(0, 1), peer.prepare)

    def paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, *rest: Any) -> Args:
        scale, groups = rest[-2:]
        if len(groups) > 1:
            raise Absent
        return q.unflatten(0, groups[0][:2]), k, v, table, lengths, scale

    def cached(function: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Any:
        return function(q, k, v, cache_seqlens=lengths, page_table=table, softmax_scale=scale, causal=True)

    fa3 = installed.flash_attention(device, "flash_attn_with_kvcache", cached, prepare=paged)
    return [
        *(flat(peer) for peer in installed.sdpa_backends(device, contiguous) if peer.name in ("cudnn", "flash")),
        # FlashAttention 2 wants pages of 256 tokens.
        *(flat(peer) for peer in fa3 if peer.name == "fa3"),
    ]


OPERATIONS = [
    Operation(
        "attention",
        "flash attention, causal",
        make=_rows,
        ours=lambda q, k, v, scale: attention(q, k, v, scale, True)[0],
        plain=installed.sdpa,
        reference=written_out,
        label=_rows_label,
        peers=_rows_peers,
        wrt=(0, 1, 2),
        compiles=False,
    ),
    Operation(
        "packed_attention",
        "attention within packed documents, causal; eager: SDPA document by document",
        make=_documents,
        ours=lambda q, k, v, starts, lengths, scale: packed_attention(q, k, v, starts, max(lengths), scale)[0],
        plain=lambda *args: _each(installed.sdpa, *args),
        reference=lambda *args: _each(written_out, *args),
        label=_documents_label,
        peers=_documents_peers,
        wrt=(0, 1, 2),
        batch=lambda documents, *_: Batch.of(_lengths(documents), _lengths(documents)),
        compiles=False,
    ),
    Operation(
        "paged_attention",
        "attention over a paged cache; eager gathers and calls SDPA, cudnn and flash find keys and values gathered",
        make=_pages,
        ours=_ours_paged,
        plain=lambda *args: _each_group(installed.sdpa, *args),
        reference=lambda *args: _each_group(written_out, *args),
        label=_pages_label,
        peers=_pages_peers,
        batch=lambda groups, *_: Batch(tuple(Group(*group) for group in groups)),
        compiles=False,
    ),
    Operation(
        "attention_schedule",
        "how a step's keys are cut into parts of programs, once for all layers; nobody else has one",
        make=lambda draw, groups, key_heads, longest: (*_step(draw, groups), longest, key_heads, 0),
        ours=attention_schedule,
        plain=None,
        label=lambda groups, key_heads, longest: f"{_groups_label(groups)} of {longest}, {key_heads} key heads",
        compiles=False,
    ),
]
