"""Normalisations, forward and backward: batch, layer, group, RMS."""

from __future__ import annotations

from torch import Tensor

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import product, rows_and_columns
from rooflight.ops.cost import Access, Cost, Count, Movement, Primitive, elementwise_cost

# Operations an element. Statistics: sum; subtract, square, sum. Normalise: multiply by 1/σ.
CENTRED, ROOT_MEAN_SQUARE = 5, 3
# Backward. x̂: subtract, multiply; Σg; g·x̂, Σ; then (g − c₁ − x̂·c₂)/σ: two subtractions, two multiplications.
CENTRED_BACKWARD, ROOT_MEAN_SQUARE_BACKWARD = 9, 6


def _norm(call: Call, flops: Count, size: tuple[Count, ...], *, strided: bool = False) -> Cost:
    return elementwise_cost(
        flops,
        call.reads,
        call.writes,
        size=size,
        primitive=Primitive.REDUCTION,
        access=Access.STRIDED if strided else Access.SEQUENTIAL,
        movement=(Movement.REDUCTION, Movement.BROADCAST),
    ).named("norm")


def _affine(call: Call) -> int:
    return (call.get("weight") is not None) + (call.get("bias") is not None)


def _affine_backward(call: Call) -> int:
    """g·w; then for the weight's gradient a product and a sum, for the bias's a sum, as far as they are wanted."""
    wanted = call.get("output_mask") or (True, True, True)
    weighted = call.get("weight") is not None
    return weighted + (2 if weighted and wanted[1] else 0) + (1 if len(wanted) > 2 and wanted[2] else 0)


@prices("aten::native_layer_norm")
def layer_norm(call: Call) -> Cost:
    x: Tensor = call["input"]
    columns = product(call["normalized_shape"])
    return _norm(call, (CENTRED + _affine(call)) * x.numel(), rows_and_columns(x, columns))


@prices("aten::native_layer_norm_backward")
def layer_norm_backward(call: Call) -> Cost:
    x: Tensor = call["input"]
    columns = product(call["normalized_shape"])
    flops = (CENTRED_BACKWARD + _affine_backward(call)) * x.numel()
    return _norm(call, flops, rows_and_columns(x, columns))


@prices("aten::_fused_rms_norm", "aten::rms_norm")
def rms_norm(call: Call) -> Cost:
    x: Tensor = call["input"]
    columns = product(call["normalized_shape"])
    return _norm(call, (ROOT_MEAN_SQUARE + _affine(call)) * x.numel(), rows_and_columns(x, columns))


@prices("aten::_fused_rms_norm_backward")
def rms_norm_backward(call: Call) -> Cost:
    x: Tensor = call["input"]
    columns = product(call["normalized_shape"])
    flops = (ROOT_MEAN_SQUARE_BACKWARD + _affine_backward(call)) * x.numel()
    return _norm(call, flops, rows_and_columns(x, columns))


@prices("aten::native_group_norm")
def group_norm(call: Call) -> Cost:
    x: Tensor = call["input"]
    columns = call["C"] * call["HxW"] // call["group"]
    return _norm(call, (CENTRED + _affine(call)) * x.numel(), rows_and_columns(x, columns))


@prices("aten::native_group_norm_backward")
def group_norm_backward(call: Call) -> Cost:
    x: Tensor = call["input"]
    columns = call["C"] * call["HxW"] // call["group"]
    return _norm(call, (CENTRED_BACKWARD + _affine_backward(call)) * x.numel(), rows_and_columns(x, columns))


def _channels(x: Tensor) -> tuple[Count, Count]:
    channels = x.shape[1] if x.ndim > 1 else 1
    return channels, x.numel() // channels if channels else 0


@prices(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_no_training",
    "aten::_native_batch_norm_legit_functional", "aten::cudnn_batch_norm", "aten::miopen_batch_norm",
    "aten::_batch_norm_with_update", "aten::_batch_norm_with_update_functional", "aten::_batch_norm_no_update",
)  # fmt: skip
def batch_norm(call: Call) -> Cost:
    """Statistics over batch and space in training; in inference a subtraction and a multiplication with kept ones."""
    x: Tensor = call["input"]
    frozen = "no_training" in call.name or "no_update" in call.name
    training = not frozen and call.get("training") is not False
    per_element = (CENTRED if training else 2) + _affine(call)
    return _norm(call, per_element * x.numel(), _channels(x), strided=True)


@prices(
    "aten::native_batch_norm_backward", "aten::cudnn_batch_norm_backward", "aten::miopen_batch_norm_backward",
    "aten::batch_norm_backward",
)  # fmt: skip
def batch_norm_backward(call: Call) -> Cost:
    """As a layer norm's backward; with frozen statistics the input's gradient is one multiplication."""
    x: Tensor = call["input"]
    training = call.get("train", "update") is not False
    per_element = (CENTRED_BACKWARD if training else 1) + _affine_backward(call)
    return _norm(call, per_element * x.numel(), _channels(x), strided=True)


# Batch norm over several ranks, in the pieces between its collectives; operations an element.
SYNCHRONIZED = {
    "batch_norm_stats": 4,
    "batch_norm_elemt": 4,
    "batch_norm_backward_reduce": 5,
    "batch_norm_backward_elemt": 6,
    "batch_norm_update_stats": 4,
    "batch_norm_gather_stats": 6,
    "batch_norm_gather_stats_with_counts": 6,
}


@prices(*(f"aten::{name}" for name in SYNCHRONIZED))
def synchronized(call: Call) -> Cost:
    """SyncBatchNorm's kernels; gathering statistics touches only one number a channel and rank."""
    x: Tensor = call["mean"] if "gather" in call.name else call["input"]
    return _norm(call, SYNCHRONIZED[call.name] * x.numel(), _channels(x), strided=True)


@prices("aten::renorm", "aten::embedding_renorm", "aten::_weight_norm_interface")
def weight_norm(call: Call) -> Cost:
    """Rows rescaled by their norm: square, sum, scale."""
    w: Tensor = call.get("self", "v")
    return _norm(call, 3 * w.numel(), (w.shape[0], w.numel() // w.shape[0]))


@prices("aten::_weight_norm_interface_backward")
def weight_norm_backward(call: Call) -> Cost:
    w: Tensor = call["saved_v"]
    return _norm(call, ROOT_MEAN_SQUARE_BACKWARD * w.numel(), (w.shape[0], w.numel() // w.shape[0]))
