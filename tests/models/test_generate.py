"""Generation over the paged cache: blocks, ragged batches, both prefills, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.models.generate import generate
from rooflight.models.layout import Layout
from rooflight.models.presets import preset
from rooflight.models.transformer import Transformer

PROMPTS = [list(range(3, 36)), [200], list(range(90, 106))]
NEW = 20


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(preset("tiny")).initialize(seed=4, std=0.2)


@torch.no_grad()
def without_cache(model: Transformer, prompt: list[int]) -> list[int]:
    """The slow way: the whole sequence anew for every token."""
    tokens = list(prompt)
    for _ in range(NEW):
        count = len(tokens)
        logits = model(torch.tensor(tokens), torch.arange(count), Layout(dense=(1, count)))
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
def test_ragged_batch_equals_the_slow_way(model: Transformer, block_size: int) -> None:
    wanted = [without_cache(model, prompt) for prompt in PROMPTS]
    assert len({token for row in wanted for token in row}) > 10
    assert generate(model, PROMPTS, NEW, block_size=block_size) == wanted


def test_both_prefills_agree(model: Transformer) -> None:
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    dense = generate(model, prompts, NEW, prefill="dense")
    assert dense == generate(model, prompts, NEW, prefill="paged") == generate(model, prompts, NEW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), "empty prompt"),
        (([[1], []], 4), "empty prompt"),
        (([[1]], 0), "max_new_tokens is 0"),
        (([[1] * 250], 10), "250 tokens and 10 new ones exceed .* 256"),
        (([[1, 256]], 4), "token 256 is outside the vocabulary of 256"),
        (([[1, -1]], 4), "token -1 is outside"),
    ],
)
def test_refusals(model: Transformer, arguments: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        generate(model, *arguments)


def test_a_dense_prefill_needs_equal_lengths(model: Transformer) -> None:
    with pytest.raises(InvalidValue, match=r"prompts of one length, not \[1, 16, 33\]"):
        generate(model, PROMPTS, NEW, prefill="dense")
