"""Grouped linear: every expert's own matrix over the rows that were routed to it, in one operation.

y_r = W_{x(r)}·x_r + b_{x(r)}, rows sorted by expert.
Legend: R rows  X experts  N output width  K input width
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rooflight.ops import batch
from rooflight.ops.cost import (
    VECTOR,
    Access,
    Cost,
    Count,
    Movement,
    Primitive,
    elementwise_cost,
    precision_of,
    tensor_bytes,
)
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy, same_kernel_dtype

_KERNELS = "rooflight.ops.kernels.grouped"
_MOST_EXPERTS = 1024  # whose counts one program looks through
_our_linear, _our_input_grad, _add_bias = (lazy(_KERNELS, name) for name in ("linear", "input_grad", "add_bias"))
# Mean rows of an expert up to which our kernel is ahead of torch's: on an H200 by 1.3–2.8 up to 32, which is where
# weights are still being read, and behind by 0.7–0.85 from 256 on, where products take longer than that.
_FEW_MEAN_ROWS = 48
_ROUNDING = 1e-6  # a mean of whole experts must not lose one to floating point


def _experts_hit(rows: Count, experts: Count) -> Count:
    """Experts that receive a row: as the batch in force says, else as many as random routing reaches on average.

    X·(1 − (1 − 1/X)^R), rounded down to a whole expert, at least one.
    """
    current = batch.current_or_none()
    if current is not None and current.expert_tokens is not None:
        return sum(1 for tokens in current.expert_tokens if tokens > 0)
    reached = experts * (1.0 - (1.0 - 1.0 / experts) ** rows)
    return torch.sym_max(torch.sym_int(reached + _ROUNDING), 1)


def _grouped_cost(
    rows: Count, n: Count, k: Count, weight_XNK: Tensor, precision: str, read: Count, written: Count, curve: str
) -> Cost:
    return Cost(
        flops={precision: 2 * rows * n * k},
        bytes_read=read,
        bytes_written=written,
        primitive=Primitive.MATMUL,
        access=Access.SEQUENTIAL,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=(rows, n, k, weight_XNK.shape[0]),
        precision=precision,
        curve=curve,
    )


def _weight_bytes(rows: Count, weight_XNK: Tensor) -> Count:
    """Only experts that were hit have their weights read."""
    experts, n, k = weight_XNK.shape
    return _experts_hit(rows, experts) * n * k * weight_XNK.element_size()


def _offsets(counts_X: Tensor) -> Tensor:
    return counts_X.cumsum(0).to(torch.int32)


def _takes(x: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None = None) -> bool:
    """Types that our kernels load, rows and inputs at all, and so many experts that one program looks through them."""
    known = same_kernel_dtype(x, weight_XNK, bias_XN) and weight_XNK.shape[0] <= _MOST_EXPERTS
    return known and x.numel() > 0 and weight_XNK.numel() > 0 and (bias_XN is None or bias_XN.is_contiguous())


def _torchs_takes(x: Tensor, *widths: int) -> bool:
    """_grouped_mm wants bf16 and rows of whole 16 bytes; from Hopper on it is one kernel."""
    return (
        hasattr(torch.ops.aten, "_grouped_mm")
        and x.dtype == torch.bfloat16
        and all(width % 8 == 0 for width in widths)
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def is_ours(x_RK: Tensor, weight_XNK: Tensor) -> bool:
    """Whether our kernel computes the product: of few rows an expert, and where torch's does not."""
    few = x_RK.shape[0] <= _FEW_MEAN_ROWS * min(x_RK.shape[0], weight_XNK.shape[0])
    return few or not _torchs_takes(x_RK, *weight_XNK.shape[1:])


def _linear(x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor) -> Tensor:
    out_RN = x_RK.new_empty((x_RK.shape[0], weight_XNK.shape[1]))
    start = 0
    for expert, count in enumerate(counts_X.tolist()):
        if count:
            rows = slice(start, start + count)
            bias_N = None if bias_XN is None else bias_XN[expert]
            out_RN[rows] = torch.nn.functional.linear(x_RK[rows], weight_XNK[expert], bias_N)
            start += count
    return out_RN


