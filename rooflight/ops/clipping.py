"""Gradient clipping: the norm over all tensors, the scale that follows from it, and scaling in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops.adamw import elements_of
from rooflight.ops.cost import Cost, Movement, Primitive, elementwise_cost
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy

KERNELS = "rooflight.ops.kernels.clipping"
_launch_clip_scale = lazy(KERNELS, "clip_scale")


def _dense(tensors: list[Tensor], *_: Any) -> bool:
    """What the kernels take: something to do, everything in memory order, in types that kernels load and store."""
    return bool(tensors) and all(tensor.is_contiguous() and tensor.dtype in KERNEL_DTYPES for tensor in tensors)


# Elements whose fp32 copy stays in cache, and those that one fp32 sum runs over: torch adds a long vector up in a few
# lanes, and 4M squares are then off by 7e-5.
_BLOCK, _ROW = 1 << 20, 1024


def _grad_norm(grads: list[Tensor]) -> Tensor:
    parts: list[Tensor] = []
    for grad in grads:
        for block in grad.flatten().split(_BLOCK):
            whole = block.numel() - block.numel() % _ROW
            parts.append(torch.linalg.vector_norm(block[:whole].float().view(-1, _ROW), dim=1))
            parts.append(torch.linalg.vector_norm(block[whole:].float()).view(1))
    return torch.linalg.vector_norm(torch.cat(parts))


def _grad_norm_shape(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def _grad_norm_cost(out: Tensor, grads: list[Tensor]) -> Cost:
    # Square and add for an element, one root.
    elements = elements_of(grads)
    return elementwise_cost(
        2 * elements + 1,
        grads,
        (out,),
        size=(elements,),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION,),
    )


# grad_norm(grads) -> √Σg² over all elements of all tensors, fp32, the same bits each time.
grad_norm = Op(
    "grad_norm",
    _grad_norm,
    cost=_grad_norm_cost,
    shape=_grad_norm_shape,
    kernel=lazy(KERNELS, "grad_norm"),
    kernel_takes=_dense,
)


def _limit(max_norm: float) -> float:
    """The greatest norm allowed, infinite where 0 says none; raises InvalidValue on what is negative or no number."""
    if not max_norm >= 0.0:
        raise InvalidValue(f"max_norm {max_norm} is not 0 or more; use a value such as 1.0, or 0 for no clipping")
    return max_norm or math.inf


def _clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    limited = torch.clamp(_limit(max_norm) / (norm + 1e-6), max=1.0)
    return torch.where(norm < math.inf, limited, math.nan)


def _clip_scale_shape(norm: Tensor, max_norm: float) -> Tensor:
    _limit(max_norm)
    return torch.empty_like(norm)


def _clip_scale_cost(out: Tensor, norm: Tensor, max_norm: float) -> Cost:
    # Compare with infinity; add ε, divide, limit to 1.
    return elementwise_cost(4, (norm,), (out,), size=(1,))


def _clip_scale_kernel(norm: Tensor, max_norm: float) -> Tensor:
    return _launch_clip_scale(norm, _limit(max_norm))


# clip_scale(norm, max_norm) -> min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ scales; 1 where
# max_norm is 0 or infinite; NaN for a norm that is not finite, so that `adamw` with this scale changes nothing.
clip_scale = Op(
    "clip_scale",
    _clip_scale,
    cost=_clip_scale_cost,
    shape=_clip_scale_shape,
    kernel=_clip_scale_kernel,
)


def _scale(grads: list[Tensor], factor: Tensor) -> None:
    # A scalar of 1 is common (no clipping, the loss itself as root of the backward) and costs no pass over memory.
    if factor != 1:
        for grad in grads:
            grad.mul_(factor)


def _scale_shape(grads: list[Tensor], factor: Tensor) -> None:
    return None


def scale_cost(out: None, grads: list[Tensor], factor: Tensor) -> Cost:
    """One multiplication an element, as if the factor were not 1: only the data knows."""
    elements = elements_of(grads)
    return elementwise_cost(elements, (*grads, factor), grads, size=(elements,), movement=(Movement.BROADCAST,))


# scale_(grads, factor): every tensor times a scalar on the device, in place.
scale_ = Op(
    "scale_",
    _scale,
    cost=scale_cost,
    shape=_scale_shape,
    kernel=lazy(KERNELS, "scale"),
    kernel_takes=_dense,
    mutates=("grads",),
)
