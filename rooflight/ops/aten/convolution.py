"""Convolutions: a window of weights slides over positions.

Legend: N batch, C input channels, O output channels, X spatial positions (all dimensions), W window positions.
"""

from __future__ import annotations

from torch import Tensor

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import product
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Primitive, precision_of, tensor_bytes

DIRECT = tuple(
    f"aten::{name}"
    for name in (
        "convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution", "cudnn_convolution_relu",
        "cudnn_convolution_add_relu", "cudnn_convolution_transpose", "miopen_convolution", "_slow_conv2d_forward",
        "slow_conv3d_forward", "_conv_depthwise2d", "conv_depthwise3d", "slow_conv_dilated2d", "slow_conv_dilated3d",
        "slow_conv_transpose2d", "slow_conv_transpose3d", "_nnpack_spatial_convolution",
    )
)  # fmt: skip


def _window(weight: Tensor) -> Count:
    """Multiply-adds at one position: C/groups·W, or O/groups·W when transposed; the weight's first dimension is out."""
    return product(weight.shape[1:])


def _cost(call: Call, positions: Tensor, weight: Tensor, passes: Count, sums: Count, reads: tuple[Tensor, ...]) -> Cost:
    """2·N·X·O·(C/groups)·W FLOPs a pass over the tensor that holds the positions (with its channels)."""
    macs = positions.numel() * _window(weight)
    precision = precision_of(weight)
    complex_factor = 4 if weight.dtype.is_complex else 1
    flops: dict[str, Count] = {precision: 2 * macs * passes * complex_factor}
    if not (isinstance(sums, int) and sums == 0):
        flops[VECTOR] = flops.get(VECTOR, 0) + sums
    channels = weight.shape[0]
    return Cost(
        flops=flops,
        bytes_read=tensor_bytes(reads),
        bytes_written=tensor_bytes(call.writes),
        primitive=Primitive.SLIDING_WINDOW,
        access=Access.STRIDED,
        movement=(Movement.BROADCAST, Movement.GATHER, Movement.REDUCTION),
        size=(positions.numel() // channels, channels, _window(weight)),
        precision=precision,
        curve="convolution",
    )


@prices(*DIRECT)
def convolution(call: Call) -> Cost:
    """Every output position meets its window once; a transposed one spreads every input position instead.

    Positions in the padding count: that is what a dense kernel computes. Source: Dumoulin and Visin, 1603.07285.
    """
    x, weight, bias = call.get("input", "self"), call["weight"], call.get("bias")
    out = call.first_output()
    transposed = call.get("transposed") or "transpose" in call.name
    sums = 0 if bias is None else out.numel()
    if call.name.endswith("relu"):
        sums = sums + out.numel() * (2 if "add" in call.name else 1)
    return _cost(call, x if transposed else out, weight, 1, sums, call.reads)


@prices("aten::convolution_backward", "aten::convolution_backward_overrideable")
def convolution_backward(call: Call) -> Cost:
    """The gradient of the input and that of the weight cost the forward's FLOPs each; the bias's is a sum."""
    grad, x, weight, wanted = call["grad_output"], call["input"], call["weight"], call["output_mask"]
    positions = x if call["transposed"] else grad
    reads = (grad, *((weight,) if wanted[0] else ()), *((x,) if wanted[1] else ()))
    return _cost(call, positions, weight, wanted[0] + wanted[1], grad.numel() if wanted[2] else 0, reads)


@prices("aten::conv_tbc")
def conv_tbc(call: Call) -> Cost:
    """One-dimensional convolution over (time, batch, channels) with a weight of (W, C, O)."""
    weight_WCO, out = call["weight"], call.first_output()
    macs = out.numel() * weight_WCO.shape[0] * weight_WCO.shape[1]
    precision = precision_of(weight_WCO)
    flops = {precision: 2 * macs}
    flops[VECTOR] = flops.get(VECTOR, 0) + out.numel()
    return Cost(
        flops=flops,
        bytes_read=tensor_bytes(call.reads),
        bytes_written=tensor_bytes(call.writes),
        primitive=Primitive.SLIDING_WINDOW,
        access=Access.STRIDED,
        movement=(Movement.BROADCAST, Movement.GATHER, Movement.REDUCTION),
        size=(out.numel() // out.shape[-1], out.shape[-1], weight_WCO.shape[0] * weight_WCO.shape[1]),
        precision=precision,
        curve="convolution",
    )
