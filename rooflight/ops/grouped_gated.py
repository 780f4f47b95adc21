"""Grouped linear with the gated activation over it, which finds gates and values in the product's sums.

y_r = f(g_r)·u_r, [g; u]_r = W_{x(r)}·x_r + b_{x(r)}, rows sorted by expert; or gpt-oss's clamped form.
For inference: it has no derivative, and on a GPU the product is not rounded in between where experts have few rows.
Legend: R rows  X experts  N gates and values  F = N/2 output width  K input width
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rooflight.ops.activation import KINDS, gated_activation, gated_flops
from rooflight.ops.cost import VECTOR, Cost, tensor_bytes
from rooflight.ops.grouped import grouped_linear, is_ours, linear_kernel
from rooflight.ops.op import Op, lazy

_ours = lazy("rooflight.ops.kernels.grouped", "gated_linear")
_activation = lazy("rooflight.ops.kernels.activation", "gated_activation")


def _gated_linear(x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor, kind: str) -> Tensor:
    return gated_activation.reference(grouped_linear.reference(x_RK, weight_XNK, bias_XN, counts_X), kind)


def _kernel(x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor, kind: str) -> Tensor:
    if is_ours(x_RK, weight_XNK):
        return _ours(x_RK, weight_XNK, bias_XN, counts_X, kind)
    return _activation(linear_kernel(x_RK, weight_XNK, bias_XN, counts_X), kind)


def _kernel_takes(x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor, kind: str) -> bool:
    known = kind in (*KINDS, "clamped_swiglu") and weight_XNK.shape[1] % 2 == 0
    takes = grouped_linear.kernel_takes
    return known and takes is not None and takes(x_RK, weight_XNK, bias_XN, counts_X)


def _shape(x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor, kind: str) -> Tensor:
    return x_RK.new_empty((x_RK.shape[0], weight_XNK.shape[1] // 2))


def _cost(
    out_RF: Tensor, x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor, kind: str
) -> Cost:
    cost = grouped_linear.cost(out_RF, x_RK, weight_XNK, bias_XN, counts_X)
    activation = gated_flops(kind) * out_RF.numel()
    # Of many rows the product is held, until the activation is through.
    return replace(
        cost,
        flops={**cost.flops, VECTOR: cost.flops.get(VECTOR, 0) + activation},
        workspace=2 * tensor_bytes(out_RF),
    )


grouped_gated_linear = Op(
    "grouped_gated_linear",
    _gated_linear,
    cost=_cost,
    shape=_shape,
    kernel=_kernel,
    kernel_takes=_kernel_takes,
)
