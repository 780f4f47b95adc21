"""Rotary positions where only one of the two results carries a gradient."""

from __future__ import annotations

import pytest
import torch

from rooflight.ops.rope import rotary, rotary_table


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_result_alone(used: int) -> None:
    cos, sin = rotary_table(torch.arange(5), torch.rand(4), 1.0)
    inputs = [torch.randn(5, heads, 8, requires_grad=True) for heads in (4, 2)]
    rotary(*inputs, cos, sin, False)[used].square().sum().backward()
    # A rotation keeps lengths, so the gradient of the square is twice the input.
    torch.testing.assert_close(inputs[used].grad, 2 * inputs[used].detach())
    other = inputs[1 - used].grad
    assert other is None or not other.any()
