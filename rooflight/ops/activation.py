"""Activations: plain (GELU, SiLU, ReLU) and gated (SwiGLU, GeGLU) over the stacked output of one fused projection.

SwiGLU: silu(gate)·up (Shazeer 2020, 2002.05202); GELU: x·Φ(x), or its tanh form (Hendrycks & Gimpel 2016, 1606.08415).
`clamped_swiglu` is gpt-oss's: gate and up interleaved, clamped to ±limit, (up + 1)·gate·sigmoid(1.702·gate).
Legend: T tokens (any leading dimensions)  F feed-forward width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rooflight.errors import InvalidValue
from rooflight.ops.cost import Access, Cost, elementwise_cost
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy, rows_and_columns

KINDS = ("silu", "gelu", "gelu_tanh", "relu")
_KERNELS = "rooflight.ops.kernels.activation"
_CLAMP_LIMIT, _CLAMP_ALPHA = 7.0, 1.702

# FLOPs an element of f(x), and of its derivative times the gradient, written out below as the reference computes them.
# silu: negate, exp, add, divide, multiply; gelu: scale, erf, add, half, multiply; tanh form: cube(2), scale, add,
# scale, tanh, add, half, multiply; relu: one comparison.
_FORWARD_FLOPS = {"silu": 5, "gelu": 5, "gelu_tanh": 9, "relu": 1}
_BACKWARD_FLOPS = {"silu": 9, "gelu": 11, "gelu_tanh": 19, "relu": 2}


def _apply(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "relu":
        return F.relu(x)
    raise InvalidValue(f"activation {kind!r} is unknown; use one of {', '.join(KINDS)}")


def _derivative(x: Tensor, kind: str) -> Tensor:
    """f'(x) in closed form, in x's precision."""
    if kind == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if kind == "gelu":
        density = torch.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * density
    if kind == "gelu_tanh":
        t = torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    return (x > 0).to(x.dtype)


def _takes(x_TF: Tensor, kind: str) -> bool:
    return x_TF.dtype in KERNEL_DTYPES and kind in KINDS


def _backward_takes(grad_TF: Tensor, x_TF: Tensor, kind: str) -> bool:
    return grad_TF.dtype in KERNEL_DTYPES and _takes(x_TF, kind)


def _gated_takes(gate_up_T2F: Tensor, kind: str) -> bool:
    known = kind in KINDS or kind == "clamped_swiglu"
    return known and gate_up_T2F.dtype in KERNEL_DTYPES and gate_up_T2F.shape[-1] % 2 == 0 and gate_up_T2F.numel() > 0


def _gated_backward_takes(grad_TF: Tensor, gate_up_T2F: Tensor, kind: str) -> bool:
    return grad_TF.dtype in KERNEL_DTYPES and _gated_takes(gate_up_T2F, kind)


def _activation(x_TF: Tensor, kind: str) -> Tensor:
    return _apply(x_TF, kind)


def _activation_shape(x_TF: Tensor, kind: str) -> Tensor:
    return x_TF.new_empty(x_TF.shape)


def _activation_cost(out_TF: Tensor, x_TF: Tensor, kind: str) -> Cost:
    return elementwise_cost(_FORWARD_FLOPS[kind] * x_TF.numel(), (x_TF,), (out_TF,), size=rows_and_columns(x_TF))


def _activation_backward(grad_TF: Tensor, x_TF: Tensor, kind: str) -> Tensor:
    return (grad_TF.float() * _derivative(x_TF.float(), kind)).to(x_TF.dtype)


def _activation_backward_shape(grad_TF: Tensor, x_TF: Tensor, kind: str) -> Tensor:
    return x_TF.new_empty(x_TF.shape)


def _activation_backward_cost(out_TF: Tensor, grad_TF: Tensor, x_TF: Tensor, kind: str) -> Cost:
    return elementwise_cost(
        _BACKWARD_FLOPS[kind] * x_TF.numel(), (grad_TF, x_TF), (out_TF,), size=rows_and_columns(x_TF)
    )


activation_backward = Op(
    "activation_backward",
    _activation_backward,
    cost=_activation_backward_cost,
    shape=_activation_backward_shape,
    kernel=lazy(_KERNELS, "activation_backward"),
    kernel_takes=_backward_takes,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, None]:
    return activation_backward(grad_TF, ctx.saved_tensors[0], ctx.kind), None


activation = Op(
    "activation",
    _activation,
    cost=_activation_cost,
    shape=_activation_shape,
    kernel=lazy(_KERNELS, "activation"),
    kernel_takes=_takes,
    backward=_backward,
    setup=_setup,
)


def _clamped_parts(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up[..., 0::2], gate_up[..., 1::2]


def _gated(gate_up_T2F: Tensor, kind: str) -> Tensor:
    if kind == "clamped_swiglu":
        gate, up = _clamped_parts(gate_up_T2F)
        gate = gate.clamp(max=_CLAMP_LIMIT)
        return (up.clamp(-_CLAMP_LIMIT, _CLAMP_LIMIT) + 1) * (gate * torch.sigmoid(gate * _CLAMP_ALPHA))
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return _apply(gate, kind).mul_(up)


def _gated_shape(gate_up_T2F: Tensor, kind: str) -> Tensor:
    return gate_up_T2F.new_empty((*gate_up_T2F.shape[:-1], gate_up_T2F.shape[-1] // 2))


def gated_flops(kind: str) -> int:
    """FLOPs of an output of the gated activation."""
    # clamped: three clamps, add, scale, sigmoid (4), two products.
    return 11 if kind == "clamped_swiglu" else _FORWARD_FLOPS[kind] + 1


def _gated_cost(out_TF: Tensor, gate_up_T2F: Tensor, kind: str) -> Cost:
    return elementwise_cost(
        gated_flops(kind) * out_TF.numel(),
        (gate_up_T2F,),
        (out_TF,),
        size=rows_and_columns(out_TF),
        access=Access.STRIDED,
    )


def _swiglu_backward(grad_TF: Tensor, gate_up_T2F: Tensor) -> Tensor:
    """`_gated_backward` of SwiGLU in torch's own kernels, which take bf16 to fp32 and back in registers."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    out_T2F = gate_up_T2F.new_empty(gate_up_T2F.shape)
    grad_gate, grad_up = out_T2F.chunk(2, dim=-1)
    torch.mul(grad_TF, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    torch.mul(F.silu(gate), grad_TF, out=grad_up)
    return out_T2F


def _gated_backward(grad_TF: Tensor, gate_up_T2F: Tensor, kind: str) -> Tensor:
    if kind == "silu" and grad_TF.device.type == "cpu" and grad_TF.dtype == gate_up_T2F.dtype:
        return _swiglu_backward(grad_TF, gate_up_T2F)
    grad = grad_TF.float()
    if kind == "clamped_swiglu":
        raw_gate, raw_up = (part.float() for part in _clamped_parts(gate_up_T2F))
        gate, up = raw_gate.clamp(max=_CLAMP_LIMIT), raw_up.clamp(-_CLAMP_LIMIT, _CLAMP_LIMIT)
        s = torch.sigmoid(gate * _CLAMP_ALPHA)
        grad_gate = grad * (up + 1) * (s + _CLAMP_ALPHA * gate * s * (1 - s)) * (raw_gate <= _CLAMP_LIMIT)
        grad_up = grad * gate * s * (raw_up.abs() <= _CLAMP_LIMIT)
        return torch.stack((grad_gate, grad_up), dim=-1).flatten(-2).to(gate_up_T2F.dtype)
    gate, up = (part.float() for part in gate_up_T2F.chunk(2, dim=-1))
    grad_gate, grad_up = grad * up * _derivative(gate, kind), grad * _apply(gate, kind)
    return torch.cat((grad_gate, grad_up), dim=-1).to(gate_up_T2F.dtype)


def _gated_backward_shape(grad_TF: Tensor, gate_up_T2F: Tensor, kind: str) -> Tensor:
    return gate_up_T2F.new_empty(gate_up_T2F.shape)


def _gated_backward_cost(out_T2F: Tensor, grad_TF: Tensor, gate_up_T2F: Tensor, kind: str) -> Cost:
    # f'(gate)·grad, times up; f(gate) again, times grad. clamped: 3 clamps, 2 comparisons, |up|, scale, sigmoid (4),
    # up+1 and its product, 1−s, three products and a sum, two masks, three products.
    per_element = 23 if kind == "clamped_swiglu" else _BACKWARD_FLOPS[kind] + 1 + _FORWARD_FLOPS[kind] + 1
    return elementwise_cost(
        per_element * grad_TF.numel(),
        (grad_TF, gate_up_T2F),
        (out_T2F,),
        size=rows_and_columns(grad_TF),
        access=Access.STRIDED,
    )


gated_activation_backward = Op(
    "gated_activation_backward",
    _gated_backward,
    cost=_gated_backward_cost,
    shape=_gated_backward_shape,
    kernel=lazy(_KERNELS, "gated_activation_backward"),
    kernel_takes=_gated_backward_takes,
)


def _gated_op_backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, None]:
    return gated_activation_backward(grad_TF, ctx.saved_tensors[0], ctx.kind), None


