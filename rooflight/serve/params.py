"""`SamplingParams`: how the tokens of one request are chosen, and when it ends. Knows neither torch nor a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from rooflight.errors import InvalidValue

MOST_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Structured:
    """What the output must match. kind: json_schema | regex | grammar (Lark) | json (any object); text: the spec."""

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample and when to stop; names and meanings are vLLM's and OpenAI's.

    n: completions of one prompt. max_tokens: None goes on to the model's longest context. min_tokens: no end before.
    temperature: 0 is greedy. top_k: 0 (or −1) takes all; top_p, min_p: 1 and 0 take all.
    repetition_penalty: over prompt and output, divides positive logits and multiplies negative ones (1909.05858);
    presence_penalty, frequency_penalty: over the output, subtracted once and once an occurrence.
    seed: the same tokens for the same seed, whatever else is in the batch.
    stop: texts that end the output and are left out of it, unless include_stop_str_in_output.
    logprobs: this many likeliest tokens beside the chosen one (0: the chosen one alone); of the model's own
    distribution, before penalties and temperature. prompt_logprobs: the same for each token of the prompt.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: Structured | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether logits depend on the tokens that stand so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_tokens(self) -> bool:
        """Whether the host must know a token before the next can be sampled, so that no step runs ahead of it."""
        return self.penalized or self.structured is not None

    def check(self, vocab_size: int | None = None) -> SamplingParams:
        """Raise InvalidValue, naming the value and what is allowed, on what cannot be sampled with."""
        numbers = (
            "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty".split()  # noqa: SIM905
        )
        for name in numbers:
            if not math.isfinite(getattr(self, name)):
                raise InvalidValue(f"{name} {getattr(self, name)} is not a finite number")
        rules = (
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("temperature", self.temperature >= 0.0, "0 (greedy) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "0 or −1 (all), or at least 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0.0, "above 0 (1 is none)"),
            ("presence_penalty", abs(self.presence_penalty) <= 2.0, "−2 to 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2.0, "−2 to 2"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MOST_LOGPROBS,
                f"0 to {MOST_LOGPROBS}",
            ),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit whole number"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise InvalidValue(f"{name} {getattr(self, name)} is out of range; it must be {allowed}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidValue(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        if isinstance(self.stop, str):
            raise InvalidValue(f"stop {self.stop!r} is one text, of which each character would be a stop; use (text,)")
        if any(not text for text in self.stop):
            raise InvalidValue("stop holds an empty text; each must have at least one character")
        if self.n > 1 and self.greedy:
            raise InvalidValue(f"n {self.n} with temperature 0 would give the same text each time; set n to 1")
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidValue(f"logit_bias of token {token} is {bias}; it must be −100 to 100")
        if vocab_size is not None:
            for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
                for token in tokens:
                    if not 0 <= token < vocab_size:
                        raise InvalidValue(f"{name} names token {token}; use 0 to {vocab_size - 1}")
        return self
