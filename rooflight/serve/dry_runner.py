"""`DryRunner`: runs steps on a virtual clock, each for as long as it is predicted to take, and computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from rooflight.errors import InvalidValue
from rooflight.serve.clock import VirtualClock
from rooflight.serve.request import Request
from rooflight.serve.step import Predictor, Result, Step


@dataclass(slots=True)
class _Running:
    """A step on its way: what it gives, and when it ends."""

    clock: VirtualClock
    ends: float
    given: Result

    def result(self) -> Result:
        """Move the clock to the step's end, if it is not past it, and say what the step gave."""
        self.clock.move_to(self.ends)
        return self.given


class DryRunner:
    """A host and a device in virtual time, each doing one thing after the other.

    A launch takes the host `host_seconds`, from the clock's now on or from when it is through with the launch before;
    then the device begins, as soon as it is through with the step before, and works for the step's predicted seconds.
    So an engine that waits for each step pays for both in turn, and one that runs ahead for the longer of the two.

    Every sampled token is the same, one that ends no request: requests run to their max_tokens. Embeddings are `width`
    zeros. Logprobs are refused, for a dry run knows no probabilities.
    """

    def __init__(
        self, predictor: Predictor, clock: VirtualClock, *, vocab_size: int, width: int, host_seconds: float = 0.0
    ):
        if not 0.0 <= host_seconds < float("inf"):
            raise InvalidValue(f"host_seconds {host_seconds} is out of range; it must be 0 or more")
        self._predictor, self._clock = predictor, clock
        self._vocab_size, self._width, self._host_seconds = vocab_size, width, host_seconds
        self._host_free = self._device_free = clock.now()

    def launch(self, step: Step) -> _Running:
        """Begin a step; raises InvalidValue where a part of it asks for logprobs, or every token would end it."""
        tokens = [self._token(part.request) for part in step.parts if part.samples]
        embeddings = {}
        for part in step.parts:
            _refuse_logprobs(part.request)
            if part.request.embed and part.context >= len(part.request.prompt):
                embeddings[part.request.id] = [0.0] * self._width
        seconds = self._predictor.forecast(step).seconds
        self._host_free = max(self._clock.now(), self._host_free) + self._host_seconds
        self._device_free = max(self._host_free, self._device_free) + seconds
        return _Running(self._clock, self._device_free, Result(tokens, embeddings=embeddings, seconds=seconds))

    def close(self) -> None:
        """Nothing is held."""

    def _token(self, request: Request) -> int:
        """The first token that does not end the request."""
        for token in range(self._vocab_size):
            if token not in request.ends:
                return token
        raise InvalidValue(
            f"request {request.id}: each of the {self._vocab_size} tokens ends it; name fewer stop_token_ids"
        )


def _refuse_logprobs(request: Request) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(request.params, name) is not None:
            raise InvalidValue(f"request {request.id}: a dry run computes no {name}; leave {name} out")
