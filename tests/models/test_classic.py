"""The classic patterns: what they compute, what they weigh, and that their factories price."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rooflight.errors import InvalidValue
from rooflight.models import classic
from rooflight.ops.cost import Primitive
from tests.priced import price_module

FACTORIES = [classic.mlp, classic.cnn, classic.rnn, classic.lstm, classic.gru, classic.attention]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_factories_run_and_price(factory: Callable[[], classic.Example]) -> None:
    module, inputs = factory()
    assert torch.isfinite(module(*inputs)).all()
    assert price_module(module, *inputs, backward=True).flops() > price_module(module, *inputs).flops() > 0


def test_attention_equals_the_sums_written_out() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 8).unbind()
    expected = torch.zeros(2, 5, 8)
    for b, h in itertools.product(range(2), range(2)):
        part = slice(4 * h, 4 * h + 4)
        for i in range(5):
            weights = torch.stack([q[b, i, part].dot(k[b, j, part]) / 2 for j in range(5)]).softmax(0)
            expected[b, i, part] = (weights[:, None] * v[b, :, part]).sum(0)
    torch.testing.assert_close(classic.AttentionLayer(8, 2)(q, k, v), expected)


def test_a_mlp_is_linear_layers_with_relu_between() -> None:
    model = classic.MLP((3, 4, 2))
    x = torch.randn(5, 3)
    first, second = (p.detach() for p in model.parameters())
    torch.testing.assert_close(model(x), (x @ first.T).clamp(min=0) @ second.T)


def test_a_cnn_keeps_the_size_of_the_image() -> None:
    assert classic.CNN((3, 8, 4), kernel=5)(torch.randn(2, 3, 9, 7)).shape == (2, 4, 9, 7)


def test_a_recurrent_layer_carries_its_state() -> None:
    model = classic.Recurrent("rnn", 3, 4)
    x = torch.randn(5, 2, 3)
    w_in, w_state = (p.detach() for p in model.parameters())
    state = torch.zeros(2, 4)
    for step, state_then in zip(x, model(x), strict=True):
        state = torch.tanh(step @ w_in.T + state @ w_state.T)
        torch.testing.assert_close(state_then, state)


@pytest.mark.parametrize(("kind", "gates"), [("rnn", 1), ("lstm", 4), ("gru", 3)])
def test_recurrent_multiply_adds_are_weights_times_steps(kind: str, gates: int) -> None:
    model = classic.Recurrent(kind, 12, 16).to(torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters())
    assert weights == gates * 16 * (12 + 16)
    record = price_module(model, torch.empty(5, 2, 12, dtype=torch.bfloat16))
    assert record.flops("bf16") == 2 * 5 * 2 * weights


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: classic.MLP((784,)), "(784,)"),
        (lambda: classic.CNN((1, 32), kernel=4), "odd"),
        (lambda: classic.CNN((0, 32)), "(0, 32)"),
        (lambda: classic.Recurrent("tree", 3, 4), "rnn, lstm, gru"),
        (lambda: classic.AttentionLayer(10, 3), "3 heads do not divide the width 10"),
    ],
)
def test_bad_sizes_are_named(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(InvalidValue) as error:
        make()
    assert text in str(error.value)


def test_the_patterns_show_as_what_they_are() -> None:
    for factory, primitive in ((classic.mlp, Primitive.MATMUL), (classic.cnn, Primitive.SLIDING_WINDOW)):
        module, inputs = factory()
        costs = [c for _, c in price_module(module, *inputs).calls]
        assert max(costs, key=lambda c: c.total_flops).primitive is primitive
