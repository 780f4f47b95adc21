"""Multi-head latent attention: keys and values are rebuilt from, or attended in, one compressed vector a token.

DeepSeek-V2 (2405.04434, section 2.1). Whole sequences rebuild k and v; over the cache the up-projections are
absorbed into the query and the output, so that the cache holds kv_rank + rope_dim numbers a token and no more.
Legend: T tokens  D width  H heads  C latent rank  R rope dim  E = nope + rope dim  U value dim
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rooflight.errors import InvalidValue
from rooflight.models.attention import Core, Tables
from rooflight.models.config import LayerKind, ModelConfig
from rooflight.models.layers import Linear, RMSNorm
from rooflight.models.layout import Layout
from rooflight.models.rope import yarn_softmax_scale
from rooflight.ops.linear import head_linear
from rooflight.ops.rope import rotary


class LatentAttention(nn.Module):
    """MLA with an optional low-rank query."""

    component = "QKV"  # what stands between the parts: splitting and joining their inputs

    def __init__(self, config: ModelConfig, kind: LayerKind, index: int):
        super().__init__()
        latent, rope = config.latent, kind.rope
        if latent is None or rope is None:
            raise InvalidValue("latent attention needs a latent config and rotary positions")
        self.heads, self.latent, self.rope = config.heads, latent, rope
        query_dim = latent.nope_dim + latent.rope_dim
        self.q_rank = latent.q_rank
        down = (latent.q_rank or 0) + latent.kv_rank + latent.rope_dim
        # One projection reads x once: the compressed query (if any), the latent and the shared rope key.
        self.down = Linear(config.width, down, config.qkv_bias, component="QKV")
        self.q_norm = RMSNorm(latent.q_rank, config, latent.norm_eps) if latent.q_rank else None
        self.q_up = Linear(latent.q_rank or config.width, config.heads * query_dim, component="QKV")
        self.kv_norm = RMSNorm(latent.kv_rank, config, latent.norm_eps)
        self.kv_up = Linear(latent.kv_rank, config.heads * (latent.nope_dim + latent.value_dim), component="QKV")
        self.core = Core(config, kind, index, query_dim**-0.5 * yarn_softmax_scale(rope))
        self.out = Linear(config.heads * latent.value_dim, config.width, config.out_bias, component="output projection")

    def forward(self, x_TD: Tensor, tables: Tables, layout: Layout) -> Tensor:
        z = self.latent
        compressed = self.down(x_TD)
        if self.q_norm is not None:
            query_T, latent_TC, key_rope_TR = compressed.split([z.q_rank, z.kv_rank, z.rope_dim], dim=-1)
            q_THE = self.q_up(self.q_norm(query_T))
        else:
            latent_TC, key_rope_TR = compressed.split([z.kv_rank, z.rope_dim], dim=-1)
            q_THE = self.q_up(x_TD)
        q_THE = q_THE.unflatten(-1, (self.heads, z.nope_dim + z.rope_dim))
        q_nope, q_rope = q_THE.split([z.nope_dim, z.rope_dim], dim=-1)
        latent_TC = self.kv_norm(latent_TC)
        q_rope, key_rope = rotary(q_rope, key_rope_TR.unsqueeze(1), *tables[self.rope], self.rope.interleaved)
        if layout.paged is not None:
            self.core.write(torch.cat((latent_TC.unsqueeze(1), key_rope), dim=-1), None, layout)
        if layout.whole:
            out = self._rebuilt(q_nope, q_rope, latent_TC, key_rope, layout)
        else:
            out = self._absorbed(q_nope, q_rope, layout)
        return self.out(out.flatten(1))

    def _rebuilt(self, q_nope: Tensor, q_rope: Tensor, latent_TC: Tensor, key_rope: Tensor, layout: Layout) -> Tensor:
        z = self.latent
        kv = self.kv_up(latent_TC).unflatten(-1, (self.heads, z.nope_dim + z.value_dim))
        k_nope, v_THU = kv.split([z.nope_dim, z.value_dim], dim=-1)
        k_THE = torch.cat((k_nope, key_rope.expand(-1, self.heads, -1)), dim=-1)
        return self.core.whole(torch.cat((q_nope, q_rope), dim=-1), k_THE, v_THU, layout)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, layout: Layout) -> Tensor:
        z = self.latent
        up = self.kv_up.weight.unflatten(0, (self.heads, z.nope_dim + z.value_dim))
        key_up_HNC, value_up_HUC = up.split([z.nope_dim, z.value_dim], dim=1)
        q_latent_THC = head_linear(q_nope, key_up_HNC.transpose(1, 2))
        out_THC = self.core.cached(torch.cat((q_latent_THC, q_rope), dim=-1), layout, z.kv_rank)
        return head_linear(out_THC, value_up_HUC)
