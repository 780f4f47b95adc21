"""Windows without weights: pooling, resampling, and unfolding into columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import product
from rooflight.ops.cost import Access, Cost, Count, Movement, Primitive, elementwise_cost


def _windowed(call: Call, flops: Count, size: tuple[Count, ...], *, scatter: bool = False, reads: Any = None) -> Cost:
    return elementwise_cost(
        flops,
        call.reads if reads is None else reads,
        call.writes,
        size=size,
        primitive=Primitive.SLIDING_WINDOW,
        access=Access.STRIDED,
        movement=(Movement.SCATTER,) if scatter else (Movement.GATHER, Movement.REDUCTION),
    ).named("pooling")


def _window(kernel: Sequence[Count], spatial: int) -> Count:
    """Elements of a window; one number stands for every dimension."""
    return product(kernel) if len(kernel) == spatial else product(tuple(kernel) * spatial)


def _spatial(call: Call) -> int:
    return 3 if "3d" in call.name else 2 if "2d" in call.name else 1


@prices(
    "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices", "aten::mkldnn_max_pool2d",
    "aten::mkldnn_max_pool3d", "aten::quantized_max_pool2d", "aten::avg_pool2d", "aten::avg_pool3d",
)  # fmt: skip
def pool(call: Call) -> Cost:
    """A comparison or an addition for every element of every window; an average also divides."""
    out = call.first_output()
    window = _window(call["kernel_size"], _spatial(call))
    return _windowed(call, out.numel() * (window + ("avg" in call.name)), (out.numel(), window))


@prices("aten::fractional_max_pool2d", "aten::fractional_max_pool3d")
def fractional_pool(call: Call) -> Cost:
    out = call.first_output()
    window = _window(call["kernel_size"], _spatial(call))
    return _windowed(call, out.numel() * window, (out.numel(), window))


@prices("aten::avg_pool2d_backward", "aten::avg_pool3d_backward")
def average_backward(call: Call) -> Cost:
    """Each gradient is divided once and added to every element of its window; the input itself is not read."""
    grad = call["grad_output"]
    window = _window(call["kernel_size"], _spatial(call))
    return _windowed(call, grad.numel() * (window + 1), (grad.numel(), window), scatter=True, reads=(grad,))


@prices(
    "aten::max_pool2d_with_indices_backward", "aten::max_pool3d_with_indices_backward",
    "aten::adaptive_max_pool2d_backward", "aten::adaptive_max_pool3d_backward",
    "aten::fractional_max_pool2d_backward", "aten::fractional_max_pool3d_backward",
)  # fmt: skip
def max_backward(call: Call) -> Cost:
    """Each gradient is added where its maximum was."""
    grad = call["grad_output"]
    return _windowed(call, grad.numel(), (grad.numel(), 1), scatter=True, reads=(grad, call["indices"]))


def adaptive_window(size: Count, out: Count) -> Count:
    """Elements of all windows of one dimension: window i spans floor(i·size/out) to ceil((i+1)·size/out).

    A symbolic size is taken to divide evenly, where the windows do not overlap.
    """
    if isinstance(size, int) and isinstance(out, int):
        return sum(-(-(i + 1) * size // out) - i * size // out for i in range(out))
    return size


def _adaptive_elements(x: Tensor, out: Tensor, spatial: int) -> Count:
    windows = product(adaptive_window(s, o) for s, o in zip(x.shape[-spatial:], out.shape[-spatial:], strict=True))
    return product(out.shape[: out.ndim - spatial]) * windows


@prices(
    "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_max_pool2d",
    "aten::adaptive_max_pool3d", "aten::mkldnn_adaptive_avg_pool2d", "aten::adaptive_avg_pool2d",
)  # fmt: skip
def adaptive_pool(call: Call) -> Cost:
    """Windows are derived from the output size; an average also divides once an output."""
    x, out = call["self"], call.first_output()
    count = _adaptive_elements(x, out, _spatial(call))
    return _windowed(call, count + (out.numel() if "avg" in call.name else 0), (out.numel(), x.numel()))


@prices("aten::_adaptive_avg_pool2d_backward", "aten::_adaptive_avg_pool3d_backward")
def adaptive_average_backward(call: Call) -> Cost:
    x, grad = call["self"], call["grad_output"]
    count = _adaptive_elements(x, grad, _spatial(call)) + grad.numel()
    return _windowed(call, count, (grad.numel(), x.numel()), scatter=True, reads=(grad,))


@prices("aten::max_unpool2d", "aten::max_unpool3d")
def unpool(call: Call) -> Cost:
    return _windowed(call, 0, (call["self"].numel(), 1), scatter=True)


def _taps(name: str) -> int:
    """Input elements that one output element blends."""
    spatial = 3 if "3d" in name else 2 if "2d" in name else 1
    if "nearest" in name:
        return 1
    return (4 if "bicubic" in name else 6 if "lanczos" in name else 2) ** spatial


UPSAMPLES = tuple(
    f"aten::{name}{suffix}"
    for name in (
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
        "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
        "_upsample_lanczos2d_aa",
    )
    for suffix in ("", "_backward")
)  # fmt: skip


@prices(*UPSAMPLES)
def upsample(call: Call) -> Cost:
    """A multiply-add a tap (1 nearest, 2, 4, 8 linear, 16 bicubic) an output element; nearest only copies forward."""
    backward = call.name.endswith("_backward")
    taps = _taps(call.name)
    resampled: Tensor = call["grad_output"] if backward else call.first_output()
    per_element = (1 if backward else 0) if taps == 1 else 2 * taps
    return _windowed(call, per_element * resampled.numel(), (resampled.numel(), taps), scatter=backward)


@prices(
    "aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::grid_sampler_2d_backward",
    "aten::grid_sampler_3d_backward", "aten::cudnn_grid_sampler", "aten::cudnn_grid_sampler_backward",
    "aten::_grid_sampler_2d_cpu_fallback", "aten::_grid_sampler_2d_cpu_fallback_backward",
)  # fmt: skip
def grid_sample(call: Call) -> Cost:
    """Bilinear (or nearest, bicubic) taps at positions that a grid holds, so the gather is random.

    The backward spreads each gradient over the taps and forms the grid's gradient from the same taps.
    """
    grid: Tensor = call["grid"]
    spatial = grid.shape[-1]
    taps = {0: 2**spatial, 1: 1, 2: 4**spatial}[call.get("interpolation_mode") or 0]
    backward = call.name.endswith("backward")
    sampled: Tensor = call["grad_output"] if backward else call.first_output()
    return elementwise_cost(
        2 * taps * sampled.numel() * (2 if backward else 1),
        call.reads,
        call.writes,
        size=(sampled.numel(), taps),
        primitive=Primitive.DYNAMIC,
        access=Access.RANDOM,
        movement=(Movement.SCATTER,) if backward else (Movement.GATHER,),
    ).named("gather")


@prices("aten::im2col", "aten::col2im")
def columns(call: Call) -> Cost:
    """Windows copied out into columns, or columns added back into an image."""
    x, out = call["self"], call.first_output()
    scatter = call.name == "col2im"
    return _windowed(call, x.numel() if scatter else 0, (x.numel(), out.numel()), scatter=scatter)
