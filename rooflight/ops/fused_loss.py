"""Cross-entropy fused with the last linear layer, so that the full logits never exist.

Logits, loss and both gradients are made chunk of tokens by chunk of tokens in the forward (`chunked_loss` on a CPU,
`kernels.loss` on a GPU), three products in all (Liger, Hsu et al. 2024, 2410.10989); the backward scales, in place.
Legend: T tokens  V vocabulary  D width  N tokens of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue, RooflightError
from rooflight.ops.chunked_loss import linear_cross_entropy_reference, with_grad_reference
from rooflight.ops.clipping import scale_cost
from rooflight.ops.cost import (
    VECTOR,
    Access,
    Cost,
    Count,
    Movement,
    Part,
    Primitive,
    precision_of,
    tensor_bytes,
)
from rooflight.ops.loss import IGNORE, forward_flops, gradient_flops
from rooflight.ops.op import Op, lazy, same_kernel_dtype

KERNELS = "rooflight.ops.kernels.loss"
LOGITS_BYTES = (
    2**30
)  # of a chunk's logits on a GPU; few chunks, for each one reads the weight and its gradient's sum again
ROW_ALIGNMENT = 64  # elements: on a GPU rows of an odd vocabulary begin on 128 bytes, for cuBLAS wants 16
ROWS = 128  # a chunk's tokens are a multiple of what a product's tile takes


def chunk_tokens(tokens: Count, vocabulary: Count, element_size: int) -> Count:
    """Tokens of a chunk on a GPU: as few chunks as LOGITS_BYTES allows, all of about the same size."""
    most = torch.sym_max(LOGITS_BYTES // (vocabulary * element_size) // ROWS * ROWS, ROWS)
    chunks = (tokens + most - 1) // most
    even = (tokens + chunks - 1) // chunks
    return torch.sym_min((even + ROWS - 1) // ROWS * ROWS, most)


def _fused_shape(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    count: int = 0,
) -> Tensor:
    return x_TD.new_empty((), dtype=torch.float32)


def _fused_cost(
    out: Any,
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    products: int,
    vector_flops: Count,
    traffic: Count,
    workspace: Count,
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
        workspace=workspace,
    )


def _chunks(x_TD: Tensor, weight_VD: Tensor) -> tuple[Count, Count]:
    """(number of chunks, bytes of one chunk's logits, rows padded) on a GPU."""
    tokens, vocabulary, size = x_TD.shape[0], weight_VD.shape[0], x_TD.element_size()
    chunk = chunk_tokens(tokens, vocabulary, size)
    padded = (vocabulary + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    return (tokens + chunk - 1) // chunk, torch.sym_min(chunk, tokens) * padded * size


def _fused_loss_cost(
    out: Tensor, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, ignore_index: int, count: int
) -> Cost:
    tokens, vocabulary = x_TD.shape[0], weight_VD.shape[0]
    chunks, logits = _chunks(x_TD, weight_VD)
    # A chunk's logits are written and read once, and every chunk after the first reads the weight again.
    traffic = 2 * tokens * vocabulary * x_TD.element_size() + (chunks - 1) * tensor_bytes(weight_VD)
    flops = forward_flops(tokens, vocabulary, softcap, not count)
    return _fused_cost(out, x_TD, weight_VD, targets_T, 1, flops, traffic, logits)


def _loss_kernel(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, ignore_index: int, count: int
) -> Tensor:
    chunk = chunk_tokens(x_TD.shape[0], weight_VD.shape[0], x_TD.element_size())
    return _launch_loss(x_TD, weight_VD, targets_T, softcap, ignore_index, count, chunk)


def _kernel_takes(x_TD: Tensor, weight_VD: Tensor, *_: Any) -> bool:
    return bool(x_TD.shape[0]) and same_kernel_dtype(x_TD, weight_VD)


_launch_loss = lazy(KERNELS, "linear_cross_entropy")
# linear_cross_entropy_loss(x_TD, weight_VD, targets_T, softcap, ignore_index, count) -> mean loss, fp32 scalar
linear_cross_entropy_loss = Op(
    "linear_cross_entropy",
    linear_cross_entropy_reference,
    cost=_fused_loss_cost,
    shape=_fused_shape,
    kernel=_loss_kernel,
    kernel_takes=_kernel_takes,
)


def _fused_with_grad_shape(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    count: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_TD.new_empty((), dtype=torch.float32)
    return loss, x_TD.new_empty(x_TD.shape), weight_VD.new_empty(weight_VD.shape)


def _fused_with_grad_cost(
    out: tuple[Tensor, ...],
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    softcap: float,
    ignore_index: int,
    count: int,
) -> Cost:
    tokens, vocabulary = x_TD.shape[0], weight_VD.shape[0]
    chunks, logits_bytes = _chunks(x_TD, weight_VD)
    # Loss and gradient share softcap, logsumexp and token count; 1/count is one more division, or the host's.
    flops = forward_flops(tokens, vocabulary, softcap, not count) + gradient_flops(tokens, vocabulary, softcap)
    flops = flops + (0 if count else 1)
    # A chunk's logits are written and read, their gradient written and read by two products; every chunk reads the
    # weight twice; x is read twice.
    logits = 5 * tokens * vocabulary * x_TD.element_size()
    weights = (2 * chunks - 1) * tensor_bytes(weight_VD)
    # The fp32 sum of the weight's gradient is written by every chunk, read by every one but the first, and read once
    # more to be rounded; in fp32 it is the gradient itself, and a single chunk makes that without a sum.
    total = 4 * weight_VD.numel()
    if weight_VD.element_size() == 4:
        sums, held = 2 * (chunks - 1) * total, 0
    else:
        several = torch.sym_min(chunks - 1, 1)
        sums, held = several * 2 * chunks * total, several * total
    traffic = logits + weights + sums + tensor_bytes(x_TD)
    # While the sum is rounded the logits are gone and the rounded gradient, an output, is there.
    return _fused_cost(out, x_TD, weight_VD, targets_T, 3, flops, traffic, logits_bytes + held)


def _with_grad_kernel(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, ignore_index: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    chunk = chunk_tokens(x_TD.shape[0], weight_VD.shape[0], x_TD.element_size())
    return _launch_with_grad(x_TD, weight_VD, targets_T, softcap, ignore_index, count, chunk)


def _scaled(grad: Tensor, grad_x_TD: Tensor, grad_weight_VD: Tensor) -> None:
    if grad != 1:
        grad_x_TD.mul_(grad)
        grad_weight_VD.mul_(grad)


def _scaled_shape(grad: Tensor, grad_x_TD: Tensor, grad_weight_VD: Tensor) -> None:
    return None


def _scaled_cost(out: None, grad: Tensor, grad_x_TD: Tensor, grad_weight_VD: Tensor) -> Cost:
    return scale_cost(None, [grad_x_TD, grad_weight_VD], grad)


def _scaled_kernel(grad: Tensor, grad_x_TD: Tensor, grad_weight_VD: Tensor) -> None:
    _launch_scale([grad_x_TD, grad_weight_VD], grad)


_launch_scale = lazy("rooflight.ops.kernels.clipping", "scale")
# linear_cross_entropy_backward(grad, grad_x_TD, grad_weight_VD): both times the incoming scalar, in place.
linear_cross_entropy_backward = Op(
    "linear_cross_entropy_backward",
    _scaled,
    cost=_scaled_cost,
    shape=_scaled_shape,
    kernel=_scaled_kernel,
    kernel_takes=lambda grad, x, weight: same_kernel_dtype(x, weight) and x.is_contiguous() and weight.is_contiguous(),
    mutates=("grad_x_TD", "grad_weight_VD"),
)


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.scaled = False


def _fused_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    # A copy of the weight's gradient would stand at the step's very peak of memory, so the saved one is handed out.
    if ctx.scaled:
        raise RooflightError(
            "a second backward through linear_cross_entropy: its gradients are made in the forward and handed out "
            "once; compute the loss again, or ask for all gradients in one backward"
        )
    ctx.scaled = True
    grad_x_TD, grad_weight_VD = ctx.saved_tensors
    linear_cross_entropy_backward(grad, grad_x_TD, grad_weight_VD)
    return grad_x_TD, grad_weight_VD, None, None, None, None


_launch_with_grad = lazy(KERNELS, "linear_cross_entropy_with_grad")
linear_cross_entropy_with_grad = Op(
    "linear_cross_entropy_with_grad",
    with_grad_reference,
    cost=_fused_with_grad_cost,
    shape=_fused_with_grad_shape,
    kernel=_with_grad_kernel,
    kernel_takes=_kernel_takes,
    backward=_fused_backward,
    setup=_fused_setup,
)


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    count: int = 0,
) -> Tensor:
    """Mean cross-entropy of x·Wᵀ against targets without the T×V logits in memory; fp32 scalar.

    6·T·V·D FLOPs where a gradient is wanted (the backward then only scales, and runs once), else 2·T·V·D.
    count: what the sum over target tokens is divided by, 0 for their number here. With gradients accumulated over
    micro-batches, the number in the whole batch: the losses and gradients of the micro-batches then add up to the
    batch's, and one without a target gives zeros.
    """
    if count < 0:
        raise InvalidValue(f"count {count} is negative; use the number of target tokens, or 0 to have them counted")
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad):
        return linear_cross_entropy_with_grad(x_TD, weight_VD, targets_T, softcap, ignore_index, count)[0]
    return linear_cross_entropy_loss(x_TD, weight_VD, targets_T, softcap, ignore_index, count)
