"""Casts to fp8 under the interpreter, on numbers that fp8 has, and what they compile to for an H100 or H200.

The interpreter loses carries where a GPU rounds: how kernels round is seen in what they compile to, and on a GPU.
"""

from __future__ import annotations

import re

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.fp8_linear import E4M3, E5M2, LARGEST, LEAST_AMAX, SHARES, fp8_linear_weight_grad, scaled_linear
from rooflight.ops.fp8_linear import fp8_quantize as quantize_op
from rooflight.ops.kernels import fp8

from . import test_ahead_of_time as ahead

COMPILES = (fp8._amax_kernel, fp8._quantize_kernel)
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
# Smaller and larger than a tile, and no multiple of one.
SHAPES = pytest.mark.parametrize("shape", [(16, 16), (5, 7), (64, 128), (80, 272), (200, 130)], ids=str)


def representable(shape: tuple[int, int], dtype: torch.dtype, scale: float = 0.25) -> tuple[Tensor, Tensor]:
    """(numbers of the format times `scale`, those numbers), the format's largest among them."""
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8).view(dtype)
    numbers = codes.float()
    # Without subnormals, of which the interpreter loses bits.
    normal = numbers.isfinite() & (numbers.abs() >= torch.finfo(dtype).smallest_normal)
    numbers = torch.where(normal, numbers, 0.0)
    numbers[-1, -1] = -LARGEST[dtype]
    return (numbers * scale).to(torch.float32), numbers


@FORMATS
@SHAPES
def test_casts(interpret, shape, dtype):
    x, numbers = representable(shape, dtype)
    amax = interpret("fp8.amax", x)
    assert amax.shape == (SHARES,) and amax.max() == x.abs().max()
    by_rows, scale = interpret("fp8.quantize", x, amax, dtype)
    turned, _ = interpret("fp8.quantize_transposed", x, amax, dtype)
    both = interpret("fp8.quantize_both", x, amax, dtype)
    assert scale == 0.25 and both[2] == 0.25
    assert by_rows.dtype == turned.dtype == dtype
    assert torch.equal(by_rows.float(), numbers) and torch.equal(both[0].float(), numbers)
    assert torch.equal(turned.float(), numbers.t()) and torch.equal(both[1].float(), numbers.t())
    assert turned.is_contiguous() and both[1].is_contiguous()


@pytest.mark.parametrize("place", [(0, 0), (7, 3), (299, 9999)])
def test_the_largest_magnitude_of_more_than_one_round(interpret, place):
    x = torch.randn(300, 10000, generator=torch.Generator().manual_seed(2)).clamp_(-3, 3).to(torch.bfloat16)
    assert x.numel() > SHARES * fp8.AMAX_BLOCK
    x[place] = -5.0
    amax = interpret("fp8.amax", x)
    assert amax.max() == 5.0 and (amax == 5.0).sum() == 1 and amax.min() > 1.0


def test_of_a_tensor_that_is_not_contiguous(interpret):
    x, numbers = representable((48, 32), E4M3)
    wide = torch.full((48, 96), 1e9)
    wide[:, 32:64] = x
    for view, wanted in ((wide[:, 32:64], numbers), (x.t().contiguous().t(), numbers)):
        amax = interpret("fp8.amax", view)
        assert torch.equal(interpret("fp8.quantize_both", view, amax, E4M3)[0].float(), wanted)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_the_scale_of_what_is_not_finite_is_not(interpret, value):
    x = torch.ones(32, 48)
    x[9, 4] = value
    amax = interpret("fp8.amax", x)
    assert not amax.max().isfinite()
    scale = interpret("fp8.quantize", x, amax, E4M3)[1]
    assert scale.isnan() if value != value else scale == float("inf")


def test_zeros_have_a_scale(interpret):
    x = torch.zeros(32, 48)
    x8, scale = interpret("fp8.quantize", x, interpret("fp8.amax", x), E5M2)
    assert not x8.float().any() and scale == LEAST_AMAX / 57344


@FORMATS
@pytest.mark.parametrize("shape", [(16384, 4096), (28672, 4096), (2048, 3072), (1008, 48)], ids=str)
def test_compiles_for_hopper(shape, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(ahead, "POINTERS", ahead.POINTERS | {E4M3: "*fp8e4nv", E5M2: "*fp8e5"})
    assembly: list[str] = []
    found: list[ahead.Compiled] = []
    compile_source = triton.compile

    def keep(*args, **options):
        compiled = compile_source(*args, **options)
        assembly.append(compiled.asm["ptx"])
        return compiled

    def run(self, *args, grid, warmup, **options):
        found.append(ahead.compile_launch(self, args, options, tmp_path))

    monkeypatch.setattr(triton, "compile", keep)
    monkeypatch.setattr(JITFunction, "run", run)
    x, amax = ahead.meta(*shape), ahead.meta(SHARES, dtype=torch.float32)
    fp8.amax(x)
    for cast in (fp8.quantize, fp8.quantize_transposed, fp8.quantize_both):
        cast(x, amax, dtype)
    assert len(found) == 4
    for kernel in found:
        assert kernel.stack == 0, f"{kernel} spills"
        assert kernel.resident_threads >= 512
        assert kernel.resident_shared <= ahead.SHARED_OF_A_MULTIPROCESSOR
        assert kernel.wide_loads > 0
        assert kernel.wide_stores > 0 or kernel is found[0]
    name = "e4m3x2" if dtype == E4M3 else "e5m2x2"
    for ptx in assembly[1:]:
        # To nearest, and by division as exact as the reference's.
        assert f"cvt.rn.satfinite.{name}.f32" in ptx and "div.rn.f32" in ptx
        assert not re.search(r"div\.(full|approx)", ptx)


def test_what_the_kernels_leave_to_the_reference(monkeypatch):
    from rooflight.ops import fp8_linear

    monkeypatch.setattr(fp8_linear, "_has_fp8", lambda device: True)
    one, x = torch.ones(()), torch.ones(64, 32)

    def multiplies(operation, a: Tensor, b: Tensor, *rest) -> bool:
        return operation.kernel_takes(a, b, one, one, *rest)

    a, b = torch.ones(48, 32).to(E4M3), torch.ones(64, 32).to(E4M3)
    bf16 = torch.bfloat16
    assert multiplies(scaled_linear, a, b, None, bf16) and multiplies(fp8_linear_weight_grad, a, b, bf16)
    assert multiplies(scaled_linear, a[:5], b, x[:, 0].to(bf16), bf16)
    assert not multiplies(scaled_linear, a, b, x[:, 0], bf16)
    assert not multiplies(scaled_linear, a, b, None, torch.float32)
    assert not multiplies(scaled_linear, a, b[:8], None, bf16)
    assert not multiplies(fp8_linear_weight_grad, a[:, :24].contiguous(), b[:, :24].contiguous(), bf16)
    assert not multiplies(fp8_linear_weight_grad, a.t(), b.t(), bf16)
    assert quantize_op.kernel_takes is not None
    half = x.to(bf16)
    assert quantize_op.kernel_takes(half, x, E4M3) and not quantize_op.kernel_takes(x, x, E4M3)
    monkeypatch.setattr(fp8_linear, "_has_fp8", lambda device: False)
    assert not multiplies(scaled_linear, a, b, None, bf16) and not quantize_op.kernel_takes(x, x, E4M3)
