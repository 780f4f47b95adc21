"""Linear layers: y = x·Wᵀ + b, also for stacked weights (fused QKV, gate and up) and for one matrix a head.

Legend: T tokens (any leading dimensions)  N output width  K input width  H heads
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Access, Cost, Movement, elementwise_cost, matmul_cost, precision_of
from rooflight.ops.cost import Primitive as P
from rooflight.ops.cpu_matmul import product
from rooflight.ops.op import Op, lazy, rows_and_columns


def _linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return product(x_TK, weight_NK.t(), bias_N)


def _linear_shape(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return x_TK.new_empty((*x_TK.shape[:-1], weight_NK.shape[0]))


def _linear_cost(out_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Cost:
    m, k = rows_and_columns(x_TK)
    n = weight_NK.shape[0]
    return matmul_cost(
        m,
        n,
        k,
        precision=precision_of(x_TK),
        reads=(x_TK, weight_NK, bias_N),
        writes=(out_TN,),
        epilogue_flops=0 if bias_N is None else m * n,
    )


def _input_grad(grad_TN: Tensor, weight_NK: Tensor) -> Tensor:
    return product(grad_TN, weight_NK)


def _input_grad_shape(grad_TN: Tensor, weight_NK: Tensor) -> Tensor:
    return grad_TN.new_empty((*grad_TN.shape[:-1], weight_NK.shape[1]))


def _input_grad_cost(out_TK: Tensor, grad_TN: Tensor, weight_NK: Tensor) -> Cost:
    m, n = rows_and_columns(grad_TN)
    return matmul_cost(
        m, weight_NK.shape[1], n, precision=precision_of(grad_TN), reads=(grad_TN, weight_NK), writes=(out_TK,)
    )


def _weight_grad(grad_TN: Tensor, x_TK: Tensor) -> Tensor:
    return product(grad_TN.flatten(0, -2).t(), x_TK.flatten(0, -2))


def _weight_grad_shape(grad_TN: Tensor, x_TK: Tensor) -> Tensor:
    return grad_TN.new_empty((grad_TN.shape[-1], x_TK.shape[-1]))


def _weight_grad_cost(out_NK: Tensor, grad_TN: Tensor, x_TK: Tensor) -> Cost:
    m, n = rows_and_columns(grad_TN)
    return matmul_cost(
        n,
        x_TK.shape[-1],
        m,
        precision=precision_of(grad_TN),
        reads=(grad_TN, x_TK),
        writes=(out_NK,),
        access=Access.STRIDED,
    )


def _bias_grad(grad_TN: Tensor) -> Tensor:
    return grad_TN.flatten(0, -2).sum(0)


def _bias_grad_cost(out_N: Tensor, grad_TN: Tensor) -> Cost:
    return elementwise_cost(
        grad_TN.numel(),
        (grad_TN,),
        (out_N,),
        size=rows_and_columns(grad_TN),
        primitive=P.REDUCTION,
        access=Access.STRIDED,
        movement=(Movement.REDUCTION,),
    )


linear_input_grad = Op("linear_input_grad", _input_grad, cost=_input_grad_cost, shape=_input_grad_shape)
linear_weight_grad = Op("linear_weight_grad", _weight_grad, cost=_weight_grad_cost, shape=_weight_grad_shape)
bias_grad = Op("bias_grad", _bias_grad, cost=_bias_grad_cost)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight_NK, _ = inputs
    # Only what a wanted gradient needs: a frozen weight keeps no activations alive.
    ctx.save_for_backward(x_TK if ctx.needs_input_grad[1] else None, weight_NK if ctx.needs_input_grad[0] else None)


def _backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x_TK, weight_NK = ctx.saved_tensors
    # The dispatcher drops trailing arguments that hold their default, an absent bias among them.
    need_x, need_weight, need_bias = (*ctx.needs_input_grad, False)[:3]
    return (
        linear_input_grad(grad_TN, weight_NK) if need_x else None,
        linear_weight_grad(grad_TN, x_TK) if need_weight else None,
        bias_grad(grad_TN) if need_bias else None,
    )


# The kernels are for few rows, as a decode step's. Whether a gradient is wanted cannot be seen from here and need not
# be: the backward reads nothing of theirs.
linear = Op(
    "linear",
    _linear,
    cost=_linear_cost,
    shape=_linear_shape,
    kernel=lazy("rooflight.ops.kernels.fused_linear", "linear"),
    kernel_takes=lazy("rooflight.ops.kernels.fused_linear", "takes_linear"),
    backward=_backward,
    setup=_setup,
)


def _head_linear(x_THK: Tensor, weight_HNK: Tensor) -> Tensor:
    return torch.einsum("thk,hnk->thn", x_THK, weight_HNK).contiguous()


def _head_linear_shape(x_THK: Tensor, weight_HNK: Tensor) -> Tensor:
    return x_THK.new_empty((x_THK.shape[0], weight_HNK.shape[0], weight_HNK.shape[1]))


def _head_linear_cost(out_THN: Tensor, x_THK: Tensor, weight_HNK: Tensor) -> Cost:
    tokens, heads, k = x_THK.shape
    return matmul_cost(
        tokens * heads,
        weight_HNK.shape[1],
        k,
        precision=precision_of(x_THK),
        reads=(x_THK, weight_HNK),
        writes=(out_THN,),
        access=Access.STRIDED,
    )


def _head_input_grad(grad_THN: Tensor, weight_HNK: Tensor) -> Tensor:
    return torch.einsum("thn,hnk->thk", grad_THN, weight_HNK).contiguous()


def _head_input_grad_shape(grad_THN: Tensor, weight_HNK: Tensor) -> Tensor:
    return grad_THN.new_empty((*grad_THN.shape[:2], weight_HNK.shape[2]))


def _head_input_grad_cost(out_THK: Tensor, grad_THN: Tensor, weight_HNK: Tensor) -> Cost:
    tokens, heads, n = grad_THN.shape
    return matmul_cost(
        tokens * heads,
        weight_HNK.shape[2],
        n,
        precision=precision_of(grad_THN),
        reads=(grad_THN, weight_HNK),
        writes=(out_THK,),
        access=Access.STRIDED,
    )


def _head_weight_grad(grad_THN: Tensor, x_THK: Tensor) -> Tensor:
    return torch.einsum("thn,thk->hnk", grad_THN, x_THK).contiguous()


def _head_weight_grad_shape(grad_THN: Tensor, x_THK: Tensor) -> Tensor:
    return grad_THN.new_empty((grad_THN.shape[1], grad_THN.shape[2], x_THK.shape[2]))


def _head_weight_grad_cost(out_HNK: Tensor, grad_THN: Tensor, x_THK: Tensor) -> Cost:
    tokens, heads, n = grad_THN.shape
    return matmul_cost(
        heads * n,
        x_THK.shape[2],
        tokens,
        precision=precision_of(grad_THN),
        reads=(grad_THN, x_THK),
        writes=(out_HNK,),
        access=Access.STRIDED,
    )


head_input_grad = Op("head_input_grad", _head_input_grad, cost=_head_input_grad_cost, shape=_head_input_grad_shape)
head_weight_grad = Op("head_weight_grad", _head_weight_grad, cost=_head_weight_grad_cost, shape=_head_weight_grad_shape)


def _head_backward(ctx: Any, grad_THN: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x_THK, weight_HNK = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad
    return (
        head_input_grad(grad_THN, weight_HNK) if need_x else None,
        head_weight_grad(grad_THN, x_THK) if need_weight else None,
    )


head_linear = Op(
    "head_linear",
    _head_linear,
    cost=_head_linear_cost,
    shape=_head_linear_shape,
    backward=_head_backward,
    setup=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
