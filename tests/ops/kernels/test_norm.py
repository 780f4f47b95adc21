"""RMSNorm kernels under the interpreter against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from .oracle import assert_close, bits_equal, exact, takes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# One row a program and several, fewer rows than a program takes, more than all programs of the backward take at once.
SHAPES = pytest.mark.parametrize("shape", [(5, 1025), (5, 7), (2, 3, 64), (70, 96), (1, 2)], ids=str)
EPS = 1e-5


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@DTYPES
@SHAPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_forward(interpret, shape, dtype, offset):
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    out = interpret("norm.rms_norm", x, weight, EPS, offset)
    assert out.dtype == dtype
    assert_close(out, exact("rms_norm", x, weight, EPS, offset), dtype)


@DTYPES
@SHAPES
def test_forward_with_residual(interpret, shape, dtype):
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2)
    weight = draw(shape[-1], dtype=torch.float32, seed=1)
    out, total = interpret("norm.add_rms_norm", x, residual, weight, EPS)
    assert_close(total, x.double() + residual.double(), dtype)
    # Normalised is the sum as it was rounded.
    assert_close(out, exact("rms_norm", total, weight, EPS, 0.0), dtype)


@DTYPES
@SHAPES
@pytest.mark.parametrize("with_residual", [True, False])
def test_backward(interpret, shape, dtype, with_residual):
    grad, x, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=dtype, seed=2)
    residual = draw(*shape, dtype=dtype, seed=3) if with_residual else None
    args = (grad, residual, x, weight, EPS, 1.0)
    out = interpret("norm.rms_norm_backward", *args)
    assert_close(out, exact("rms_norm_backward", *args), dtype)
    assert bits_equal(out, interpret("norm.rms_norm_backward", *args))


def test_rows_that_are_slices_of_a_wider_tensor(interpret):
    qkv = draw(9, 6 * 32 + 5, dtype=torch.float32)
    weight = draw(32, dtype=torch.float32)
    for x in (
        qkv[:, 32:96],
        qkv[:, 64:192].unflatten(-1, (4, 32)),
        qkv.t()[:32].t(),
        qkv[::2, 3:35].unflatten(0, (5, 1)),
    ):
        x_weight = weight.repeat(2)[: x.shape[-1]]
        assert_close(
            interpret("norm.rms_norm", x, x_weight, EPS), exact("rms_norm", x, x_weight, EPS, 0.0), torch.float32
        )
        args = (x.flip(0), x.flip(0) * 2, x, x_weight, EPS, 0.0)
        assert_close(interpret("norm.rms_norm_backward", *args), exact("rms_norm_backward", *args), torch.float32)


def test_the_residual_and_the_gradient_may_be_strided(interpret):
    wide, weight = draw(2, 7, 40, dtype=torch.float32), draw(16, dtype=torch.float32)
    x, y = wide[..., :16], wide[..., 20:36]
    assert_close(interpret("norm.add_rms_norm", x, y, weight, EPS)[1], x.double() + y.double(), torch.float32)
    args = (y, y, x, weight, EPS, 0.0)
    assert_close(interpret("norm.rms_norm_backward", *args), exact("rms_norm_backward", *args), torch.float32)
    ones = torch.ones(()).expand(2, 7, 16)
    args = (ones, None, x, weight, EPS, 0.0)
    assert_close(interpret("norm.rms_norm_backward", *args), exact("rms_norm_backward", *args), torch.float32)


def test_rows_beyond_the_last_count_for_nothing_without_eps(interpret):
    grad, x = draw(3, 8, dtype=torch.float32), draw(3, 8, dtype=torch.float32, seed=1)
    args = (grad, None, x, torch.ones(8), 0.0, 0.0)
    assert_close(interpret("norm.rms_norm_backward", *args), exact("rms_norm_backward", *args), torch.float32)


def test_what_the_kernels_leave_to_the_reference():
    x, weight = torch.empty(2, 16384), torch.empty(16384)
    assert takes("rms_norm", x, weight, EPS)
    assert takes("rms_norm", torch.empty(2, 16385), torch.empty(16385), EPS)
    assert not takes("rms_norm", x.double(), weight.double(), EPS)
    assert not takes("rms_norm", x[:0], weight, EPS)
    assert takes("add_rms_norm", x, x, weight, EPS, 1.0)
    assert not takes("add_rms_norm", x, x.bfloat16(), weight, EPS, 1.0)
    assert not takes("add_rms_norm", x, x[:1], weight, EPS, 1.0)
    assert takes("rms_norm_backward", x, None, x, weight, EPS, 0.0)
    assert not takes("rms_norm_backward", x.bfloat16(), None, x, weight, EPS, 0.0)
