"""What cannot be sampled with is refused in one line that names the value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.serve.params import SamplingParams, Structured

NAN, INF = float("nan"), float("inf")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n 0 is out of range; it must be at least 1"),
    ({"n": 2, "temperature": 0.0}, "n 2 with temperature 0 would give the same text"),
    ({"max_tokens": 0}, "max_tokens 0 is out of range; it must be at least 1"),
    ({"min_tokens": -1}, "min_tokens -1 is out of range; it must be 0 or more"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 exceeds max_tokens 8"),
    ({"temperature": -0.1}, "temperature -0.1 is out of range"),
    ({"temperature": NAN}, "temperature nan is not a finite number"),
    ({"temperature": INF}, "temperature inf is not a finite number"),
    ({"top_p": 0.0}, "top_p 0.0 is out of range; it must be above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p 1.01 is out of range"),
    ({"top_p": NAN}, "top_p nan is not a finite number"),
    ({"top_k": -2}, "top_k -2 is out of range"),
    ({"min_p": -0.01}, "min_p -0.01 is out of range; it must be 0 to 1"),
    ({"min_p": 1.5}, "min_p 1.5 is out of range"),
    ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is out of range"),
    ({"repetition_penalty": INF}, "repetition_penalty inf is not a finite number"),
    ({"presence_penalty": 2.1}, "presence_penalty 2.1 is out of range"),
    ({"frequency_penalty": -2.1}, "frequency_penalty -2.1 is out of range"),
    ({"logprobs": 21}, "logprobs 21 is out of range; it must be 0 to 20"),
    ({"logprobs": -1}, "logprobs -1 is out of range"),
    ({"prompt_logprobs": 21}, "prompt_logprobs 21 is out of range"),
    ({"seed": 2**64}, "seed 18446744073709551616 is out of range; it must be a 64-bit whole number"),
    ({"seed": -(2**63) - 1}, "is out of range; it must be a 64-bit whole number"),
    ({"stop": ("a", "")}, "stop holds an empty text"),
    ({"stop": "END"}, "stop 'END' is one text"),
    ({"stop": "two\nlines"}, "is one text"),
    ({"logit_bias": {3: 100.5}}, "logit_bias of token 3 is 100.5; it must be"),
    ({"logit_bias": {3: NAN}}, "logit_bias of token 3 is nan"),
    ({"logit_bias": {100: 1.0}}, "logit_bias names token 100; use 0 to 99"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias names token -1; use 0 to 99"),
    ({"stop_token_ids": (7, 100)}, "stop_token_ids names token 100; use 0 to 99"),
]
GOOD: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"n": 3, "temperature": 0.1},
    {"max_tokens": None, "min_tokens": 10**6},
    {"min_tokens": 8, "max_tokens": 8},
    {"top_p": 1e-9, "top_k": -1, "min_p": 1.0},
    {"top_k": 10**9},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1e-3},
    {"logprobs": 0, "prompt_logprobs": 20},
    {"seed": 2**64 - 1},
    {"seed": -(2**63)},
    {"stop": ("a", "\n"), "stop_token_ids": (0, 99)},
    {"logit_bias": {0: -100.0, 99: 100.0}},
    {"structured": Structured("regex", "a+")},
]


@pytest.mark.parametrize(("values", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_value_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue) as error:
        SamplingParams(**values).check(vocab_size=100)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_values_at_their_limits_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert params.check(vocab_size=100) is params


def test_tokens_are_not_judged_without_a_vocabulary() -> None:
    SamplingParams(logit_bias={10**6: 1.0}, stop_token_ids=(10**6,)).check()


def test_who_needs_its_tokens_before_the_next() -> None:
    needs: list[dict[str, Any]] = [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -1.0}]
    assert all(SamplingParams(**some).penalized and SamplingParams(**some).needs_tokens for some in needs)
    assert SamplingParams(structured=Structured("json")).needs_tokens
    free: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"logit_bias": {1: 1.0}}, {"min_tokens": 3}, {"seed": 1}]
    for some in free:
        assert not SamplingParams(**some).needs_tokens
    assert SamplingParams(temperature=0.0).greedy and not SamplingParams(temperature=1e-6).greedy
