"""Cross-entropy fused with the last linear layer, so that the full logits never exist.

Logits, loss and both gradients are made chunk of tokens by chunk of tokens in the forward, three products in all
(Liger, Hsu et al. 2024, 2410.10989); the backward only scales.
Legend: T tokens  V vocabulary  D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import (
    VECTOR,
    Access,
    Cost,
    Count,
    Movement,
    Part,
    Primitive,
    elementwise_cost,
    precision_of,
    tensor_bytes,
)
from rooflight.ops.loss import IGNORE, capped, forward_flops, gradient_flops, logits_grad, row_losses
from rooflight.ops.op import Op

_CHUNK = 1024  # tokens whose logits exist at a time


def _fused(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float = 0.0, ignore_index: int = IGNORE
) -> Tensor:
    loss = x_TD.new_zeros((), dtype=torch.float32)
    for x, targets in zip(x_TD.split(_CHUNK), targets_T.split(_CHUNK), strict=True):
        z, _ = capped(x @ weight_VD.t(), softcap)
        loss += row_losses(z, targets, ignore_index)[0].sum()
    return loss / (targets_T != ignore_index).sum()


def _fused_shape(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float = 0.0, ignore_index: int = IGNORE
) -> Tensor:
    return x_TD.new_empty((), dtype=torch.float32)


def _fused_cost(
    out: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, products: int, vector_flops: Count, traffic: Count
) -> Cost:
    """`products` products of T×V×D under the part "head", softmax and loss under "loss"."""
    tokens, width = x_TD.shape
    vocabulary, precision = weight_VD.shape[0], precision_of(x_TD)
    loss, *grads = (out,) if isinstance(out, Tensor) else out
    head = Part(
        "head",
        {precision: 2 * products * tokens * vocabulary * width},
        bytes_read=tensor_bytes((x_TD, weight_VD)),
        bytes_written=tensor_bytes(grads),
    )
    tail = Part("loss", {VECTOR: vector_flops}, tensor_bytes(targets_T), tensor_bytes(loss))
    flops = dict(head.flops)
    flops[VECTOR] = flops.get(VECTOR, 0) + vector_flops
    read, written = head.bytes_read + tail.bytes_read, head.bytes_written + tail.bytes_written
    return Cost(
        flops=flops,
        bytes_read=read,
        bytes_written=written,
        primitive=Primitive.MATMUL,
        access=Access.SEQUENTIAL,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        traffic=read + written + traffic,
        size=(tokens, vocabulary, width),
        precision=precision,
        parts=(head, tail),
    )


def _chunks(tokens: Count) -> Count:
    return (tokens + _CHUNK - 1) // _CHUNK


def _fused_loss_cost(
    out: Tensor, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, ignore_index: int
) -> Cost:
    tokens, vocabulary = x_TD.shape[0], weight_VD.shape[0]
    # A chunk's logits are written and read once, and every chunk after the first reads the weight again.
    traffic = 2 * tokens * vocabulary * x_TD.element_size() + (_chunks(tokens) - 1) * tensor_bytes(weight_VD)
    flops = forward_flops(tokens, vocabulary, softcap)
    return _fused_cost(out, x_TD, weight_VD, targets_T, 1, flops, traffic)


linear_cross_entropy_loss = Op("linear_cross_entropy", _fused, cost=_fused_loss_cost, shape=_fused_shape)


def _fused_with_grad(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float = 0.0, ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_TD.new_zeros((), dtype=torch.float32)
    grad_x_TD = torch.empty_like(x_TD)
    # Chunks add up in fp32: a bf16 sum would lose the small gradients of rare tokens.
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    count = (targets_T != ignore_index).sum()
    factor = 1.0 / count
    for start in range(0, x_TD.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        x, targets = x_TD[rows], targets_T[rows]
        z, tanh = capped(x @ weight_VD.t(), softcap)
        losses, lse = row_losses(z, targets, ignore_index)
        loss += losses.sum()
        grad = logits_grad(z, tanh, lse, targets, ignore_index, factor).to(x_TD.dtype)
        grad_x_TD[rows] = grad @ weight_VD
        grad_weight_VD += grad.t() @ x
    return loss / count, grad_x_TD, grad_weight_VD.to(weight_VD.dtype)


def _fused_with_grad_shape(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float = 0.0, ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_TD.new_empty((), dtype=torch.float32)
    return loss, x_TD.new_empty(x_TD.shape), weight_VD.new_empty(weight_VD.shape)


def _fused_with_grad_cost(
    out: tuple[Tensor, ...], x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, ignore_index: int
) -> Cost:
    tokens, vocabulary = x_TD.shape[0], weight_VD.shape[0]
    # Loss and gradient share softcap, logsumexp and token count; 1/count is one more division.
    flops = forward_flops(tokens, vocabulary, softcap) + gradient_flops(tokens, vocabulary, softcap) + 1
    # A chunk's logits are written and read, their gradient written and read by two products; every chunk reads the
    # weight twice and the fp32 sum of its gradient once, and writes that sum; x is read twice.
    logits = 5 * tokens * vocabulary * x_TD.element_size()
    weights = 2 * tensor_bytes(weight_VD) + 8 * weight_VD.numel()
    traffic = logits + _chunks(tokens) * weights - tensor_bytes(weight_VD) + tensor_bytes(x_TD)
    return _fused_cost(out, x_TD, weight_VD, targets_T, 3, flops, traffic)


def _scaled(grad: Tensor, grad_x_TD: Tensor, grad_weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    return (grad_x_TD * grad).to(grad_x_TD.dtype), (grad_weight_VD * grad).to(grad_weight_VD.dtype)


def _scaled_cost(out: tuple[Tensor, Tensor], grad: Tensor, grad_x_TD: Tensor, grad_weight_VD: Tensor) -> Cost:
    elements = grad_x_TD.numel() + grad_weight_VD.numel()
    reads = (grad, grad_x_TD, grad_weight_VD)
    return elementwise_cost(elements, reads, out, size=(elements,), movement=(Movement.BROADCAST,))


linear_cross_entropy_backward = Op("linear_cross_entropy_backward", _scaled, cost=_scaled_cost)


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _fused_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *linear_cross_entropy_backward(grad, *ctx.saved_tensors), None, None, None


linear_cross_entropy_with_grad = Op(
    "linear_cross_entropy_with_grad",
    _fused_with_grad,
    cost=_fused_with_grad_cost,
    shape=_fused_with_grad_shape,
    backward=_fused_backward,
    setup=_fused_setup,
)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float = 0.0, ignore_index: int = IGNORE
) -> Tensor:
    """Mean cross-entropy of x·Wᵀ against targets without the T×V logits in memory; fp32 scalar.

    6·T·V·D FLOPs where a gradient is wanted (the backward then only scales), else 2·T·V·D.
    """
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad):
        return linear_cross_entropy_with_grad(x_TD, weight_VD, targets_T, softcap, ignore_index)[0]
    return linear_cross_entropy_loss(x_TD, weight_VD, targets_T, softcap, ignore_index)
