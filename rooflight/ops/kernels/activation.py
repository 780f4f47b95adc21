"""Activation kernels: plain and gated, forward and backward, one pass each.

Legend: T rows  F feed-forward width
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2, rows_of

BLOCK, WARPS = 2048, 4  # 16 elements a thread: two 16-byte loads of bf16 from each operand
CLAMP_LIMIT, CLAMP_ALPHA = tl.constexpr(7.0), tl.constexpr(1.702)


@triton.jit
def _gelu_tanh_gate(x):
    # 0.5·(1 + tanh u) = sigmoid(2u), u = √(2/π)·(x + 0.044715·x³); an exponential that overflows only saturates it.
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def apply(x, KIND: tl.constexpr):
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * _gelu_tanh_gate(x)
    else:
        tl.static_assert(KIND == "relu")
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def _value_and_derivative(x, KIND: tl.constexpr):
    if KIND == "silu":
        s = tl.sigmoid(x)
        y, d = x * s, s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        cumulative = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, d = x * cumulative, cumulative + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)
    elif KIND == "gelu_tanh":
        s = _gelu_tanh_gate(x)
        y, d = x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(KIND == "relu")
        y, d = tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    return y, d


@triton.jit
def _activation_kernel(x_ptr, out_ptr, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    tl.store(out_ptr + at, apply(tl.load(x_ptr + at, mask, 0.0).to(tl.float32), KIND), mask)


@triton.jit
def _activation_backward_kernel(grad_ptr, x_ptr, out_ptr, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    x, grad = tl.load(x_ptr + at, mask, 0.0).to(tl.float32), tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
    _, derivative = _value_and_derivative(x, KIND)
    tl.store(out_ptr + at, grad * derivative, mask)


@triton.jit
def _load_pair(row_ptr, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Gate and up of a block of columns: two halves of a row, or one run of pairs."""
    if INTERLEAVED:
        run = 2 * first + tl.arange(0, 2 * BLOCK)
        gate, up = tl.split(tl.reshape(tl.load(row_ptr + run, run < 2 * WIDTH, 0.0), (BLOCK, 2)))
    else:
        column = first + tl.arange(0, BLOCK)
        gate = tl.load(row_ptr + column, column < WIDTH, 0.0)
        up = tl.load(row_ptr + WIDTH + column, column < WIDTH, 0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _clamp(gate, up):
    # By comparisons that are false for NaN, which so stays NaN.
    gate = tl.where(gate > CLAMP_LIMIT, CLAMP_LIMIT, gate)
    up = tl.where(up > CLAMP_LIMIT, CLAMP_LIMIT, tl.where(up < -CLAMP_LIMIT, -CLAMP_LIMIT, up))
    return gate, up


@triton.jit
def _gated_kernel(
    x_ptr,
    out_ptr,
    stride,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * BLOCK
    column = first + tl.arange(0, BLOCK)
    gate, up = _load_pair(x_ptr + row * stride, first, WIDTH, BLOCK, KIND == "clamped_swiglu")
    if KIND == "clamped_swiglu":
        gate, up = _clamp(gate, up)
        out = (up + 1.0) * gate * tl.sigmoid(gate * CLAMP_ALPHA)
    else:
        out = apply(gate, KIND) * up
    tl.store(out_ptr + row * WIDTH + column, out, column < WIDTH)


@triton.jit
def _gated_backward_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    grad_stride,
    stride,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first = tl.program_id(0) % BLOCKS * BLOCK
    column = first + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + row * grad_stride + column, column < WIDTH, 0.0).to(tl.float32)
    gate, up = _load_pair(x_ptr + row * stride, first, WIDTH, BLOCK, KIND == "clamped_swiglu")
    out_row_ptr = out_ptr + row * (2 * WIDTH)
    if KIND == "clamped_swiglu":
        clamped_gate, clamped_up = _clamp(gate, up)
        s = tl.sigmoid(clamped_gate * CLAMP_ALPHA)
        slope = s + CLAMP_ALPHA * clamped_gate * s * (1.0 - s)
        grad_gate = tl.where(gate > CLAMP_LIMIT, 0.0, grad * (clamped_up + 1.0) * slope)
        grad_up = tl.where(tl.abs(up) > CLAMP_LIMIT, 0.0, grad * clamped_gate * s)
        run = 2 * first + tl.arange(0, 2 * BLOCK)
        tl.store(out_row_ptr + run, tl.reshape(tl.join(grad_gate, grad_up), (2 * BLOCK,)), run < 2 * WIDTH)
    else:
        value, derivative = _value_and_derivative(gate, KIND)
        tl.store(out_row_ptr + column, grad * up * derivative, column < WIDTH)
        tl.store(out_row_ptr + WIDTH + column, grad * value, column < WIDTH)


def _columns(width: int) -> tuple[int, int]:
    """(columns, warps) of a program: the largest block that divides the width, so that no lanes idle; else 1024."""
    for block in (BLOCK, BLOCK // 2, BLOCK // 4):
        if width % block == 0:
            return block, max(1, WARPS * block // BLOCK)
    block = min(BLOCK // 2, power_of_2(width))
    return block, max(1, WARPS * block // BLOCK)


def activation(x_TF: Tensor, kind: str) -> Tensor:
    """f(x) of silu, gelu, gelu_tanh or relu."""
    x, out_TF = x_TF.contiguous(), x_TF.new_empty(x_TF.shape)
    elements = x.numel()
    _activation_kernel[(ceil_div(elements, BLOCK),)](x, out_TF, elements, KIND=kind, BLOCK=BLOCK, num_warps=WARPS)
    return out_TF


def activation_backward(grad_TF: Tensor, x_TF: Tensor, kind: str) -> Tensor:
    """f'(x)·grad."""
    grad, x, out_TF = grad_TF.contiguous(), x_TF.contiguous(), x_TF.new_empty(x_TF.shape)
    elements = x.numel()
    _activation_backward_kernel[(ceil_div(elements, BLOCK),)](
        grad, x, out_TF, elements, KIND=kind, BLOCK=BLOCK, num_warps=WARPS
    )
    return out_TF


def _flat_rows(x: Tensor) -> tuple[Tensor, int, int]:
    x, rows, inner, stride, _ = rows_of(x)
    return (x, rows, stride) if inner == 1 else (x.contiguous(), rows, x.shape[-1])


def gated_activation(gate_up_T2F: Tensor, kind: str) -> Tensor:
    """f(gate)·up over the stacked projection, or gpt-oss's clamped form over the interleaved one."""
    x, rows, stride = _flat_rows(gate_up_T2F)
    width = gate_up_T2F.shape[-1] // 2
    out_TF = gate_up_T2F.new_empty((*gate_up_T2F.shape[:-1], width))
    block, warps = _columns(width)
    blocks = ceil_div(width, block)
    _gated_kernel[(rows * blocks,)](
        x, out_TF, stride, BLOCKS=blocks, WIDTH=width, BLOCK=block, KIND=kind, num_warps=warps
    )
    return out_TF


def gated_activation_backward(grad_TF: Tensor, gate_up_T2F: Tensor, kind: str) -> Tensor:
    """Gradients of gate and up, laid out as they are; the activation is computed again."""
    grad, _, grad_stride = _flat_rows(grad_TF)
    x, rows, stride = _flat_rows(gate_up_T2F)
    width = gate_up_T2F.shape[-1] // 2
    out_T2F = gate_up_T2F.new_empty(gate_up_T2F.shape)
    block, warps = _columns(width)
    blocks = ceil_div(width, block)
    _gated_backward_kernel[(rows * blocks,)](
        grad, x, out_T2F, grad_stride, stride, BLOCKS=blocks, WIDTH=width, BLOCK=block, KIND=kind, num_warps=warps
    )
    return out_T2F
