"""LayerNorm's kernels on a GPU, through their Ops, against fp64 at real shapes; and both norms of very wide rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.layer_norm import add_layer_norm, layer_norm
from rooflight.ops.norm import add_rms_norm
from tests.gpu.test_kernels_elementwise import DTYPES, EPS, draw, kernels_only
from tests.ops.kernels.oracle import assert_close, bits_equal, exact

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]
ROWS = pytest.mark.parametrize(
    ("rows", "width"), [(32768, 768), (16384, 4096), (1001, 8192), (77, 16384), (513, 20000), (130, 32768)]
)


def parameters(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = 1 + draw(width, dtype=dtype, seed=2) / 4, draw(width, dtype=dtype, seed=3)
    return weight.requires_grad_(), bias.requires_grad_()


@DTYPES
@ROWS
def test_layer_norm(rows, width, dtype):
    x, grad = (1 + draw(rows, width, dtype=dtype)).requires_grad_(), draw(rows, width, dtype=dtype, seed=1)
    weight, bias = parameters(width, dtype)
    out = layer_norm(x, weight, bias, EPS)
    inputs = (x.detach(), weight.detach(), bias.detach())
    assert_close(out.detach(), exact("layer_norm", *inputs, EPS), dtype)
    found = torch.autograd.grad(out, (x, weight, bias), grad, retain_graph=True)
    assert_close(found, exact("layer_norm_backward", grad, None, *inputs[:2], EPS), dtype)
    assert bits_equal(found, torch.autograd.grad(out, (x, weight, bias), grad))


@DTYPES
@ROWS
def test_add_and_layer_norm(rows, width, dtype):
    x, residual = (draw(rows, width, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight, bias = parameters(width, dtype)
    grads = draw(rows, width, dtype=dtype, seed=4), draw(rows, width, dtype=dtype, seed=5)
    out, total = add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(total, x + residual)
    inputs = (total.detach(), weight.detach(), bias.detach())
    assert_close(out.detach(), exact("layer_norm", *inputs, EPS), dtype)
    found = torch.autograd.grad((out, total), (x, residual, weight, bias), grads, retain_graph=True)
    grad_x, grad_weight, grad_bias = exact("layer_norm_backward", *grads, *inputs[:2], EPS)
    assert_close(found, (grad_x, grad_x, grad_weight, grad_bias), dtype)
    assert bits_equal(found, torch.autograd.grad((out, total), (x, residual, weight, bias), grads))


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(513, 20000), (130, 32768), (3, 131072)])
def test_wide_rms_norm(rows, width, dtype):
    x, residual = (draw(rows, width, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight, _ = parameters(width, dtype)
    grads = draw(rows, width, dtype=dtype, seed=4), draw(rows, width, dtype=dtype, seed=5)
    out, total = add_rms_norm(x, residual, weight, EPS, 1.0)
    assert torch.equal(total, x + residual)
    inputs = (total.detach(), weight.detach(), EPS, 1.0)
    assert_close(out.detach(), exact("rms_norm", *inputs), dtype)
    found = torch.autograd.grad((out, total), (x, residual, weight), grads, retain_graph=True)
    grad_x, grad_weight = exact("rms_norm_backward", *grads, *inputs)
    assert_close(found, (grad_x, grad_x, grad_weight), dtype)
    assert bits_equal(found, torch.autograd.grad((out, total), (x, residual, weight), grads))


__all__ = ["kernels_only"]
