"""Rotary positions out of a fused projection, in training: q and k turned, v copied, and back to its whole gradient.

q' and k' as of `rotary` in `ops/rope`. The backward turns the gradients of q and k back and copies that of v to where
they belong, in one pass: apart, three gradients would be joined by another. As v is a copy, the projection itself is
not kept for it.
Legend: T tokens  H query heads  K key heads  E head dim  W = (H + 2K)·E  C rotary frequencies
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Access, Cost, Movement, elementwise_cost
from rooflight.ops.op import Op, lazy, same_kernel_dtype
from rooflight.ops.rope import rotary


def _heads_of(qkv_TW: Tensor, heads: int, key_heads: int) -> list[Tensor]:
    """q [T,H,E], k and v [T,K,E] as views of a fused projection, or of its gradient."""
    together = heads + 2 * key_heads
    return list(qkv_TW.unflatten(1, (together, qkv_TW.shape[1] // together)).split([heads, key_heads, key_heads], 1))


def _rotary_qkv(
    qkv_TW: Tensor, cos_TC: Tensor, sin_TC: Tensor, heads: int, key_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    q_THE, k_TKE, v_TKE = _heads_of(qkv_TW, heads, key_heads)
    q_THE, k_TKE = rotary.reference(q_THE, k_TKE, cos_TC, sin_TC, interleaved)
    return q_THE, k_TKE, v_TKE.clone(memory_format=torch.contiguous_format)


def _rotary_qkv_shape(
    qkv_TW: Tensor, cos_TC: Tensor, sin_TC: Tensor, heads: int, key_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (qkv_TW.new_empty(x.shape) for x in _heads_of(qkv_TW, heads, key_heads))
    return q, k, v


def _cost_between(whole_TW: Tensor, parts: Sequence[Tensor], tables: tuple[Tensor, Tensor], back: bool) -> Cost:
    """Price of q, k and v, or their gradients, from the whole or back to it."""
    tokens, channels = tables[0].shape
    heads, key_heads = parts[0].shape[1], parts[1].shape[1]
    # As of `rotary`, whose measured curve, of the same kernel, holds here too; values are copied.
    flops = 6 * tokens * (heads + key_heads) * channels + (tokens * channels if back else 0)
    return elementwise_cost(
        flops,
        (*(parts if back else (whole_TW,)), *tables),
        (whole_TW,) if back else parts,
        size=(tokens, whole_TW.shape[1]),
        access=Access.STRIDED,
        movement=(Movement.BROADCAST,),
    ).named("rotary")


def _rotary_qkv_cost(
    out: tuple[Tensor, ...],
    qkv_TW: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    heads: int,
    key_heads: int,
    interleaved: bool,
) -> Cost:
    return _cost_between(qkv_TW, out, (cos_TC, sin_TC), back=False)


def _rotary_qkv_backward(
    grad_q_THE: Tensor,
    grad_k_TKE: Tensor,
    grad_v_TKE: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    interleaved: bool = False,
) -> Tensor:
    grads = rotary.reference(grad_q_THE, grad_k_TKE, cos_TC, sin_TC, interleaved, True)
    return torch.cat((*grads, grad_v_TKE), 1).flatten(1)


def _rotary_qkv_backward_shape(
    grad_q_THE: Tensor,
    grad_k_TKE: Tensor,
    grad_v_TKE: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    interleaved: bool = False,
) -> Tensor:
    tokens, heads, head_dim = grad_q_THE.shape
    return grad_q_THE.new_empty((tokens, (heads + 2 * grad_k_TKE.shape[1]) * head_dim))


def _rotary_qkv_backward_cost(
    grad_TW: Tensor,
    grad_q_THE: Tensor,
    grad_k_TKE: Tensor,
    grad_v_TKE: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    interleaved: bool,
) -> Cost:
    return _cost_between(grad_TW, (grad_q_THE, grad_k_TKE, grad_v_TKE), (cos_TC, sin_TC), back=True)


def _takes_parts(
    grad_q_THE: Tensor, grad_k_TKE: Tensor, grad_v_TKE: Tensor, cos_TC: Tensor, sin_TC: Tensor, *_: bool
) -> bool:
    turns = rotary.kernel_takes is not None and rotary.kernel_takes(grad_q_THE, grad_k_TKE, cos_TC, sin_TC)
    return turns and grad_v_TKE.shape == grad_k_TKE.shape and same_kernel_dtype(grad_k_TKE, grad_v_TKE)


rotary_qkv_backward = Op(
    "rotary_qkv_backward",
    _rotary_qkv_backward,
    cost=_rotary_qkv_backward_cost,
    shape=_rotary_qkv_backward_shape,
    kernel=lazy("rooflight.ops.kernels.rope", "rotary_qkv_backward"),
    kernel_takes=_takes_parts,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, cos_TC, sin_TC, _, _, ctx.interleaved = inputs
    ctx.shapes, ctx.dtype = [x.shape for x in output], output[0].dtype
    ctx.save_for_backward(cos_TC, sin_TC)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    cos_TC, sin_TC = ctx.saved_tensors
    given = [
        cos_TC.new_zeros(shape, dtype=ctx.dtype) if grad is None else grad
        for grad, shape in zip(grads, ctx.shapes, strict=True)
    ]
    return rotary_qkv_backward(*given, cos_TC, sin_TC, ctx.interleaved), None, None, None, None, None


def _takes(
    qkv_TW: Tensor, cos_TC: Tensor, sin_TC: Tensor, heads: int, key_heads: int, interleaved: bool = False
) -> bool:
    if qkv_TW.shape[1] % (heads + 2 * key_heads):
        return False
    q_THE, k_TKE, v_TKE = _heads_of(qkv_TW, heads, key_heads)
    return _takes_parts(q_THE, k_TKE, v_TKE, cos_TC, sin_TC)


rotary_qkv = Op(
    "rotary_qkv",
    _rotary_qkv,
    cost=_rotary_qkv_cost,
    shape=_rotary_qkv_shape,
    kernel=lazy("rooflight.ops.kernels.rope", "rotary_qkv"),
    kernel_takes=_takes,
    backward=_backward,
    setup=_setup,
)
