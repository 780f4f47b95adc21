"""Which kernels compute a linear layer with its norm, gate or residual sum: one launch for few rows, else cuBLAS's.

Legend: T tokens  D width  N output width  K input width
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from rooflight.ops.kernels import skinny_linear
from rooflight.ops.kernels.activation import gated_activation
from rooflight.ops.kernels.norm import rms_norm
from rooflight.ops.kernels.skinny_plan import takes


def norm_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float = 0.0,
    gate: str | None = None,
) -> Tensor:
    """f(RMSNorm(x)·Wᵀ + b)."""
    if takes(x_TD, weight_ND, bias_N, fused=True):
        return skinny_linear.norm_linear(x_TD, norm_weight_D, weight_ND, bias_N, eps, offset, gate)
    y_TN = linear(rms_norm(x_TD, norm_weight_D, eps, offset), weight_ND, bias_N)
    return y_TN if gate is None else gated_activation(y_TN, gate)


def add_linear(residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    """residual += x·Wᵀ + b; cuBLAS adds in its epilogue."""
    if takes(x_TK, weight_NK, bias_N, fused=True):
        skinny_linear.add_linear(residual_TN, x_TK, weight_NK, bias_N)
        return
    if bias_N is not None:
        residual_TN.add_(bias_N)
    outputs, inputs = weight_NK.shape
    residual_TN.view(-1, outputs).addmm_(x_TK.reshape(-1, inputs), weight_NK.t())
