"""The kernels of the softmax over scores in memory, under the interpreter against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.attention.naive import attention_softmax, softmax_backward
from tests.ops import formulas
from tests.ops.formulas import gradients

from .oracle import assert_close, bits_equal

FP32 = torch.float32
# Causal, window, softcap, sinks.
MASKS = pytest.mark.parametrize(
    "options", [(False, 0, 0.0, False), (True, 0, 0.0, False), (True, 3, 0.0, True), (True, 0, 2.0, True)], ids=str
)
SHAPES = pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 2, 4, 37), (1, 2, 1, 3), (1, 1, 2, 2100)], ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(*values: Any) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


@MASKS
@SHAPES
def test_values_and_gradients(interpret, shape, options):
    causal, window, softcap, with_sinks = options
    scores, grad = 3 * draw(*shape), draw(*shape, seed=1)
    sinks = draw(shape[1], seed=2) if with_sinks else None
    probs = interpret("softmax.attention_softmax", scores, causal, window, softcap, sinks)
    wanted = formulas.attention_softmax(*wide(scores, causal, window, softcap, sinks))
    assert_close(probs, wanted, FP32)
    inputs = (scores, sinks) if sinks is not None else (scores,)
    expected = gradients(
        lambda s, k=None: formulas.attention_softmax(s, causal, window, softcap, k), tuple(wide(*inputs)), grad.double()
    )
    args = (grad, wanted.float(), scores if softcap else None, softcap, with_sinks)
    found = interpret("softmax.attention_softmax_backward", *args)
    assert_close(found[0], expected[0], FP32)
    if with_sinks:
        assert (found[1].double() - expected[1]).abs().max() < 1e-5 * (1 + expected[1].abs().max())
    assert bits_equal(found, interpret("softmax.attention_softmax_backward", *args))


@pytest.mark.parametrize("options", [(True, 0, 0.0, None), (True, 100, 0.0, draw(1)), (False, 0, 5.0, None)], ids=str)
def test_rows_that_registers_do_not_hold(interpret, options):
    scores, grad = draw(1, 1, 2, 16_500), draw(1, 1, 2, 16_500, seed=1)
    probs = interpret("softmax.attention_softmax", scores, *options)
    assert_close(probs, formulas.attention_softmax(*wide(scores, *options)), FP32)
    args = (grad, probs, scores if options[2] else None, options[2], options[3] is not None)
    assert_close(
        interpret("softmax.attention_softmax_backward", *args)[0], softmax_backward.reference(*wide(*args))[0], FP32
    )


def test_large_scores_do_not_overflow_and_hidden_ones_do_not_count(interpret):
    scores = 1e4 * draw(1, 1, 6, 6)
    scores[..., 5] = float("inf")
    probs = interpret("softmax.attention_softmax", scores, True, 0, 0.0, None)
    assert_close(probs[:, :, :5].contiguous(), attention_softmax.reference(scores.double(), True, 0)[:, :, :5], FP32)


def test_what_the_kernels_leave_to_the_reference():
    takes, scores = attention_softmax.kernel_takes, draw(1, 2, 3, 4)
    assert takes is not None and takes(scores, True, 0, 0.0, None) and takes(scores, True, 0, 0.0, draw(2).half())
    assert not takes(scores[:, :, :0], True, 0, 0.0, None) and not takes(scores.double(), True, 0, 0.0, None)
