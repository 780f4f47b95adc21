"""Token embedding: a gather of one weight row a token, and its backward, a scatter-add.

Legend: T tokens  V vocabulary  D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import VECTOR, Access, Cost, Movement, Primitive, precision_of, tensor_bytes
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy


def _embedding(tokens_T: Tensor, weight_VD: Tensor, scale: float = 1.0) -> Tensor:
    out_TD = torch.nn.functional.embedding(tokens_T, weight_VD)
    return out_TD if scale == 1.0 else out_TD * torch.tensor(scale, dtype=out_TD.dtype)


def _embedding_shape(tokens_T: Tensor, weight_VD: Tensor, scale: float = 1.0) -> Tensor:
    return weight_VD.new_empty((*tokens_T.shape, weight_VD.shape[1]))


def _embedding_cost(out_TD: Tensor, tokens_T: Tensor, weight_VD: Tensor, scale: float) -> Cost:
    # A row is read for each token: which rows, only the data knows, so repeats are not taken off.
    return Cost(
        flops={} if scale == 1.0 else {VECTOR: out_TD.numel()},
        bytes_read=tensor_bytes(tokens_T) + tensor_bytes(out_TD),
        bytes_written=tensor_bytes(out_TD),
        primitive=Primitive.DATA_MOVEMENT,
        access=Access.RANDOM,
        movement=(Movement.GATHER,),
        size=(tokens_T.numel(), weight_VD.shape[1]),
        precision=precision_of(weight_VD),
    )


def _embedding_backward(grad_TD: Tensor, tokens_T: Tensor, vocabulary: int, scale: float) -> Tensor:
    grad, rows = grad_TD.flatten(0, -2).float(), tokens_T.flatten()
    grad = grad if scale == 1.0 else grad * scale
    if grad_TD.device.type == "cpu" and grad_TD.dtype != torch.float32:
        # Sums in fp32 of the rows that the batch names, not of the whole vocabulary.
        named, rows = rows.unique(return_inverse=True)
        sums = grad.new_zeros((named.shape[0], grad.shape[-1])).index_add_(0, rows, grad)
        return grad_TD.new_zeros((vocabulary, grad.shape[-1])).index_copy_(0, named, sums.to(grad_TD.dtype))
    out_VD = grad.new_zeros((vocabulary, grad.shape[-1]))
    return out_VD.index_add_(0, rows, grad).to(grad_TD.dtype)


def _embedding_backward_shape(grad_TD: Tensor, tokens_T: Tensor, vocabulary: int, scale: float) -> Tensor:
    return grad_TD.new_empty((vocabulary, grad_TD.shape[-1]))


def _embedding_backward_cost(out_VD: Tensor, grad_TD: Tensor, tokens_T: Tensor, vocabulary: int, scale: float) -> Cost:
    return Cost(
        flops={VECTOR: grad_TD.numel() * (1 if scale == 1.0 else 2)},
        bytes_read=tensor_bytes((grad_TD, tokens_T)),
        bytes_written=tensor_bytes(out_VD),
        primitive=Primitive.DATA_MOVEMENT,
        access=Access.RANDOM,
        movement=(Movement.SCATTER, Movement.REDUCTION),
        size=(tokens_T.numel(), grad_TD.shape[-1]),
        precision=precision_of(grad_TD),
    )


def _takes(grad_TD: Tensor, tokens_T: Tensor, vocabulary: int, *_: float) -> bool:
    return grad_TD.dtype in KERNEL_DTYPES and grad_TD.shape[-1] > 0 and vocabulary < 2**22


embedding_backward = Op(
    "embedding_backward",
    _embedding_backward,
    cost=_embedding_backward_cost,
    shape=_embedding_backward_shape,
    kernel=lazy("rooflight.ops.kernels.embedding", "embedding_backward"),
    kernel_takes=_takes,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens_T, weight_VD, ctx.scale = inputs
    ctx.vocabulary = weight_VD.shape[0]
    ctx.save_for_backward(tokens_T)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
    return None, embedding_backward(grad_TD, ctx.saved_tensors[0], ctx.vocabulary, ctx.scale), None


embedding = Op("embedding", _embedding, cost=_embedding_cost, shape=_embedding_shape, backward=_backward, setup=_setup)
