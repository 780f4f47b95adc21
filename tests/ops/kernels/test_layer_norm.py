"""LayerNorm kernels, and both norms of rows wider than registers hold, under the interpreter against fp64."""

from __future__ import annotations

import pytest
import torch

from .oracle import assert_close, bits_equal, exact, takes
from .test_norm import DTYPES, EPS, draw

# One row a program and several, fewer rows than a program takes, more than all programs of the backward take at once.
SHAPES = pytest.mark.parametrize("shape", [(5, 1025), (5, 7), (2, 3, 64), (70, 96), (1, 5)], ids=str)
# Over 16,384 columns: a last chunk that is not full, and one that is.
WIDE = pytest.mark.parametrize("width", [20_000, 32_768])


@DTYPES
@SHAPES
def test_forward(interpret, shape, dtype):
    x, weight, bias = (draw(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape[-1:], shape[-1:])))
    out = interpret("layer_norm.layer_norm", x, weight, bias, EPS)
    assert out.dtype == dtype
    assert_close(out, exact("layer_norm", x, weight, bias, EPS), dtype)


@DTYPES
@SHAPES
def test_forward_with_residual(interpret, shape, dtype):
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2)
    weight, bias = (draw(shape[-1], dtype=torch.float32, seed=i) for i in (1, 3))
    out, total = interpret("layer_norm.add_layer_norm", x, residual, weight, bias, EPS)
    assert_close(total, x.double() + residual.double(), dtype)
    # Normalised is the sum as it was rounded.
    assert_close(out, exact("layer_norm", total, weight, bias, EPS), dtype)


@DTYPES
@SHAPES
@pytest.mark.parametrize("with_residual", [True, False])
def test_backward(interpret, shape, dtype, with_residual):
    grad, x, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=dtype, seed=2)
    args = (grad, draw(*shape, dtype=dtype, seed=3) if with_residual else None, x, weight, EPS)
    out = interpret("layer_norm.layer_norm_backward", *args)
    assert_close(out, exact("layer_norm_backward", *args), dtype)
    assert bits_equal(out, interpret("layer_norm.layer_norm_backward", *args))


@WIDE
@pytest.mark.parametrize("with_residual", [True, False])
def test_wide_rows(interpret, width, with_residual):
    """Rows far from zero: a variance by Σx² − (Σx)²/W would lose half of its digits."""
    x, grad = 100 + draw(3, width, dtype=torch.float32), draw(3, width, dtype=torch.float32, seed=1)
    weight, bias = (draw(width, dtype=torch.float32, seed=i) for i in (2, 3))
    residual = draw(3, width, dtype=torch.float32, seed=4) if with_residual else None
    if residual is None:
        out = interpret("layer_norm.layer_norm", x, weight, bias, EPS)
        rms = interpret("norm.rms_norm", x, weight, EPS, 1.0)
        total = x
    else:
        out, total = interpret("layer_norm.add_layer_norm", x, residual, weight, bias, EPS)
        rms, rms_total = interpret("norm.add_rms_norm", x, residual, weight, EPS, 1.0)
        assert_close((total, rms_total), (x.double() + residual.double(),) * 2, torch.float32)
    # What fp32 itself makes of numbers about 100: 24 bits less 7.
    assert (out.double() - exact("layer_norm", total, weight, bias, EPS)).abs().max() < 1e-4
    assert_close(rms, exact("rms_norm", total, weight, EPS, 1.0), torch.float32)
    x = x - 100
    args = (grad, residual, x, weight, EPS)
    found = interpret("layer_norm.layer_norm_backward", *args)
    assert_close(found, exact("layer_norm_backward", *args), torch.float32)
    assert bits_equal(found, interpret("layer_norm.layer_norm_backward", *args))
    args = (*args, 1.0)
    assert_close(interpret("norm.rms_norm_backward", *args), exact("rms_norm_backward", *args), torch.float32)


def test_a_backward_too_wide_for_registers_alone(interpret):
    """Between the widths where the backward and the forward take two passes."""
    grad, x, weight = (draw(*s, dtype=torch.float32, seed=i) for i, s in enumerate(((9, 9000), (9, 9000), (9000,))))
    args = (grad, None, x, weight, EPS)
    assert_close(interpret("layer_norm.layer_norm_backward", *args), exact("layer_norm_backward", *args), torch.float32)


@pytest.mark.parametrize("width", [32, 16_400])
def test_rows_that_are_slices_of_a_wider_tensor(interpret, width):
    wide, weight, bias = (draw(*s, dtype=torch.float32, seed=9) for s in ((2, 5, 2 * width + 9), (width,), (width,)))
    x, y = wide[..., 3 : width + 3], wide[..., width + 4 : 2 * width + 4]
    found = interpret("layer_norm.add_layer_norm", x, y, weight, bias, EPS)
    assert_close(found, exact("add_layer_norm", x, y, weight, bias, EPS), torch.float32)
    args = (torch.ones(()).expand(2, 5, width), y, x, weight, EPS)
    assert_close(interpret("layer_norm.layer_norm_backward", *args), exact("layer_norm_backward", *args), torch.float32)


@pytest.mark.parametrize("width", [8, 9000])
def test_rows_beyond_the_last_count_for_nothing_without_eps(interpret, width):
    grad, x = draw(3, width, dtype=torch.float32), draw(3, width, dtype=torch.float32, seed=1)
    args = (grad, None, x, torch.ones(width), 0.0)
    assert_close(interpret("layer_norm.layer_norm_backward", *args), exact("layer_norm_backward", *args), torch.float32)


def test_what_the_kernels_leave_to_the_reference():
    x, weight = torch.empty(2, 48), torch.empty(48)
    assert takes("layer_norm", x, weight, weight, EPS)
    assert not takes("layer_norm", x.double(), weight, weight, EPS)
    assert not takes("layer_norm", x, weight, weight.double(), EPS)
    assert not takes("layer_norm", x[:0], weight, weight, EPS)
    assert takes("add_layer_norm", x, x, weight, weight.bfloat16(), EPS)
    assert not takes("add_layer_norm", x, x[:1], weight, weight, EPS)
    assert takes("layer_norm_backward", x, None, x, weight, EPS)
    assert not takes("layer_norm_backward", x, x.half(), x, weight, EPS)
