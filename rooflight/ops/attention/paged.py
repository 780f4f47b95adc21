"""Paged attention over a block table, and the scatter that writes new keys and values into the paged cache.

Kwon et al. 2023 (2309.06180). Context lengths stand in `ops.batch`, for no shape holds them.
Legend: T new tokens  B sequences  N blocks  P tokens a block  M blocks a sequence at most
        H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops import batch
from rooflight.ops.attention import paged_cpu, paged_cuda, pairs
from rooflight.ops.attention.flash import forward_parts, fused_cost
from rooflight.ops.cost import Access, Cost, Count, Movement, Primitive, precision_of, tensor_bytes
from rooflight.ops.op import Op, lazy


def _write_kv(k_TKE: Tensor, v_TKU: Tensor | None, k_NPKE: Tensor, v_NPKU: Tensor | None, slots_T: Tensor) -> None:
    k_NPKE.view(-1, *k_NPKE.shape[2:]).index_copy_(0, slots_T, k_TKE.to(k_NPKE.dtype))
    if v_TKU is not None and v_NPKU is not None:
        v_NPKU.view(-1, *v_NPKU.shape[2:]).index_copy_(0, slots_T, v_TKU.to(v_NPKU.dtype))


def _write_kv_shape(
    k_TKE: Tensor, v_TKU: Tensor | None, k_NPKE: Tensor, v_NPKU: Tensor | None, slots_T: Tensor
) -> None:
    return None


def _write_kv_cost(
    out: None, k_TKE: Tensor, v_TKU: Tensor | None, k_NPKE: Tensor, v_NPKU: Tensor | None, slots_T: Tensor
) -> Cost:
    stored = k_TKE.numel() * k_NPKE.element_size()
    if v_TKU is not None and v_NPKU is not None:
        stored = stored + v_TKU.numel() * v_NPKU.element_size()
    return Cost(
        bytes_read=tensor_bytes((k_TKE, v_TKU, slots_T)),
        bytes_written=stored,
        primitive=Primitive.DATA_MOVEMENT,
        access=Access.RANDOM,
        movement=(Movement.SCATTER,),
        size=(k_TKE.shape[0], k_TKE.shape[1] * k_TKE.shape[2]),
        precision=precision_of(k_TKE),
    )


write_kv = Op(
    "write_kv",
    _write_kv,
    cost=_write_kv_cost,
    shape=_write_kv_shape,
    kernel=lazy("rooflight.ops.kernels.kv_cache", "write_kv"),
    kernel_takes=paged_cuda.takes_write,
    mutates=("k_NPKE", "v_NPKU"),
)


def _gather(cache_NPKE: Tensor, block_table_BM: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of every sequence, one after the other: [B, M·P, K, E]."""
    return cache_NPKE[block_table_BM].flatten(1, 2).to(dtype)


