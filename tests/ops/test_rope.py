"""Rotary positions where only some of the results carry a gradient."""

from __future__ import annotations

import pytest
import torch

from rooflight.ops.rope import rotary, rotary_table
from rooflight.ops.rotary_qkv import rotary_qkv


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_result_alone(used: int) -> None:
    cos, sin = rotary_table(torch.arange(5), torch.rand(4), 1.0)
    inputs = [torch.randn(5, heads, 8, requires_grad=True) for heads in (4, 2)]
    rotary(*inputs, cos, sin, False)[used].square().sum().backward()
    # A rotation keeps lengths, so the gradient of the square is twice the input.
    torch.testing.assert_close(inputs[used].grad, 2 * inputs[used].detach())
    other = inputs[1 - used].grad
    assert other is None or not other.any()


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_through_one_part_of_qkv_alone(used: int) -> None:
    cos, sin = rotary_table(torch.arange(5), torch.rand(4), 1.0)
    qkv_TW = torch.randn(5, (4 + 2 + 2) * 8, requires_grad=True)
    rotary_qkv(qkv_TW, cos, sin, 4, 2)[used].square().sum().backward()
    wanted = torch.zeros(5, 8, 8)
    part = (slice(0, 4), slice(4, 6), slice(6, 8))[used]
    wanted[:, part] = 2 * qkv_TW.detach().unflatten(1, (8, 8))[:, part]
    torch.testing.assert_close(qkv_TW.grad, wanted.flatten(1))


@pytest.mark.parametrize("tokens", [1, 300])
def test_no_part_shares_memory_with_the_projection(tokens: int) -> None:
    cos, sin = rotary_table(torch.arange(tokens), torch.rand(4), 1.0)
    qkv_TW = torch.randn(tokens, (1 + 1 + 1) * 8)
    held = {x.untyped_storage().data_ptr() for x in (qkv_TW, *rotary_qkv(qkv_TW, cos, sin, 1, 1))}
    assert len(held) == 4
