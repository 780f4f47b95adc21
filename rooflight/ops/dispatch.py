"""Rows of tokens to their experts and back: `permute` sorts them by expert, `unpermute` weighs and adds them up.

Legend: T tokens  X experts  K experts a token  D width  R = T·K rows, sorted by expert
source_R: where a sorted row comes from, as t·K + k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Access, Cost, Count, Movement, Primitive, elementwise_cost, tensor_bytes
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy

_KERNELS = "rooflight.ops.kernels.dispatch"
_MOST_EXPERTS, _MOST_CHOSEN = 1024, 16


def _moved(
    flops: Count, rows_RD: Tensor, reads: Any, writes: Any, movement: tuple[Movement, ...], again: Count = 0
) -> Cost:
    """Rows in an order that only the data knows; `again`: bytes that are read more than once."""
    cost = elementwise_cost(
        flops,
        reads,
        writes,
        size=(rows_RD.shape[0], rows_RD.shape[1]),
        primitive=Primitive.DYNAMIC,
        access=Access.RANDOM,
        movement=movement,
    )
    return replace(cost, traffic=cost.total_bytes + again)


def _takes(rows_RD: Tensor, top_k: int, *others: Tensor) -> bool:
    known = all(tensor.dtype in KERNEL_DTYPES for tensor in (rows_RD, *others))
    return known and rows_RD.dim() == 2 and rows_RD.numel() > 0 and 1 <= top_k <= _MOST_CHOSEN


def _permute_takes(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> bool:
    return _takes(x_TD, experts_TK.shape[1]) and 1 <= num_experts <= _MOST_EXPERTS


def _permute(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen_R = experts_TK.flatten()
    source_R = chosen_R.argsort(stable=True)
    # Not bincount: that waits for the GPU to learn its output's size.
    counts_X = chosen_R.new_zeros((num_experts,)).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))
    return x_TD[source_R // experts_TK.shape[1]], source_R, counts_X


def _permute_shape(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = experts_TK.shape[0] * experts_TK.shape[1]
    return (
        x_TD.new_empty((rows, x_TD.shape[1])),
        experts_TK.new_empty((rows,)),
        experts_TK.new_empty((num_experts,)),
    )


def _permute_cost(out: tuple[Tensor, ...], x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> Cost:
    # Sorting and counting expert numbers is integer work; a token's row is read once for each of its experts.
    again = tensor_bytes(out[0]) - tensor_bytes(x_TD)
    return _moved(0, out[0], (x_TD, experts_TK), out, (Movement.GATHER, Movement.BROADCAST), again)


def _in_token_order(rows_RD: Tensor, source_R: Tensor, top_k: int) -> Tensor:
    """[R, D] sorted by expert to [T, K, D] in fp32."""
    out_RD = torch.empty_like(rows_RD, dtype=torch.float32)
    out_RD[source_R] = rows_RD.float()
    return out_RD.unflatten(0, (-1, top_k))


def _permute_backward(grad_RD: Tensor, source_R: Tensor, top_k: int) -> Tensor:
    return _in_token_order(grad_RD, source_R, top_k).sum(1).to(grad_RD.dtype)


def _permute_backward_shape(grad_RD: Tensor, source_R: Tensor, top_k: int) -> Tensor:
    return grad_RD.new_empty((grad_RD.shape[0] // top_k, grad_RD.shape[1]))


def _permute_backward_cost(out_TD: Tensor, grad_RD: Tensor, source_R: Tensor, top_k: int) -> Cost:
    return _moved(grad_RD.numel(), grad_RD, (grad_RD, source_R), (out_TD,), (Movement.GATHER, Movement.REDUCTION))


permute_backward = Op(
    "permute_backward",
    _permute_backward,
    cost=_permute_backward_cost,
    shape=_permute_backward_shape,
    kernel=lazy(_KERNELS, "permute_backward"),
    kernel_takes=lambda grad_RD, source_R, top_k: _takes(grad_RD, top_k),
)


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.top_k = inputs[1].shape[1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])


def _permute_op_backward(ctx: Any, grad_RD: Tensor, *_: Any) -> tuple[Any, ...]:
    return permute_backward(grad_RD, ctx.saved_tensors[0], ctx.top_k), None, None


permute = Op(
    "permute",
    _permute,
    cost=_permute_cost,
    shape=_permute_shape,
    kernel=lazy(_KERNELS, "permute"),
    kernel_takes=_permute_takes,
    backward=_permute_op_backward,
    setup=_permute_setup,
)


def _unpermute(y_RD: Tensor, weights_TK: Tensor, source_R: Tensor) -> Tensor:
    y_TKD = _in_token_order(y_RD, source_R, weights_TK.shape[1])
    return (y_TKD * weights_TK.float().unsqueeze(-1)).sum(1).to(y_RD.dtype)


def _unpermute_shape(y_RD: Tensor, weights_TK: Tensor, source_R: Tensor) -> Tensor:
    return y_RD.new_empty((weights_TK.shape[0], y_RD.shape[1]))


def _unpermute_cost(out_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, source_R: Tensor) -> Cost:
    # A product and a sum an element.
    reads = (y_RD, weights_TK, source_R)
    return _moved(2 * y_RD.numel(), y_RD, reads, (out_TD,), (Movement.GATHER, Movement.REDUCTION))


def _unpermute_backward(grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, source_R: Tensor) -> tuple[Tensor, Tensor]:
    grad_RD = grad_TD.float()[source_R // weights_TK.shape[1]]
    grad_y_RD = grad_RD * weights_TK.float().flatten()[source_R].unsqueeze(-1)
    grad_weights_R = torch.empty_like(weights_TK, dtype=torch.float32).flatten()
    grad_weights_R[source_R] = (grad_RD * y_RD.float()).sum(-1)
    return grad_y_RD.to(y_RD.dtype), grad_weights_R.view(weights_TK.shape).to(weights_TK.dtype)


def _unpermute_backward_shape(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, source_R: Tensor
) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)


def _unpermute_backward_cost(
    out: tuple[Tensor, Tensor], grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, source_R: Tensor
) -> Cost:
    # Gradient times weight; gradient times row and its sum.
    again = tensor_bytes(y_RD) - tensor_bytes(grad_TD)
    reads = (grad_TD, y_RD, weights_TK, source_R)
    return _moved(3 * y_RD.numel(), y_RD, reads, out, (Movement.SCATTER, Movement.REDUCTION), again)


unpermute_backward = Op(
    "unpermute_backward",
    _unpermute_backward,
    cost=_unpermute_backward_cost,
    shape=_unpermute_backward_shape,
    kernel=lazy(_KERNELS, "unpermute_backward"),
    kernel_takes=lambda grad_TD, y_RD, weights_TK, source_R: _takes(y_RD, weights_TK.shape[1], grad_TD, weights_TK),
)


def _unpermute_op_backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
    return *unpermute_backward(grad_TD, *ctx.saved_tensors), None


unpermute = Op(
    "unpermute",
    _unpermute,
    cost=_unpermute_cost,
    shape=_unpermute_shape,
    kernel=lazy(_KERNELS, "unpermute"),
    kernel_takes=lambda y_RD, weights_TK, source_R: _takes(y_RD, weights_TK.shape[1], weights_TK),
    backward=_unpermute_op_backward,
    setup=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
