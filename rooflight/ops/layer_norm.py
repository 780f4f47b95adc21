"""LayerNorm, alone and fused with the residual add before it, and its backward.

y = (x − mean) · rsqrt(var + eps) · w + b, arithmetic in fp32 (Ba et al. 2016, 1607.06450).
Legend: T rows (any leading dimensions)  D normalised width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Cost
from rooflight.ops.norm import norm_cost
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy, same_kernel_dtype

_KERNELS = "rooflight.ops.kernels.layer_norm"


def _layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps)


def _fits(x_TD: Tensor, *parameters_D: Tensor) -> bool:
    return x_TD.numel() > 0 and all(parameter_D.dtype in KERNEL_DTYPES for parameter_D in parameters_D)


def _layer_norm_takes(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> bool:
    return same_kernel_dtype(x_TD) and _fits(x_TD, weight_D, bias_D)


def _add_layer_norm_takes(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> bool:
    return x_TD.shape == residual_TD.shape and same_kernel_dtype(x_TD, residual_TD) and _fits(x_TD, weight_D, bias_D)


def _layer_norm_backward_takes(
    grad_TD: Tensor, grad_residual_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float
) -> bool:
    return same_kernel_dtype(grad_TD, grad_residual_TD, x_TD) and _fits(x_TD, weight_D)


def _layer_norm_shape(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


def _layer_norm_cost(out_TD: Tensor, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Cost:
    # sum, centre, square, sum, scale, weight, bias for an element; two means, eps, rsqrt for a row.
    return norm_cost(7, 4, x_TD, (x_TD, weight_D, bias_D), (out_TD,))


def _add_layer_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual_TD = x_TD + residual_TD
    return _layer_norm(residual_TD, weight_D, bias_D, eps), residual_TD


def _add_layer_norm_shape(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)


def _add_layer_norm_cost(
    out: tuple[Tensor, Tensor], x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> Cost:
    return norm_cost(8, 4, x_TD, (x_TD, residual_TD, weight_D, bias_D), out)


def _layer_norm_backward(
    grad_TD: Tensor, grad_residual_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = x_TD.float(), grad_TD.float()
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    x_hat = centred * rstd
    weighted = grad * weight_D.float()
    grad_x = (weighted - weighted.mean(-1, keepdim=True) - x_hat * (weighted * x_hat).mean(-1, keepdim=True)) * rstd
    if grad_residual_TD is not None:
        grad_x = grad_x + grad_residual_TD.float()
    grad_weight = (grad * x_hat).flatten(0, -2).sum(0)
    grad_bias = grad.flatten(0, -2).sum(0)
    return grad_x.to(x_TD.dtype), grad_weight.to(weight_D.dtype), grad_bias.to(weight_D.dtype)


def _layer_norm_backward_shape(
    grad_TD: Tensor, grad_residual_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_D.new_empty(weight_D.shape), weight_D.new_empty(weight_D.shape)


def _layer_norm_backward_cost(
    out: tuple[Tensor, Tensor, Tensor],
    grad_TD: Tensor,
    grad_residual_TD: Tensor | None,
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> Cost:
    # sum; centre; square; sum; x̂; g·w; sum; ·x̂; sum; x̂·mean; subtract twice; ·rstd; g·x̂; two column sums: 16.
    # A row: mean, mean, eps, rsqrt, two means: 6.
    per_element = 16 if grad_residual_TD is None else 17
    return norm_cost(per_element, 6, x_TD, (grad_TD, grad_residual_TD, x_TD, weight_D), out)


layer_norm_backward = Op(
    "layer_norm_backward",
    _layer_norm_backward,
    cost=_layer_norm_backward_cost,
    shape=_layer_norm_backward_shape,
    kernel=lazy(_KERNELS, "layer_norm_backward"),
    kernel_takes=_layer_norm_backward_takes,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, weight_D, _, ctx.eps = inputs
    ctx.save_for_backward(x_TD, weight_D)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
    x_TD, weight_D = ctx.saved_tensors
    return (*layer_norm_backward(grad_TD, None, x_TD, weight_D, ctx.eps), None)


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight_D, _, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight_D)


def _add_backward(ctx: Any, grad_TD: Tensor | None, grad_residual_TD: Tensor | None) -> tuple[Any, ...]:
    residual_TD, weight_D = ctx.saved_tensors
    if grad_TD is None:
        return grad_residual_TD, grad_residual_TD, None, None, None
    grad_x, grad_weight, grad_bias = layer_norm_backward(grad_TD, grad_residual_TD, residual_TD, weight_D, ctx.eps)
    return grad_x, grad_x, grad_weight, grad_bias, None


layer_norm = Op(
    "layer_norm",
    _layer_norm,
    cost=_layer_norm_cost,
    shape=_layer_norm_shape,
    kernel=lazy(_KERNELS, "layer_norm"),
    kernel_takes=_layer_norm_takes,
    backward=_backward,
    setup=_setup,
)
add_layer_norm = Op(
    "add_layer_norm",
    _add_layer_norm,
    cost=_add_layer_norm_cost,
    shape=_add_layer_norm_shape,
    kernel=lazy(_KERNELS, "add_layer_norm"),
    kernel_takes=_add_layer_norm_takes,
    backward=_add_backward,
    setup=_add_setup,
)