def _torchs_linear(x_RK: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
    return torch.ops.aten._grouped_mm(x_RK.contiguous(), weight_XNK.transpose(-2, -1), offs=_offsets(counts_X))


def linear_kernel(x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor) -> Tensor:
    """The product on a GPU, by our kernel or torch's."""
    if is_ours(x_RK, weight_XNK):
        return _our_linear(x_RK, weight_XNK, bias_XN, counts_X)
    out_RN = _torchs_linear(x_RK, weight_XNK, counts_X)
    return out_RN if bias_XN is None else _add_bias(out_RN, bias_XN, counts_X)


def _linear_shape(x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor) -> Tensor:
    return x_RK.new_empty((x_RK.shape[0], weight_XNK.shape[1]))


def _linear_cost(out_RN: Tensor, x_RK: Tensor, weight_XNK: Tensor, bias_XN: Tensor | None, counts_X: Tensor) -> Cost:
    rows, k = x_RK.shape
    n = weight_XNK.shape[1]
    read = tensor_bytes((x_RK, counts_X)) + _weight_bytes(rows, weight_XNK)
    if bias_XN is not None:
        read = read + _experts_hit(rows, weight_XNK.shape[0]) * n * bias_XN.element_size()
    cost = _grouped_cost(rows, n, k, weight_XNK, precision_of(x_RK), read, tensor_bytes(out_RN), "grouped_linear")
    if bias_XN is None:
        return cost
    return replace(cost, flops={**cost.flops, VECTOR: cost.flops.get(VECTOR, 0) + rows * n})


def _input_grad(grad_RN: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
    out_RK = grad_RN.new_empty((grad_RN.shape[0], weight_XNK.shape[2]))
    start = 0
    for expert, count in enumerate(counts_X.tolist()):
        if count:
            rows = slice(start, start + count)
            out_RK[rows] = grad_RN[rows] @ weight_XNK[expert]
            start += count
    return out_RK


def _torchs_input_grad(grad_RN: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
    return torch.ops.aten._grouped_mm(grad_RN.contiguous(), weight_XNK, offs=_offsets(counts_X))


def _input_grad_kernel(grad_RN: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
    if _torchs_takes(grad_RN, *weight_XNK.shape[1:]):
        return _torchs_input_grad(grad_RN, weight_XNK, counts_X)
    return _our_input_grad(grad_RN, weight_XNK, counts_X)


def _input_grad_shape(grad_RN: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
    return grad_RN.new_empty((grad_RN.shape[0], weight_XNK.shape[2]))


def _input_grad_cost(out_RK: Tensor, grad_RN: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Cost:
    rows, n = grad_RN.shape
    read = tensor_bytes((grad_RN, counts_X)) + _weight_bytes(rows, weight_XNK)
    return _grouped_cost(
        rows, weight_XNK.shape[2], n, weight_XNK, precision_of(grad_RN), read, tensor_bytes(out_RK), "grouped_linear"
    )


def _weight_grad(grad_RN: Tensor, x_RK: Tensor, counts_X: Tensor) -> Tensor:
    out_XNK = grad_RN.new_zeros((counts_X.shape[0], grad_RN.shape[1], x_RK.shape[1]))
    start = 0
    for expert, count in enumerate(counts_X.tolist()):
        if count:
            rows = slice(start, start + count)
            out_XNK[expert] = grad_RN[rows].t() @ x_RK[rows]
            start += count
    return out_XNK


def _weight_grad_kernel(grad_RN: Tensor, x_RK: Tensor, counts_X: Tensor) -> Tensor:
    return torch.ops.aten._grouped_mm(grad_RN.contiguous().t(), x_RK.contiguous(), offs=_offsets(counts_X))


def _weight_grad_shape(grad_RN: Tensor, x_RK: Tensor, counts_X: Tensor) -> Tensor:
    return grad_RN.new_empty((counts_X.shape[0], grad_RN.shape[1], x_RK.shape[1]))


def _weight_grad_cost(out_XNK: Tensor, grad_RN: Tensor, x_RK: Tensor, counts_X: Tensor) -> Cost:
    # Every expert's gradient is written: zeros where no row came.
    rows, n = grad_RN.shape
    read = tensor_bytes((grad_RN, x_RK, counts_X))
    return _grouped_cost(
        rows, n, x_RK.shape[1], out_XNK, precision_of(grad_RN), read, tensor_bytes(out_XNK), "grouped_weight_grad"
    )


def _bias_grad(grad_RN: Tensor, counts_X: Tensor) -> Tensor:
    experts = counts_X.shape[0]
    expert_R = torch.arange(experts, device=grad_RN.device).repeat_interleave(counts_X, output_size=grad_RN.shape[0])
    out_XN = torch.zeros((experts, grad_RN.shape[1]), dtype=torch.float32, device=grad_RN.device)
    return out_XN.index_add_(0, expert_R, grad_RN.float()).to(grad_RN.dtype)


def _bias_grad_shape(grad_RN: Tensor, counts_X: Tensor) -> Tensor:
    return grad_RN.new_empty((counts_X.shape[0], grad_RN.shape[1]))


def _bias_grad_cost(out_XN: Tensor, grad_RN: Tensor, counts_X: Tensor) -> Cost:
    return elementwise_cost(
        grad_RN.numel(),
        (grad_RN, counts_X),
        (out_XN,),
        size=(grad_RN.shape[0], grad_RN.shape[1]),
        primitive=Primitive.REDUCTION,
        access=Access.STRIDED,
        movement=(Movement.REDUCTION,),
    )


grouped_input_grad = Op(
    "grouped_input_grad",
    _input_grad,
    cost=_input_grad_cost,
    shape=_input_grad_shape,
    kernel=_input_grad_kernel,
    kernel_takes=lambda grad_RN, weight_XNK, counts_X: _takes(grad_RN, weight_XNK),
)
grouped_weight_grad = Op(
    "grouped_weight_grad",
    _weight_grad,
    cost=_weight_grad_cost,
    shape=_weight_grad_shape,
    kernel=_weight_grad_kernel,
    kernel_takes=lambda grad_RN, x_RK, counts_X: _torchs_takes(x_RK, grad_RN.shape[1], x_RK.shape[1]),
)
grouped_bias_grad = Op(
    "grouped_bias_grad",
    _bias_grad,
    cost=_bias_grad_cost,
    shape=_bias_grad_shape,
    kernel=lazy(_KERNELS, "bias_grad"),
    kernel_takes=lambda grad_RN, counts_X: (
        grad_RN.dtype in KERNEL_DTYPES and grad_RN.numel() > 0 and counts_X.shape[0] <= _MOST_EXPERTS
    ),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RK, weight_XNK, _, counts_X = inputs
    # Only what a wanted gradient needs: frozen experts keep no activations alive.
    ctx.save_for_backward(
        x_RK if ctx.needs_input_grad[1] else None, weight_XNK if ctx.needs_input_grad[0] else None, counts_X
    )


def _backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
    x_RK, weight_XNK, counts_X = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    return (
        grouped_input_grad(grad_RN, weight_XNK, counts_X) if need_x else None,
        grouped_weight_grad(grad_RN, x_RK, counts_X) if need_weight else None,
        grouped_bias_grad(grad_RN, counts_X) if need_bias else None,
        None,
    )


grouped_linear = Op(
    "grouped_linear",
    _linear,
    cost=_linear_cost,
    shape=_linear_shape,
    kernel=linear_kernel,
    kernel_takes=lambda x_RK, weight_XNK, bias_XN, counts_X: _takes(x_RK, weight_XNK, bias_XN),
    backward=_backward,
    setup=_setup,
)
