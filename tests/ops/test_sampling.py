"""Sampling: its limits, and the distribution that it draws from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.sampling import greedy, sample

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def draw(
    logits_V: Tensor, uniform_B: Tensor, temperature: float = 1.0, k: int = 0, p: float = 1.0, m: float = 0.0
) -> Tensor:
    rows = uniform_B.shape[0]
    each = [torch.full((rows,), value) for value in (temperature, k, p, m)]
    return sample(logits_V.expand(rows, -1), *each, uniform_B)


LOGITS_V = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def test_evenly_spaced_uniforms_reproduce_the_probabilities() -> None:
    uniform_B = (torch.arange(20000) + 0.5) / 20000
    for temperature in (0.5, 1.0, 3.0):
        found = torch.bincount(draw(LOGITS_V, uniform_B, temperature), minlength=5) / 20000
        torch.testing.assert_close(found, (LOGITS_V / temperature).softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"k": 2}, {1, 3}),
        ({"k": 1}, {1}),
        ({"p": 0.0}, {1}),
        ({"m": 1.0}, {1}),
        ({"m": 0.2}, {1, 3, 0}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_the_most_likely(filters: dict[str, float], kept: set[int]) -> None:
    uniform_B = (torch.arange(2000) + 0.5) / 2000
    assert set(draw(LOGITS_V, uniform_B, **filters).tolist()) == kept  # pyright: ignore[reportArgumentType]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform_B = (torch.arange(2000) + 0.5) / 2000
    assert set(draw(probabilities.log(), uniform_B, p=0.75).tolist()) == {0, 1}
    assert set(draw(probabilities.log(), uniform_B, p=0.85).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_ends_of_the_unit_interval_stay_among_the_kept(uniform: float) -> None:
    tokens_B = draw(LOGITS_V, torch.full((1,), uniform), k=3)
    assert tokens_B.item() == (1 if uniform == 0.0 else 0)


def test_temperature_zero_is_greedy() -> None:
    logits_BV = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    zero, uniform_B = torch.zeros(50), torch.rand(50, generator=torch.Generator().manual_seed(1))
    tokens_B = sample(logits_BV, zero, zero.long(), torch.ones(50), zero, uniform_B)
    assert torch.equal(tokens_B, greedy(logits_BV))


def test_masked_logits_are_never_drawn() -> None:
    logits_V = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0])
    assert set(draw(logits_V, torch.linspace(0, 1, 101)[:-1]).tolist()) == {1, 3}
