"""Which kernel computes a linear layer with its norm, gate or residual sum, by rows and by the size of the weight.

Measured for a layer's four products and what stands between them (`benchmarks/ops_decode_layer.py`, one H200), µs:
    rows                        1      2      8      16     32     64
    Qwen3-0.6B  cuBLAS apart    33.3   35.3   30.4   30.7   31.6   32.7
                ours            14.7   13.0   13.7          25.7          skinny, then few (at 32 as tuned)
    8B          cuBLAS apart    120.2  123.9  124.6  127.2  133.5  135.3
                ours            111.6                120.2  130.6         skinny, then stream
Legend: T tokens  D width  N output width  K input width
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor
from torch.nn.functional import linear

from rooflight.ops.kernels import few_linear, few_plan, skinny_linear, skinny_plan, stream_plan
from rooflight.ops.kernels.activation import gated_activation
from rooflight.ops.kernels.flash_hopper_plan import is_hopper
from rooflight.ops.kernels.norm import rms_norm

SMALL_WEIGHTS = 8 << 20  # numbers of a matrix: programs of `few` hold that much in registers
# Where cuBLAS's own sum in its epilogue costs more than a pass over the residual: 1519 µs against 1371 + 47.
LONG_ROWS, LONG_INPUTS = 4096, 8192


class Way(Enum):
    """Who computes a call."""

    SKINNY = "one row in registers"
    FEW = "a few rows of a small matrix, all inputs in a program"
    STREAM = "a few rows of a large matrix, by the copy engine"
    APART = "cuBLAS, and kernels beside it"


def way_of(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gated: bool) -> Way:
    """The fastest kernel for these sizes of those that can."""
    if skinny_plan.takes(x_TK, weight_NK, bias_N, fused=True):
        return Way.SKINNY
    weight_rows, inputs = weight_NK.shape
    rows = x_TK.numel() // inputs
    if not 1 < rows <= stream_plan.WIDE_ROWS or x_TK.dtype not in stream_plan.DTYPES or x_TK.dim() != 2:
        return Way.APART
    # Rows begin at multiples of 16 bytes, as both kernels want them.
    matrices = (x_TK, weight_NK)
    if inputs % 8 or any(x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16 for x in matrices):
        return Way.APART
    if weight_NK.numel() > SMALL_WEIGHTS:
        return Way.STREAM if is_hopper(x_TK.device) else Way.APART
    outputs = weight_rows // 2 if gated else weight_rows
    return Way.APART if few_plan.plan_for(rows, outputs, inputs, gated) is None else Way.FEW


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
    way = way_of(x_TD, weight_ND, bias_N, gate is not None)
    if way is Way.SKINNY:
        return skinny_linear.norm_linear(x_TD, norm_weight_D, weight_ND, bias_N, eps, offset, gate)
    if way is Way.FEW:
        return few_linear.norm_linear(x_TD, norm_weight_D, weight_ND, bias_N, eps, offset, gate)
    if way is Way.STREAM:
        # Gluon is imported where it runs: the interpreter has none.
        from rooflight.ops.kernels.stream_linear import stream_linear

        options = {"norm_weight_K": norm_weight_D, "eps": eps, "offset": offset, "activation": gate}
        return stream_linear(x_TD, weight_ND, bias_N, **options)
    y_TN = linear(rms_norm(x_TD, norm_weight_D, eps, offset), weight_ND, bias_N)
    return y_TN if gate is None else gated_activation(y_TN, gate)


def add_linear(residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    """residual += x·Wᵀ + b; cuBLAS adds in its epilogue."""
    way = way_of(x_TK, weight_NK, bias_N, gated=False)
    outputs, inputs = weight_NK.shape
    if way is Way.SKINNY:
        skinny_linear.add_linear(residual_TN, x_TK, weight_NK, bias_N)
    elif way is Way.FEW:
        few_linear.add_linear(residual_TN, x_TK, weight_NK, bias_N)
    elif way is Way.STREAM:
        from rooflight.ops.kernels.stream_linear import stream_linear

        stream_linear(x_TK, weight_NK, bias_N, residual_MN=residual_TN)
    elif bias_N is not None or (x_TK.numel() >= LONG_ROWS * inputs and inputs > LONG_INPUTS):
        residual_TN.add_(linear(x_TK, weight_NK, bias_N))
    else:
        residual_TN.view(-1, outputs).addmm_(x_TK.reshape(-1, inputs), weight_NK.t())
