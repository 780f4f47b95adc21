"""The feed-forward block: dense (plain or gated), and a mixture of experts.

Legend: T tokens  D width  F feed-forward width  X experts  K experts a token  R = T·K routed rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.models.layers import Linear, RMSNorm, wants_gradient
from rooflight.ops.activation import activation, gated_activation
from rooflight.ops.dispatch import permute, unpermute
from rooflight.ops.grouped import grouped_linear
from rooflight.ops.grouped_gated import grouped_gated_linear
from rooflight.ops.routing import route


class MLP(nn.Module):
    """down(f(gate)·up) with gate and up in one projection, or down(f(up))."""

    component = "feed-forward"

    def __init__(self, config: ModelConfig, width: Any):
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        stacked = 2 * width if config.gated else width
        self.up = Linear(config.width, stacked, config.mlp_bias, component=self.component)
        self.down = Linear(width, config.width, config.mlp_bias, component=self.component)

    def forward(self, x_TD: Tensor, needed: bool = True, norm: RMSNorm | None = None) -> Tensor:
        """The block's output; with a norm x is the residual stream, which is normalised first and added to in place."""
        if norm is not None:
            gate = self.activation if self.gated else None
            h_TF = self.up(x_TD, norm=norm, gate=gate)
            return self.down(h_TF if self.gated else activation(h_TF, self.activation), into=x_TD)
        up = self.up(x_TD)
        h_TF = gated_activation(up, self.activation) if self.gated else activation(up, self.activation)
        return self.down(h_TF, needed)


class Experts(nn.Module):
    """All experts of a layer as three-dimensional weights, run over rows sorted by expert."""

    component = "feed-forward"

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        if moe is None:
            raise InvalidValue("experts need a mixture-of-experts config")
        self.activation = config.activation
        self.up_XND = nn.Parameter(torch.empty(moe.experts, 2 * moe.width, config.width))
        self.down_XDF = nn.Parameter(torch.empty(moe.experts, config.width, moe.width))
        self.up_bias = nn.Parameter(torch.empty(moe.experts, 2 * moe.width)) if moe.expert_bias else None
        self.down_bias = nn.Parameter(torch.empty(moe.experts, config.width)) if moe.expert_bias else None

    def forward(self, x_RD: Tensor, counts_X: Tensor) -> Tensor:
        given = (x_RD, self.up_XND, self.up_bias, counts_X)
        if wants_gradient(x_RD, self.up_XND):
            h_RF = gated_activation(grouped_linear(*given), self.activation)
        else:
            h_RF = grouped_gated_linear(*given, self.activation)
        return grouped_linear(h_RF, self.down_XDF, self.down_bias, counts_X)


class MoEBlock(nn.Module):
    """Σ_k w_k · expert_k(x) over a token's top-k experts, plus experts that every token shares (DeepSeek)."""

    component = "feed-forward"

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        if moe is None:
            raise InvalidValue("a mixture-of-experts layer needs a mixture-of-experts config")
        self.moe = moe
        self.router = Linear(config.width, moe.experts, moe.router_bias, component="routing")
        # Not trained by gradient: DeepSeek-V3 nudges it to balance loads (2412.19437, section 2.1.2).
        self.choice_bias_X: Tensor | None
        bias_X = torch.empty(moe.experts, dtype=torch.float32) if moe.choice_bias else None
        self.register_buffer("choice_bias_X", bias_X)
        self.experts = Experts(config)
        self.shared = MLP(config, moe.shared_width) if moe.shared_width else None

    def forward(self, x_TD: Tensor, needed: bool = True) -> Tensor:
        # The experts' sum saves what their last products give, so all of it is needed.
        moe = self.moe
        weights_TK, experts_TK = route(
            self.router(x_TD),
            self.choice_bias_X,
            moe.top_k,
            moe.scoring,
            moe.normalize,
            moe.scale,
            moe.groups,
            moe.top_groups,
            moe.group_score,
        )
        x_RD, source_R, counts_X = permute(x_TD, experts_TK, moe.experts)
        out_TD = unpermute(self.experts(x_RD, counts_X), weights_TK, source_R)
        return out_TD if self.shared is None else out_TD + self.shared(x_TD)
