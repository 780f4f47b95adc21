"""Rotary position embedding: the cos/sin table of a step, and its application to queries and keys at once.

q' = q·cos(pθ) + rotate(q)·sin(pθ), θ_i = base^(−2i/R) (Su et al. 2021, 2104.09864); the first R of E dimensions turn.
Legend: T tokens  H query heads  K key heads  E head dim  R rotary dims  C = R/2 frequencies
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Access, Cost, Movement, elementwise_cost
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy, same_kernel_dtype

# Up to here a call costs more than its numbers: queries and keys are turned together. One token of 12 + 4 heads takes
# 23 µs on a Zen 5, and 37 apart; 512 tokens in fp32 are faster apart.
_TOGETHER = 256


def _rotary_table(positions_T: Tensor, frequencies_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    angles_TC = positions_T.float().unsqueeze(-1) * frequencies_C.float()
    return angles_TC.cos() * scale, angles_TC.sin() * scale


def _rotary_table_cost(out: tuple[Tensor, Tensor], positions_T: Tensor, frequencies_C: Tensor, scale: float) -> Cost:
    tokens, channels = out[0].shape
    return elementwise_cost(
        5 * tokens * channels,
        (positions_T, frequencies_C),
        out,
        size=(tokens, channels),
        movement=(Movement.BROADCAST,),
    )


def _rotary_table_takes(positions_T: Tensor, frequencies_C: Tensor, scale: float) -> bool:
    integers = positions_T.dtype in (torch.int32, torch.int64) and positions_T.is_contiguous()
    table = frequencies_C.dtype == torch.float32 and frequencies_C.is_contiguous()
    return integers and table and positions_T.dim() == 1 and positions_T.numel() * frequencies_C.numel() > 0


rotary_table = Op(
    "rotary_table",
    _rotary_table,
    cost=_rotary_table_cost,
    kernel=lazy("rooflight.ops.kernels.rotary_table", "rotary_table"),
    kernel_takes=_rotary_table_takes,
)


def _turn(x_THE: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool) -> Tensor:
    """x turned, in fp32."""
    channels = cos_TC.shape[-1]
    x, cos, sin = x_THE.float(), cos_TC.unsqueeze(-2), sin_TC.unsqueeze(-2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if interleaved:
        halves = slice(0, 2 * channels, 2), slice(1, 2 * channels, 2)
    else:
        halves = slice(0, channels), slice(channels, 2 * channels)
    a, b = (x[..., half] for half in halves)
    out_a, out_b = (out[..., half] for half in halves)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    if 2 * channels < x.shape[-1]:
        out[..., 2 * channels :] = x[..., 2 * channels :]
    return out


def _rotary(
    q_THE: Tensor, k_TKE: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    sin_TC = -sin_TC if inverse else sin_TC
    dtype, heads = q_THE.dtype, q_THE.shape[1]
    if q_THE.shape[0] > _TOGETHER or dtype != k_TKE.dtype or q_THE.shape[2] != k_TKE.shape[2]:
        q_THE, k_TKE = (_turn(x, cos_TC, sin_TC, interleaved).to(x.dtype) for x in (q_THE, k_TKE))
        return q_THE, k_TKE
    out = _turn(torch.cat((q_THE, k_TKE), dim=1), cos_TC, sin_TC, interleaved)
    # Two results must not share memory, as parts of one fp32 tensor would.
    return out[:, :heads].to(dtype, copy=True), out[:, heads:].to(dtype, copy=True)


def _rotary_shape(
    q_THE: Tensor, k_TKE: Tensor, cos_TC: Tensor, sin_TC: Tensor, interleaved: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    return q_THE.new_empty(q_THE.shape), k_TKE.new_empty(k_TKE.shape)


def _rotary_cost(
    out: tuple[Tensor, Tensor],
    q_THE: Tensor,
    k_TKE: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    interleaved: bool,
    inverse: bool,
) -> Cost:
    tokens, channels = cos_TC.shape
    heads = q_THE.shape[1] + k_TKE.shape[1]
    # A pair: four products, an addition and a subtraction. The inverse negates the small table once.
    flops = 6 * tokens * heads * channels + (tokens * channels if inverse else 0)
    return elementwise_cost(
        flops,
        (q_THE, k_TKE, cos_TC, sin_TC),
        out,
        size=(tokens, heads * q_THE.shape[2]),
        access=Access.STRIDED,
        movement=(Movement.BROADCAST,),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_THE, k_TKE, cos_TC, sin_TC, ctx.interleaved, ctx.inverse = inputs
    ctx.shapes, ctx.dtype = (q_THE.shape, k_TKE.shape), q_THE.dtype
    ctx.save_for_backward(cos_TC, sin_TC)


def _backward(ctx: Any, grad_q_THE: Tensor | None, grad_k_TKE: Tensor | None) -> tuple[Any, ...]:
    cos_TC, sin_TC = ctx.saved_tensors
    if grad_q_THE is None:
        grad_q_THE = cos_TC.new_zeros(ctx.shapes[0], dtype=ctx.dtype)
    if grad_k_TKE is None:
        grad_k_TKE = cos_TC.new_zeros(ctx.shapes[1], dtype=ctx.dtype)
    # A rotation's transpose is the rotation back.
    grad_q, grad_k = rotary(grad_q_THE, grad_k_TKE, cos_TC, sin_TC, ctx.interleaved, not ctx.inverse)
    return grad_q, grad_k, None, None, None, None


def _takes(q_THE: Tensor, k_TKE: Tensor, cos_TC: Tensor, sin_TC: Tensor, *_: bool) -> bool:
    tokens, channels = cos_TC.shape
    same = q_THE.shape[0] == k_TKE.shape[0] == tokens and q_THE.shape[2] == k_TKE.shape[2]
    return (
        same
        and 0 < 2 * channels <= q_THE.shape[2]
        and same_kernel_dtype(q_THE, k_TKE)
        and {cos_TC.dtype, sin_TC.dtype} <= KERNEL_DTYPES
    )


rotary = Op(
    "rotary",
    _rotary,
    cost=_rotary_cost,
    shape=_rotary_shape,
    kernel=lazy("rooflight.ops.kernels.rope", "rotary"),
    kernel_takes=_takes,
    backward=_backward,
    setup=_setup,
)