def _paged_attention(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKU: Tensor | None,
    block_table_BM: Tensor,
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    max_query: int,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    schedule_UX: Tensor | None = None,
) -> Tensor:
    if paged_cpu.takes(q_THE, k_NPKE, v_NPKU, softcap):
        layout = (block_table_BM, context_lengths_B, query_starts_B1)
        return paged_cpu.paged_attention(q_THE, k_NPKE, v_NPKU, *layout, value_dim, scale, window, sinks_H)
    tokens, heads, _ = q_THE.shape
    sequences, key_heads = block_table_BM.shape[0], k_NPKE.shape[2]
    keys = _gather(k_NPKE, block_table_BM, q_THE.dtype)
    # With a latent cache (MLA) the values are the first value_dim channels of the keys.
    values = keys[..., :value_dim] if v_NPKU is None else _gather(v_NPKU, block_table_BM, q_THE.dtype)
    query_lengths_B = query_starts_B1[1:] - query_starts_B1[:-1]
    # Ragged queries are laid into [B, max_query] rows; a row beyond a sequence's length repeats its last token.
    columns = torch.arange(max_query, device=q_THE.device)
    inside_BQ = columns < query_lengths_B.unsqueeze(-1)
    rows_BQ = (query_starts_B1[:-1].unsqueeze(-1) + columns).clamp(max=tokens - 1)
    q_BKGQE = q_THE[rows_BQ].unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)
    scores = (q_BKGQE.float() @ keys.float().permute(0, 2, 3, 1).unsqueeze(2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions_BQ = (context_lengths_B - query_lengths_B).unsqueeze(-1) + columns
    key_positions = torch.arange(keys.shape[1], device=q_THE.device)
    hidden = pairs.hidden_mask(positions_BQ.unsqueeze(-1), key_positions, True, window)
    if hidden is None:
        hidden = torch.zeros((), dtype=torch.bool, device=q_THE.device)
    hidden = hidden | (key_positions >= context_lengths_B.view(-1, 1, 1))
    scores = scores.masked_fill(hidden.view(sequences, 1, 1, max_query, -1), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    if sinks_H is not None:
        lse = torch.logaddexp(lse, sinks_H.float().view(1, key_heads, -1, 1, 1))
    # Padding rows see nothing; their NaN must not reach a product.
    probs = torch.exp(scores - lse).nan_to_num(0.0)
    out = probs @ values.float().transpose(1, 2).unsqueeze(2)
    out_BQHU = out.permute(0, 3, 1, 2, 4).reshape(sequences, max_query, heads, value_dim).to(q_THE.dtype)
    if max_query == 1:
        return out_BQHU[:, 0].contiguous()
    result = q_THE.new_empty((tokens, heads, value_dim))
    targets = torch.where(inside_BQ, rows_BQ, tokens)
    padded = torch.cat((result, result.new_zeros((1, heads, value_dim))))
    padded[targets.flatten()] = out_BQHU.flatten(0, 1)
    return padded[:tokens]


def _paged_attention_shape(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKU: Tensor | None,
    block_table_BM: Tensor,
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    max_query: int,
    value_dim: int,
    *_: Any,
) -> Tensor:
    return q_THE.new_empty((q_THE.shape[0], q_THE.shape[1], value_dim))


def _paged_attention_cost(
    out_THU: Tensor,
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKU: Tensor | None,
    block_table_BM: Tensor,
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    max_query: int,
    value_dim: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    schedule_UX: Tensor | None,
) -> Cost:
    tokens, heads, head_dim = q_THE.shape
    key_heads = k_NPKE.shape[2]
    pair_count: Count = 0
    key_count: Count = 0
    sequences: Count = 0
    for group in batch.current().groups:
        pair_count = pair_count + group.count * pairs.visible_pairs(group.query, group.context, True, window)
        key_count = key_count + group.count * pairs.visible_keys(group.query, group.context, window)
        sequences = sequences + group.count
    parts = forward_parts(
        precision_of(q_THE),
        heads * pair_count,
        heads * tokens,
        head_dim,
        value_dim,
        softcap,
        sinks_H,
        tensor_bytes((q_THE, block_table_BM, context_lengths_B))
        + key_count * key_heads * head_dim * k_NPKE.element_size(),
        0 if v_NPKU is None else key_count * key_heads * value_dim * v_NPKU.element_size(),
        tensor_bytes(out_THU),
    )
    # Efficiency is looked up by what a mean sequence reads and asks.
    size = (sequences, key_count // sequences, key_heads * head_dim, heads, tokens // sequences)
    return fused_cost(parts, size, precision_of(q_THE), Access.RANDOM)


paged_attention = Op(
    "paged_attention",
    _paged_attention,
    cost=_paged_attention_cost,
    shape=_paged_attention_shape,
    kernel=lazy("rooflight.ops.kernels.paged_attention", "paged_attention"),
    kernel_takes=paged_cuda.takes_attention,
)


def _gather_kv(
    k_NPKE: Tensor, v_NPKU: Tensor | None, block_table_BM: Tensor, context: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    keys = _gather(k_NPKE, block_table_BM, dtype)[:, :context]
    values = keys[..., :value_dim] if v_NPKU is None else _gather(v_NPKU, block_table_BM, dtype)[:, :context]
    return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)


def _gather_kv_shape(
    k_NPKE: Tensor, v_NPKU: Tensor | None, block_table_BM: Tensor, context: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (block_table_BM.shape[0], context, k_NPKE.shape[2])
    return (
        k_NPKE.new_empty((*shape, k_NPKE.shape[3]), dtype=dtype),
        k_NPKE.new_empty((*shape, value_dim), dtype=dtype),
    )


def _gather_kv_cost(
    out: tuple[Tensor, Tensor],
    k_NPKE: Tensor,
    v_NPKU: Tensor | None,
    block_table_BM: Tensor,
    context: int,
    value_dim: int,
    dtype: torch.dtype,
) -> Cost:
    keys, values = out
    read = keys.numel() * k_NPKE.element_size()
    if v_NPKU is not None:
        read = read + values.numel() * v_NPKU.element_size()
    return Cost(
        bytes_read=read + tensor_bytes(block_table_BM),
        bytes_written=tensor_bytes(out),
        primitive=Primitive.DATA_MOVEMENT,
        access=Access.RANDOM,
        movement=(Movement.GATHER,),
        size=(keys.shape[0] * keys.shape[1], keys.shape[2] * keys.shape[3]),
        precision=precision_of(keys),
    )


gather_kv = Op("gather_kv", _gather_kv, cost=_gather_kv_cost, shape=_gather_kv_shape)
