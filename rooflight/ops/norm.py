"""RMSNorm, alone and fused with the residual add before it, and its backward.

RMSNorm: y = x · rsqrt(mean(x²) + eps) · (offset + w), arithmetic in fp32 (Zhang & Sennrich 2019, 1910.07467).
Legend: T rows (any leading dimensions)  D normalised width
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Cost, Count, Movement, elementwise_cost
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy, rows_and_columns, same_kernel_dtype

_KERNELS = "rooflight.ops.kernels.norm"
# Elements up to which torch's own form, the same bits in fewer calls, is the faster one on a CPU: 10 and 13 µs a row.
_FEW = 2**16
_MOVES = (Movement.REDUCTION, Movement.BROADCAST)


def norm_cost(
    per_element: Count, per_row: Count, x: Tensor, reads: tuple[Tensor | None, ...], writes: tuple[Tensor | None, ...]
) -> Cost:
    rows, columns = rows_and_columns(x)
    flops = per_element * rows * columns + per_row * rows
    return elementwise_cost(flops, reads, writes, size=(rows, columns), movement=_MOVES)


def _rms(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor:
    if not offset and x_TD.device.type == "cpu" and x_TD.dtype == weight_D.dtype and x_TD.numel() <= _FEW:
        return torch.nn.functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    x = x_TD.float()
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return scaled.mul_(weight_D.float() + offset if offset else weight_D.float()).to(x_TD.dtype)


def _fits(x_TD: Tensor, weight_D: Tensor) -> bool:
    return weight_D.dtype in KERNEL_DTYPES and x_TD.numel() > 0


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return _rms(x_TD, weight_D, eps, offset)


def _rms_norm_shape(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


def _rms_norm_cost(out_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float) -> Cost:
    # square, sum, scale, weight for an element; mean, eps, rsqrt for a row; the offset once a column.
    cost = norm_cost(4, 3, x_TD, (x_TD, weight_D), (out_TD,))
    return _with_offset(cost, weight_D, offset)


def _with_offset(cost: Cost, weight_D: Tensor, offset: float) -> Cost:
    if not offset:
        return cost
    return replace(cost, flops={p: n + weight_D.numel() for p, n in cost.flops.items()})


def _rms_norm_takes(x_TD: Tensor, weight_D: Tensor, *_: float) -> bool:
    return same_kernel_dtype(x_TD) and _fits(x_TD, weight_D)


def _add_rms_norm_takes(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *_: float) -> bool:
    return x_TD.shape == residual_TD.shape and same_kernel_dtype(x_TD, residual_TD) and _fits(x_TD, weight_D)


def _rms_norm_backward_takes(
    grad_TD: Tensor, grad_residual_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, *_: float
) -> bool:
    return same_kernel_dtype(grad_TD, grad_residual_TD, x_TD) and _fits(x_TD, weight_D)


def _add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    residual_TD = x_TD + residual_TD
    return _rms(residual_TD, weight_D, eps, offset), residual_TD


def _add_rms_norm_shape(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape)


def _add_rms_norm_cost(
    out: tuple[Tensor, Tensor], x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, offset: float
) -> Cost:
    cost = norm_cost(5, 3, x_TD, (x_TD, residual_TD, weight_D), out)
    return _with_offset(cost, weight_D, offset)


def _rms_norm_backward(
    grad_TD: Tensor, grad_residual_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    x, grad = x_TD.float(), grad_TD.float()
    weight = weight_D.float() + offset if offset else weight_D.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    x_hat = x * rstd
    product = grad * x_hat
    grad_weight = product.flatten(0, -2).sum(0)
    along = (product @ weight).unsqueeze(-1).mul_(rstd).div_(x.shape[-1])
    grad_x = (grad * weight).mul_(rstd).addcmul_(x_hat, along, value=-1)
    if grad_residual_TD is not None:
        grad_x += grad_residual_TD
    return grad_x.to(x_TD.dtype), grad_weight.to(weight_D.dtype)


def _rms_norm_backward_shape(
    grad_TD: Tensor, grad_residual_TD: Tensor | None, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_D.new_empty(weight_D.shape)


def _rms_norm_backward_cost(
    out: tuple[Tensor, Tensor],
    grad_TD: Tensor,
    grad_residual_TD: Tensor | None,
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float,
) -> Cost:
    # x²; sum; x̂; g·w; ·x̂; sum; x̂·mean; subtract; ·rstd; g·x̂; column sum: 11. A row: mean, eps, rsqrt, mean: 4.
    per_element = 11 if grad_residual_TD is None else 12
    cost = norm_cost(per_element, 4, x_TD, (grad_TD, grad_residual_TD, x_TD, weight_D), out)
    return _with_offset(cost, weight_D, offset)


rms_norm_backward = Op(
    "rms_norm_backward",
    _rms_norm_backward,
    cost=_rms_norm_backward_cost,
    shape=_rms_norm_backward_shape,
    kernel=lazy(_KERNELS, "rms_norm_backward"),
    kernel_takes=_rms_norm_backward_takes,
)


def _rms_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, weight_D, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x_TD, weight_D)


def _rms_backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
    x_TD, weight_D = ctx.saved_tensors
    grad_x, grad_weight = rms_norm_backward(grad_TD, None, x_TD, weight_D, ctx.eps, ctx.offset)
    return grad_x, grad_weight, None, None


def _add_rms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight_D, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight_D)


def _add_rms_backward(ctx: Any, grad_TD: Tensor | None, grad_residual_TD: Tensor | None) -> tuple[Any, ...]:
    residual_TD, weight_D = ctx.saved_tensors
    if grad_TD is None:
        return grad_residual_TD, grad_residual_TD, None, None, None
    grad_x, grad_weight = rms_norm_backward(grad_TD, grad_residual_TD, residual_TD, weight_D, ctx.eps, ctx.offset)
    return grad_x, grad_x, grad_weight, None, None


rms_norm = Op(
    "rms_norm",
    _rms_norm,
    cost=_rms_norm_cost,
    shape=_rms_norm_shape,
    kernel=lazy(_KERNELS, "rms_norm"),
    kernel_takes=_rms_norm_takes,
    backward=_rms_backward,
    setup=_rms_setup,
)
add_rms_norm = Op(
    "add_rms_norm",
    _add_rms_norm,
    cost=_add_rms_norm_cost,
    shape=_add_rms_norm_shape,
    kernel=lazy(_KERNELS, "add_rms_norm"),
    kernel_takes=_add_rms_norm_takes,
    backward=_add_rms_backward,
    setup=_add_rms_setup,
)
