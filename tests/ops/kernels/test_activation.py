"""Activation kernels under the interpreter against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from rooflight.ops.activation import KINDS

from .oracle import assert_close, exact, takes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
GATED = (*KINDS, "clamped_swiglu")


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    # Wide enough for the clamp at ±7 and for saturated exponentials.
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 700), (1,)], ids=str)
def test_plain(interpret, shape, kind, dtype):
    x, grad = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    assert_close(interpret("activation.activation", x, kind), exact("activation", x, kind), dtype)
    out = interpret("activation.activation_backward", grad, x, kind)
    assert_close(out, exact("activation_backward", grad, x, kind), dtype)


@DTYPES
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 1025), (2, 512), (1, 2048)], ids=str)
def test_gated(interpret, shape, kind, dtype):
    gate_up, grad = draw(*shape[:-1], 2 * shape[-1], dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    out = interpret("activation.gated_activation", gate_up, kind)
    assert_close(out, exact("gated_activation", gate_up, kind), dtype)
    back = interpret("activation.gated_activation_backward", grad, gate_up, kind)
    assert_close(back, exact("gated_activation_backward", grad, gate_up, kind), dtype)


@pytest.mark.parametrize("kind", GATED)
def test_strided(interpret, kind):
    wide = draw(4, 3, 30, dtype=torch.float32)
    gate_up, grad = wide[..., 1:21], wide[..., 20:]
    args = (grad, gate_up, kind)
    out = interpret("activation.gated_activation_backward", *args)
    assert_close(out, exact("gated_activation_backward", *args), torch.float32)
    turned = wide.transpose(0, 1)
    assert_close(
        interpret("activation.gated_activation", turned, kind), exact("gated_activation", turned, kind), torch.float32
    )


def _stacked(kind: str, gate: torch.Tensor) -> torch.Tensor:
    up = torch.ones_like(gate)
    return (torch.stack((gate, up), -1).flatten() if kind == "clamped_swiglu" else torch.cat((gate, up)))[None]


@pytest.mark.parametrize("kind", GATED)
def test_exponentials_that_overflow_saturate(interpret, kind):
    gate_up, grad = _stacked(kind, torch.tensor([-300.0, -100.0, 100.0, 300.0, 0.0])), torch.ones(1, 5)
    out = interpret("activation.gated_activation", gate_up, kind)
    assert_close(out, exact("gated_activation", gate_up, kind), torch.float32)
    back = interpret("activation.gated_activation_backward", grad, gate_up, kind)
    assert_close(back, exact("gated_activation_backward", grad, gate_up, kind), torch.float32)


@pytest.mark.parametrize("kind", GATED)
def test_nan_stays_nan(interpret, kind):
    gate_up, grad = _stacked(kind, torch.tensor([1.0, float("nan"), 9.0])), torch.ones(1, 3)
    out = interpret("activation.gated_activation", gate_up, kind)
    assert out.isnan().tolist() == [[False, True, False]]
    back = interpret("activation.gated_activation_backward", grad, gate_up, kind)
    grad_up = back[0, 1::2] if kind == "clamped_swiglu" else back[0, 3:]
    assert grad_up.isnan().tolist() == [False, True, False]


def test_what_the_kernels_leave_to_the_reference():
    x = torch.empty(2, 8)
    assert takes("activation", x, "gelu") and takes("activation_backward", x, x, "gelu")
    assert takes("gated_activation", x, "silu") and takes("gated_activation", x, "clamped_swiglu")
    assert takes("gated_activation_backward", x[:, :4], x, "silu")
    assert not takes("gated_activation", x, "tanh") and not takes("activation", x, "clamped_swiglu")
    assert not takes("gated_activation", x.double(), "silu") and not takes("gated_activation", x[:, :5], "silu")
