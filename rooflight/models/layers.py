"""The small modules that every decoder is made of: linear, norms, embedding. Each names its report component.

Legend: T tokens  D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rooflight.models.config import ModelConfig
from rooflight.models.recompute import saved_for_linear
from rooflight.ops.fp8_linear import fits_fp8, fp8_linear
from rooflight.ops.fused_linear import add_linear, norm_linear
from rooflight.ops.layer_norm import add_layer_norm, layer_norm
from rooflight.ops.linear import linear
from rooflight.ops.norm import add_rms_norm, rms_norm


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a derivative of what is made of these may be asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class Linear(nn.Module):
    """y = x·Wᵀ + b; with `fp8` set, products in fp8 wherever the sizes allow it."""

    fp8 = False

    def __init__(self, inputs: Any, outputs: Any, bias: bool = False, component: str = ""):
        super().__init__()
        self.component = component
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(
        self,
        x_TD: Tensor,
        needed: bool = True,
        norm: RMSNorm | None = None,
        gate: str | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """The product; all but `needed` are for inference.

        needed: whether anybody reads the result; else only what its backward wants is saved.
        norm: applied to x first, and then `gate` to the product's stacked halves. into: the product is added to it.
        """
        if norm is not None:
            return norm_linear(x_TD, norm.weight, self.weight, self.bias, norm.eps, norm.offset, gate)
        if into is not None:
            add_linear(into, x_TD, self.weight, self.bias)
            return into
        if self.fp8 and fits_fp8(x_TD, self.weight):
            return fp8_linear(x_TD, self.weight, self.bias)
        if not needed:
            return saved_for_linear(x_TD, self.weight)
        return linear(x_TD, self.weight, self.bias)


class RMSNorm(nn.Module):
    """RMSNorm of x, or of x + residual in one pass, which then also returns the sum."""

    def __init__(self, width: Any, config: ModelConfig, eps: float | None = None):
        super().__init__()
        self.eps, self.offset = config.norm_eps if eps is None else eps, config.norm_offset
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps, self.offset)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x_TD, residual_TD, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """LayerNorm of x, or of x + residual in one pass, which then also returns the sum."""

    def __init__(self, width: Any, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return layer_norm(x_TD, self.weight, self.bias, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x_TD, residual_TD, self.weight, self.bias, self.eps)


class ResidualNorm(nn.Module):
    """The norm that opens a block: adds the block's input to the residual stream and normalises the sum."""

    component = "norm and residual"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = make_norm(config.width, config)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual_TD is None:
            return self.norm(x_TD), x_TD
        return self.norm.add(x_TD, residual_TD)


def make_norm(width: Any, config: ModelConfig) -> RMSNorm | LayerNorm:
    """The config's kind of norm."""
    return LayerNorm(width, config) if config.norm == "layer" else RMSNorm(width, config)
