"""Elementwise operators: one rule for all of them, driven by PyTorch's pointwise tag."""

from __future__ import annotations

import torch
from torch import Tensor

from rooflight.ops.aten.registry import Call, Rule, base_name, fallback, prices
from rooflight.ops.aten.shapes import access_of, broadcasts, elements, is_one
from rooflight.ops.cost import Cost, Count, Movement, elementwise_cost

# Arithmetic and transcendental operations an output element; what is not listed does one.
FLOPS: dict[str, int] = {
    "clone": 0, "positive": 0, "where": 0, "masked_fill": 0, "zero": 0, "copy": 0,
    "sigmoid": 4, "silu": 5, "mish": 5, "softplus": 3, "elu": 3, "celu": 3, "selu": 4, "logit": 3, "hardswish": 5,
    "hardsigmoid": 4, "hardtanh": 2, "relu6": 2, "leaky_relu": 2, "_prelu_kernel": 2, "softshrink": 2, "glu": 5,
    "log_sigmoid_forward": 4, "rrelu": 2, "rrelu_with_noise": 2, "hardswish_backward": 5, "hardsigmoid_backward": 2,
    "hardtanh_backward": 2, "sigmoid_backward": 3, "tanh_backward": 3, "silu_backward": 9, "mish_backward": 12,
    "elu_backward": 3, "leaky_relu_backward": 2, "_prelu_kernel_backward": 3, "softplus_backward": 4,
    "log_sigmoid_backward": 4, "glu_backward": 9, "logit_backward": 3, "rrelu_with_noise_backward": 1,
    "native_dropout_backward": 2, "addcmul": 3, "addcdiv": 3, "lerp": 3, "xlogy": 2, "logaddexp": 5, "logaddexp2": 5,
    "fmod": 3, "remainder": 3, "hypot": 4, "square": 1, "sinc": 3, "frac": 2, "deg2rad": 1, "polar": 4, "mse_loss": 2,
    "smooth_l1_loss": 4, "huber_loss": 4, "binary_cross_entropy": 5, "binary_cross_entropy_with_logits": 7,
    "soft_margin_loss": 4, "mse_loss_backward": 3, "smooth_l1_loss_backward": 3, "huber_loss_backward": 3,
    "binary_cross_entropy_backward": 5, "soft_margin_loss_backward": 5, "_add_relu": 2, "_masked_scale": 2,
    "allclose": 4, "isclose": 4,
}  # fmt: skip
GELU_FLOPS = {"none": 5, "tanh": 9}
GELU_BACKWARD_FLOPS = {"none": 11, "tanh": 18}
# Elementwise operators that PyTorch does not tag.
_UNTAGGED = """
    elu_backward glu glu_backward hardshrink_backward hardsigmoid_backward hardswish hardswish_backward
    hardtanh_backward leaky_relu_backward log_sigmoid_backward log_sigmoid_forward softplus_backward
    softshrink_backward _prelu_kernel _prelu_kernel_backward floor_divide rrelu_with_noise
    rrelu_with_noise_backward rrelu_with_noise_functional _add_relu complex polar mse_loss_backward
    smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward soft_margin_loss_backward
    _masked_scale isin mish_backward quantize_per_tensor quantize_per_channel dequantize int_repr
    fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask
    _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _amp_update_scale ldexp conj_physical
"""
UNTAGGED = frozenset(_UNTAGGED.split())
LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss")


def flops_per_element(call: Call) -> Count:
    """Operations an output element, from the table and the arguments that change them."""
    name = call.name.removeprefix("_foreach_")
    if name == "gelu":
        return GELU_FLOPS[call["approximate"]]
    if name == "gelu_backward":
        return GELU_BACKWARD_FLOPS[call["approximate"]]
    if name in ("add", "sub", "rsub"):
        scale = call.get("alpha")
        return 1 if scale is None or is_one(scale) else 2
    if name in ("addcmul", "addcdiv"):
        scale = call.get("value", "scalars")
        return 2 if is_one(scale) else 3
    if name == "clamp":
        return sum(call.get(bound) is not None for bound in ("min", "max"))
    if name == "div":
        return 1 if call.get("rounding_mode") is None else 2
    return FLOPS.get(name, 1)


def pointwise(call: Call) -> Cost:
    """FLOPs: table × output elements. Every tensor is moved once."""
    output = call.writes[0]
    count = output.numel()
    return elementwise_cost(
        flops_per_element(call) * count,
        call.reads,
        call.writes,
        size=(count,),
        access=access_of((*call.reads, *call.writes)),
        movement=(Movement.BROADCAST,) if broadcasts(call.reads, output) else (),
    ).named("elementwise")


@prices(*(f"aten::{name}" for name in LOSSES), "aten::binary_cross_entropy_with_logits")
def loss(call: Call) -> Cost:
    """An elementwise loss over the input, summed unless reduction is none (0)."""
    target: Tensor = call["self"]
    count = target.numel()
    reduced = call["reduction"] != 0
    return elementwise_cost(
        (FLOPS[call.name] + (1 if reduced else 0)) * count,
        call.reads,
        call.writes,
        size=(count,),
        movement=(Movement.REDUCTION,) if reduced else (),
    ).named("reduction" if reduced else "elementwise")


@prices("aten::equal", "aten::allclose")
def compare(call: Call) -> Cost:
    """Two tensors compared whole; the answer is one flag on the host."""
    count = call.reads[0].numel()
    return elementwise_cost(
        FLOPS.get(call.name, 1) * count, call.reads, call.writes, size=(count,), movement=(Movement.REDUCTION,)
    ).named("reduction")


FOREACH_REDUCTIONS = {"norm": 2, "max": 1, "powsum": 2}


def foreach(call: Call) -> Cost:
    """The same elementwise operation over a list of tensors, in one launch or a few."""
    name = call.name.removeprefix("_foreach_")
    if name in FOREACH_REDUCTIONS:
        count = elements(call.reads)
        return elementwise_cost(
            FOREACH_REDUCTIONS[name] * count, call.reads, call.writes, size=(count,), movement=(Movement.REDUCTION,)
        ).named("reduction")
    count = elements(call.writes)
    reads = call.reads
    if name in ("zero", "copy"):
        written = {id(t) for t in call.writes}
        reads = tuple(t for t in reads if id(t) not in written)
    return elementwise_cost(flops_per_element(call) * count, reads, call.writes, size=(count,)).named("elementwise")


@fallback
def find_foreach(func: torch._ops.OpOverload) -> Rule | None:
    return foreach if base_name(func).startswith("aten::_foreach_") else None


@fallback
def find_pointwise(func: torch._ops.OpOverload) -> Rule | None:
    namespace, name = base_name(func).split("::")
    if torch.Tag.pointwise in func.tags or (namespace == "aten" and name in UNTAGGED):
        return pointwise
    # The in-place and out forms often lack the tag that the functional form carries.
    packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
    if packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
        return pointwise
    return None
