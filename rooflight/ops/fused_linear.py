"""Linear layers with what stands around them in a decoder's layer: the norm before, a gate or the residual sum after.

norm_linear: y = f(RMSNorm(x)·Wᵀ + b), f the gated activation of stacked [gate; up] where there is one.
add_linear: residual += x·Wᵀ + b, in place.
For inference: neither has a derivative, and on a GPU what stands between the stages is not rounded at every size. There
the weights are asked for before the launch ahead is through: they are parameters, which that launch does not write.
Legend: T tokens  D width  N output width  K input width
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rooflight.ops.activation import KINDS, gated_activation, gated_flops
from rooflight.ops.cost import (
    VECTOR,
    Cost,
    Count,
    Part,
    matmul_cost,
    precision_of,
    tensor_bytes,
)
from rooflight.ops.cpu_matmul import product
from rooflight.ops.norm import rms_norm
from rooflight.ops.op import Op, lazy, rows_and_columns, same_kernel_dtype

_KERNELS = "rooflight.ops.kernels.fused_linear"
# A product that carries a norm or a sum along takes the time of the product.
_CURVE = "linear"


def _norm_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float = 0.0,
    gate: str | None = None,
) -> Tensor:
    # The references themselves: on a CPU the dispatcher would take as long again as one token's norm.
    y_TN = product(rms_norm.reference(x_TD, norm_weight_D, eps, offset), weight_ND.t(), bias_N)
    return y_TN if gate is None else gated_activation.reference(y_TN, gate)


def _norm_linear_shape(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float = 0.0,
    gate: str | None = None,
) -> Tensor:
    outputs = weight_ND.shape[0]
    return x_TD.new_empty((*x_TD.shape[:-1], outputs if gate is None else outputs // 2))


def _norm_linear_cost(
    out: Tensor,
    x_TD: Tensor,
    norm_weight_D: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float,
    gate: str | None,
) -> Cost:
    rows, width = rows_and_columns(x_TD)
    outputs = weight_ND.shape[0]
    # As `rms_norm`: square, sum, scale, weight for an element; mean, eps, rsqrt for a row; the offset once a column.
    norm_flops = rows * (4 * width + 3) + (norm_weight_D.numel() if offset else 0)
    after: Count = 0 if bias_N is None else rows * outputs
    if gate is not None:
        after = after + gated_flops(gate) * out.numel()
    # x is read once, by the norm, and its result never leaves the chip.
    norm = Part("norm and residual", {VECTOR: norm_flops}, bytes_read=tensor_bytes((x_TD, norm_weight_D)))
    cost = _with_product(norm, rows, outputs, width, precision_of(x_TD), after, (weight_ND, bias_N), out)
    # Of many rows: what the norm gives, while the product is made; with a gate the product, until that is through.
    held = tensor_bytes(x_TD)
    if gate is not None:
        held = tensor_bytes(out) + torch.sym_max(held, tensor_bytes(out))
    return replace(cost, workspace=held)


def _with_product(
    part: Part,
    rows: Count,
    outputs: Count,
    inputs: Count,
    precision: str,
    after: Count,
    reads: tuple[Tensor | None, ...],
    out: Tensor,
) -> Cost:
    """A product's cost, and the part beside it that reports show as their own component."""
    cost = matmul_cost(rows, outputs, inputs, precision=precision, reads=reads, writes=(out,), epilogue_flops=after)
    own = Part("", cost.flops, cost.bytes_read, cost.bytes_written)
    flops = dict(cost.flops)
    for name, count in part.flops.items():
        flops[name] = flops.get(name, 0) + count
    return replace(
        cost,
        flops=flops,
        bytes_read=cost.bytes_read + part.bytes_read,
        curve=_CURVE,
        parts=(part, own),
    )


def _add_linear(residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    residual_TN.add_(product(x_TK, weight_NK.t(), bias_N))


def _add_linear_shape(residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    return None


def _add_linear_cost(out: None, residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Cost:
    rows, inputs = rows_and_columns(x_TK)
    outputs = weight_NK.shape[0]
    added = Part("norm and residual", {VECTOR: rows * outputs}, bytes_read=tensor_bytes(residual_TN))
    after: Count = 0 if bias_N is None else rows * outputs
    return _with_product(
        added, rows, outputs, inputs, precision_of(x_TK), after, (x_TK, weight_NK, bias_N), residual_TN
    )


def _norm_linear_takes(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float = 0.0,
    gate: str | None = None,
) -> bool:
    same = same_kernel_dtype(x_TD, norm_weight_D, weight_ND, bias_N)
    return same and x_TD.numel() > 0 and (gate is None or gate in KINDS)


def _add_linear_takes(residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> bool:
    same = same_kernel_dtype(residual_TN, x_TK, weight_NK, bias_N)
    return same and x_TK.numel() > 0 and residual_TN.is_contiguous()


norm_linear = Op(
    "norm_linear",
    _norm_linear,
    cost=_norm_linear_cost,
    shape=_norm_linear_shape,
    kernel=lazy(_KERNELS, "norm_linear"),
    kernel_takes=_norm_linear_takes,
)
add_linear = Op(
    "add_linear",
    _add_linear,
    cost=_add_linear_cost,
    shape=_add_linear_shape,
    kernel=lazy(_KERNELS, "add_linear"),
    kernel_takes=_add_linear_takes,
    mutates=("residual_TN",),
)