gated_activation = Op(
    "gated_activation",
    _gated,
    cost=_gated_cost,
    shape=_gated_shape,
    kernel=lazy(_KERNELS, "gated_activation"),
    kernel_takes=_gated_takes,
    backward=_gated_op_backward,
    setup=_setup,
)


def _softcap(x_TV: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x_TV / cap)


def _softcap_shape(x_TV: Tensor, cap: float) -> Tensor:
    return x_TV.new_empty(x_TV.shape)


def _softcap_cost(out_TV: Tensor, x_TV: Tensor, cap: float) -> Cost:
    # Divide, tanh, multiply.
    return elementwise_cost(3 * x_TV.numel(), (x_TV,), (out_TV,), size=rows_and_columns(x_TV))


def _softcap_backward(grad_TV: Tensor, out_TV: Tensor, cap: float) -> Tensor:
    ratio = out_TV.float() / cap
    return (grad_TV.float() * (1 - ratio * ratio)).to(grad_TV.dtype)


def _softcap_backward_shape(grad_TV: Tensor, out_TV: Tensor, cap: float) -> Tensor:
    return grad_TV.new_empty(grad_TV.shape)


def _softcap_backward_cost(result: Tensor, grad_TV: Tensor, out_TV: Tensor, cap: float) -> Cost:
    # Divide, square, subtract, multiply.
    return elementwise_cost(4 * grad_TV.numel(), (grad_TV, out_TV), (result,), size=rows_and_columns(grad_TV))


softcap_backward = Op("softcap_backward", _softcap_backward, cost=_softcap_backward_cost, shape=_softcap_backward_shape)


def _softcap_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.cap = inputs[1]
    ctx.save_for_backward(output)


# Gemma 2's bound on logits: cap·tanh(x/cap).
softcap = Op(
    "softcap",
    _softcap,
    cost=_softcap_cost,
    shape=_softcap_shape,
    backward=lambda ctx, grad: (softcap_backward(grad, ctx.saved_tensors[0], ctx.cap), None),
    setup=_softcap_setup,
)
