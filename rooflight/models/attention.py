"""The attention block of a decoder: fused QKV, rotary positions, cache, attention, output projection.

Legend: T tokens  D width  H query heads  K key heads  E head dim  B sequences  Q tokens a sequence
        W = (H + 2K)·E  C rotary frequencies
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rooflight.errors import InvalidValue
from rooflight.models.config import LayerKind, ModelConfig
from rooflight.models.layers import Linear, RMSNorm, wants_gradient
from rooflight.models.layout import Layout, Paged
from rooflight.ops.attention import (
    attention,
    gather_kv,
    naive_attention,
    packed_attention,
    paged_attention,
    write_kv,
)
from rooflight.ops.rope import rotary
from rooflight.ops.rotary_cache import rotate_and_cache
from rooflight.ops.rotary_qkv import rotary_qkv

Tables = dict[Any, tuple[Tensor, Tensor]]


class Core(nn.Module):
    """softmax(q·kᵀ)·v over whole sequences or over the cache, with the layer's window, softcap and sinks."""

    def __init__(self, config: ModelConfig, kind: LayerKind, index: int, scale: float):
        super().__init__()
        self.index, self.scale = index, scale
        self.window, self.softcap = kind.window, config.attention_softcap
        self.sinks_H = nn.Parameter(torch.empty(config.heads)) if config.sinks else None

    def whole(self, q_THE: Tensor, k_TKE: Tensor, v_TKU: Tensor, layout: Layout) -> Tensor:
        """Whole sequences, equally long ones or packed documents; q, k, v of the same tokens."""
        if layout.documents is not None:
            return self._packed(q_THE, k_TKE, v_TKU, layout)
        if layout.dense is None:
            raise InvalidValue("attention over whole sequences without a dense layout or documents")
        sequences, queries = layout.dense
        q, k, v = (x.view(sequences, queries, *x.shape[1:]) for x in (q_THE, k_TKE, v_TKU))
        return self._attend(q, k, v, layout).flatten(0, 1)

    def _packed(self, q_THE: Tensor, k_TKE: Tensor, v_TKU: Tensor, layout: Layout) -> Tensor:
        documents = layout.documents
        if documents is None or layout.dense is not None or layout.paged is not None:
            raise InvalidValue("a layout of documents is neither dense nor paged; give it documents alone")
        if layout.attention != "flash":
            raise InvalidValue(f"attention {layout.attention!r} cannot keep packed documents apart; use flash")
        options = (self.scale, self.window, self.softcap, self.sinks_H)
        return packed_attention(q_THE, k_TKE, v_TKU, documents.starts_N1, documents.max_length, *options)[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        args = (self.scale, True, self.window, self.softcap, self.sinks_H)
        if layout.attention == "naive":
            return naive_attention(q, k, v, *args)
        return attention(q, k, v, *args)[0]

    def write(self, k_TKE: Tensor, v_TKU: Tensor | None, layout: Layout) -> None:
        """Scatter the new tokens' keys and values into this layer's cache, if there is one."""
        if layout.paged is not None:
            cache = layout.paged.cache
            write_kv(k_TKE, v_TKU, cache.keys[self.index], cache.values[self.index], layout.paged.slots_T)

    def cached(self, q_THE: Tensor, layout: Layout, value_dim: Any) -> Tensor:
        """Queries against this layer's cache."""
        paged = layout.paged
        if paged is None:
            raise InvalidValue("attention over the cache without a paged layout")
        keys, values = paged.cache.keys[self.index], paged.cache.values[self.index]
        if layout.attention == "naive":
            if paged.equal_context is None:
                raise InvalidValue("naive attention over the cache needs sequences of one context length; use flash")
            k_BSKE, v_BSKU = gather_kv(keys, values, paged.block_table_BM, paged.equal_context, value_dim, q_THE.dtype)
            q_BQHE = q_THE.view(paged.block_table_BM.shape[0], -1, *q_THE.shape[1:])
            return self._attend(q_BQHE, k_BSKE, v_BSKU, layout).flatten(0, 1)
        return paged_attention(
            q_THE,
            keys,
            values,
            paged.block_table_BM,
            paged.context_lengths_B,
            paged.query_starts_B1,
            paged.max_query,
            value_dim,
            self.scale,
            self.window,
            self.softcap,
            self.sinks_H,
            paged.schedules.get(self.window),
        )


class Attention(nn.Module):
    """Multi-head, multi-query or grouped-query attention (2305.13245) with one projection for q, k and v."""

    component = "QKV"  # what stands between the parts: splitting and joining their inputs

    def __init__(self, config: ModelConfig, kind: LayerKind, index: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.rope = kind.rope
        self.qkv = Linear(
            config.width, (config.heads + 2 * config.kv_heads) * config.head_dim, config.qkv_bias, component="QKV"
        )
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.core = Core(config, kind, index, config.scale)
        self.out = Linear(config.heads * config.head_dim, config.width, config.out_bias, component="output projection")

    def serves(self, x_TD: Tensor) -> bool:
        """Whether no gradient may be asked for, and products are not in fp8, as in training only."""
        return not (self.qkv.fp8 or wants_gradient(x_TD, self.qkv.weight))

    def forward(self, x_TD: Tensor, tables: Tables, layout: Layout, norm: RMSNorm | None = None) -> Tensor:
        """The block's output; with a norm x is the residual stream, which is normalised first and added to in place."""
        qkv_TW = self.qkv(x_TD, norm=norm)
        into_TD = None if norm is None else x_TD
        if layout.cached is not None and self.rope is not None and not wants_gradient(qkv_TW):
            q_THE = self._rotate_and_cache(qkv_TW, *tables[self.rope], layout.cached)
            return self.out(self.core.cached(q_THE, layout, self.head_dim).flatten(1), into=into_TD)
        q_THE, k_TKE, v_TKE = self._parts(qkv_TW, tables)
        self.core.write(k_TKE, v_TKE, layout)
        if layout.whole:
            out_THE = self.core.whole(q_THE, k_TKE, v_TKE, layout)
        else:
            out_THE = self.core.cached(q_THE, layout, self.head_dim)
        return self.out(out_THE.flatten(1), into=into_TD)

    def _parts(self, qkv_TW: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, with norms and positions."""
        heads, kv_heads = self.heads, self.kv_heads
        if self.rope is not None and self.q_norm is None and wants_gradient(qkv_TW):
            # Its backward writes the whole projection's gradient at once.
            return rotary_qkv(qkv_TW, *tables[self.rope], heads, kv_heads, self.rope.interleaved)
        qkv = qkv_TW.unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        q_THE, k_TKE, v_TKE = qkv.split([heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THE, k_TKE = self.q_norm(q_THE), self.k_norm(k_TKE)
        if self.rope is not None:
            q_THE, k_TKE = rotary(q_THE, k_TKE, *tables[self.rope], self.rope.interleaved)
        return q_THE, k_TKE, v_TKE

    def _rotate_and_cache(self, qkv_TW: Tensor, cos_TC: Tensor, sin_TC: Tensor, paged: Paged) -> Tensor:
        """In one launch what `forward` does in up to four: head norms, rotation, cache write. The queries."""
        keys, values = paged.cache.keys[self.core.index], paged.cache.values[self.core.index]
        if self.rope is None or values is None:
            raise InvalidValue("the fused cache write needs rotary positions and a cache with values")
        weights, eps, offset = (None, None), 0.0, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            weights, eps, offset = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps, self.q_norm.offset
        where = (keys, values, paged.slots_T, self.heads)
        return rotate_and_cache(qkv_TW, cos_TC, sin_TC, *where, self.rope.interleaved, *weights, eps, offset)
