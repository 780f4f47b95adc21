"""Linear layers whose three products run in fp8, for training: y = x·Wᵀ + b and both of its gradients.

Each tensor has one scale, found anew in every call: scale = max|x| / largest, x8 = fp8(x · (1 / scale)). A product is
(a8·b8ᵀ)·(scale_a·scale_b), added up in fp32: x8·W8ᵀ, grad8·W8 and grad8ᵀ·x8, each over operands that are contiguous
along what they sum over, which is why casts also come transposed. Inputs and weights are E4M3, gradients E5M2
(2209.05433). One scale a tensor and not one a row: the weight's gradient sums over rows, where a row's scale cannot be
taken out.
Legend: T tokens (any leading dimensions)  N output width  K input width  M, L rows of a product's operands  P shares
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Access, Cost, Movement, Primitive, elementwise_cost, matmul_cost, precision_of
from rooflight.ops.linear import bias_grad
from rooflight.ops.op import Op, lazy, rows_and_columns

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# A tensor of zeros has a scale too, and one whose reciprocal is finite.
LEAST_AMAX = 2.0**-100
SHARES = 512  # of a tensor whose largest magnitudes are found apart: enough programs to fill a GPU
MULTIPLE = 16  # of every size that a product sums over or lays out: 16 bytes
_KERNELS = "rooflight.ops.kernels.fp8"
_FIRST_CAPABILITY = (8, 9)


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


_HALF = (torch.bfloat16, torch.float16)


def _casts(x_TK: Tensor, *rest: Any) -> bool:
    # Of fp32, some elements came out one fp8 number off on an H200, cause not found; training casts no fp32.
    return x_TK.dtype in _HALF and x_TK.numel() > 0 and _has_fp8(x_TK.device)


def _amax(x_TK: Tensor) -> Tensor:
    # What the shares are is the kernel's affair: only their largest counts.
    amax_P = x_TK.new_zeros((SHARES,), dtype=torch.float32)
    amax_P[0] = x_TK.abs().amax()
    return amax_P


def _amax_shape(x_TK: Tensor) -> Tensor:
    return x_TK.new_empty((SHARES,), dtype=torch.float32)


def _amax_cost(amax_P: Tensor, x_TK: Tensor) -> Cost:
    # Magnitude and comparison.
    cost = elementwise_cost(
        2 * x_TK.numel(),
        (x_TK,),
        (amax_P,),
        size=rows_and_columns(x_TK),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION,),
    )
    return replace(cost, precision=precision_of(x_TK))


fp8_amax = Op("fp8_amax", _amax, cost=_amax_cost, shape=_amax_shape, kernel=lazy(_KERNELS, "amax"), kernel_takes=_casts)


def _scaled(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Clamping keeps a NaN.
    scale = amax_P.amax().clamp(min=LEAST_AMAX) / LARGEST[dtype]
    return (x_TK.float() * scale.reciprocal()).to(dtype), scale


def _quantize(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _scaled(x_TK.contiguous(), amax_P, dtype)


def _quantize_transposed(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x8_TK, scale = _scaled(x_TK, amax_P, dtype)
    return x8_TK.t().contiguous(), scale


def _quantize_both(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x8_TK, scale = _quantize(x_TK, amax_P, dtype)
    return x8_TK, x8_TK.t().contiguous(), scale


def _rows_shape(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x_TK.new_empty(x_TK.shape, dtype=dtype), amax_P.new_empty(())


def _transposed_shape(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x_TK.new_empty((x_TK.shape[1], x_TK.shape[0]), dtype=dtype), amax_P.new_empty(())


def _both_shape(x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x8_KT, scale = _transposed_shape(x_TK, amax_P, dtype)
    return x_TK.new_empty(x_TK.shape, dtype=dtype), x8_KT, scale


def _cast_cost(access: Access) -> Any:
    def cost(out: tuple[Tensor, ...], x_TK: Tensor, amax_P: Tensor, dtype: torch.dtype) -> Cost:
        # One multiplication an element; the largest of the shares, its floor, the scale and the scale's reciprocal.
        flops = x_TK.numel() + amax_P.numel() + 3
        size = rows_and_columns(x_TK)
        moves = (Movement.REDUCTION, Movement.BROADCAST)
        found = elementwise_cost(flops, (x_TK, amax_P), out, size=size, access=access, movement=moves)
        return replace(found, precision=precision_of(x_TK))

    return cost


fp8_quantize = Op(
    "fp8_quantize",
    _quantize,
    cost=_cast_cost(Access.SEQUENTIAL),
    shape=_rows_shape,
    kernel=lazy(_KERNELS, "quantize"),
    kernel_takes=_casts,
)
fp8_quantize_transposed = Op(
    "fp8_quantize_transposed",
    _quantize_transposed,
    cost=_cast_cost(Access.STRIDED),
    shape=_transposed_shape,
    kernel=lazy(_KERNELS, "quantize_transposed"),
    kernel_takes=_casts,
)
fp8_quantize_both = Op(
    "fp8_quantize_both",
    _quantize_both,
    cost=_cast_cost(Access.STRIDED),
    shape=_both_shape,
    kernel=lazy(_KERNELS, "quantize_both"),
    kernel_takes=_casts,
)


def _linear(
    a8_MK: Tensor, b8_LK: Tensor, scale_a: Tensor, scale_b: Tensor, bias_L: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out_ML = (a8_MK.float() @ b8_LK.float().t()) * (scale_a * scale_b)
    return (out_ML if bias_L is None else out_ML + bias_L.float()).to(dtype)


def _gradient(a8_MK: Tensor, b8_LK: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return _linear(a8_MK, b8_LK, scale_a, scale_b, None, dtype)


def _linear_kernel(a8_MK: Tensor, b8_LK: Tensor, *rest: Any) -> Tensor:
    scale_a, scale_b, bias_L, dtype = rest
    # Fast: runs of products meet in fewer bits before they reach the fp32 sum, which gradients cannot afford.
    return torch.ops.aten._scaled_mm(
        a8_MK, b8_LK.t(), scale_a, scale_b, bias_L, None, out_dtype=dtype, use_fast_accum=True
    )


def _gradient_kernel(a8_MK: Tensor, b8_LK: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.aten._scaled_mm(a8_MK, b8_LK.t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=False)


def _multiplies(a8_MK: Tensor, b8_LK: Tensor, *rest: Any) -> bool:
    bias_L, dtype = rest[2] if len(rest) == 4 else None, rest[-1]
    # Rows of the left operand alone may be any number.
    fit = all(size and size % MULTIPLE == 0 for size in (a8_MK.shape[1], *b8_LK.shape)) and a8_MK.shape[0] > 0
    types = dtype in (torch.bfloat16, torch.float16) and (bias_L is None or bias_L.dtype == dtype)
    return fit and types and a8_MK.is_contiguous() and b8_LK.is_contiguous() and _has_fp8(a8_MK.device)


def _product_shape(a8_MK: Tensor, b8_LK: Tensor, *rest: Any) -> Tensor:
    return a8_MK.new_empty((a8_MK.shape[0], b8_LK.shape[0]), dtype=rest[-1])


def _product_cost(out_ML: Tensor, a8_MK: Tensor, b8_LK: Tensor, scale_a: Tensor, scale_b: Tensor, *rest: Any) -> Cost:
    (m, k), n = a8_MK.shape, b8_LK.shape[0]
    bias_L = rest[0] if len(rest) == 2 else None
    cost = matmul_cost(
        m,
        n,
        k,
        precision=precision_of(a8_MK),
        reads=(a8_MK, b8_LK, scale_a, scale_b, bias_L),
        writes=(out_ML,),
        # The scales' product, and every element times that; the bias.
        epilogue_flops=1 + m * n * (1 if bias_L is None else 2),
    )
    # All three run as one kernel over operands that lie alike, as a plain linear's do.
    return cost.named("linear")


scaled_linear = Op(
    "fp8_linear",
    _linear,
    cost=_product_cost,
    shape=_product_shape,
    kernel=_linear_kernel,
    kernel_takes=_multiplies,
)
fp8_linear_input_grad, fp8_linear_weight_grad = (
    Op(
        name,
        _gradient,
        cost=_product_cost,
        shape=_product_shape,
        kernel=_gradient_kernel,
        kernel_takes=_multiplies,
    )
    for name in ("fp8_linear_input_grad", "fp8_linear_weight_grad")
)


class _Fp8Linear(torch.autograd.Function):
    """The layer as a chain of Ops, so that casts and products each have their own row and price."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, keep_input: bool, keep_weight: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.x_dtype, ctx.weight_dtype = x_TK.dtype, weight_NK.dtype
        x_amax_P, weight_amax_P = fp8_amax(x_TK), fp8_amax(weight_NK)
        x8_KT = None
        if keep_input:
            x8_TK, x8_KT, x_scale = fp8_quantize_both(x_TK, x_amax_P, E4M3)
        else:
            x8_TK, x_scale = fp8_quantize(x_TK, x_amax_P, E4M3)
        weight8_NK, weight_scale = fp8_quantize(weight_NK, weight_amax_P, E4M3)
        # The weight stands anyway: casting it again costs three bytes moved an element, keeping it one byte held.
        ctx.save_for_backward(
            x8_KT, x_scale if keep_input else None, *((weight_NK, weight_amax_P) if keep_weight else (None, None))
        )
        return scaled_linear(x8_TK, weight8_NK, x_scale, weight_scale, bias_N, x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad_TN,) = grads
        if grad_TN is None:
            return None, None, None, None, None
        x8_KT, x_scale, weight_NK, weight_amax_P = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad8_TN = grad8_NT = grad_scale = None
        if need_x or need_weight:
            amax_P = fp8_amax(grad_TN)
            if need_weight:
                grad8_TN, grad8_NT, grad_scale = fp8_quantize_both(grad_TN, amax_P, E5M2)
            else:
                grad8_TN, grad_scale = fp8_quantize(grad_TN, amax_P, E5M2)
        if need_x:
            weight8_KN, scale = fp8_quantize_transposed(weight_NK, weight_amax_P, E4M3)
            grad_x = fp8_linear_input_grad(grad8_TN, weight8_KN, grad_scale, scale, ctx.x_dtype)
            del weight8_KN
        del grad8_TN
        if need_weight:
            grad_weight = fp8_linear_weight_grad(grad8_NT, x8_KT, grad_scale, x_scale, ctx.weight_dtype)
        return grad_x, grad_weight, bias_grad(grad_TN) if need_bias else None, None, None


def fits_fp8(x_TK: Tensor, weight_NK: Tensor) -> bool:
    """Whether all three products can run in fp8: every size a multiple of 16; sizes that are symbols count as such."""
    tokens, width = rows_and_columns(x_TK)
    sizes = (tokens, width, weight_NK.shape[0])
    return all(not isinstance(size, int) or (size > 0 and size % MULTIPLE == 0) for size in sizes)


def fp8_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + b of x [..., K], W [N, K], b [N] with all products in fp8, in x's own dtype; see `fits_fp8`.

    The backward keeps xᵀ in fp8, one byte an element. On a GPU without fp8, and on a CPU, the same is emulated.
    """
    learns = torch.is_grad_enabled()
    rows_TK = x_TK.flatten(0, -2)
    out_TN = _Fp8Linear.apply(
        rows_TK, weight_NK, bias_N, learns and weight_NK.requires_grad, learns and x_TK.requires_grad
    )
    return out_TN.view(*x_TK.shape[:-1], weight_NK.shape[0])  # pyright: ignore[reportOptionalMemberAccess]
