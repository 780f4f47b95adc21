"""What the engine and a runner say to each other: a `Step` to run, a `Pending` to wait for, a `Result`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rooflight.ops.batch import Batch
from rooflight.serve.request import Request, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Part:
    """One request's part of a step: `count` new tokens from position `start` on.

    samples: whether the step samples a token after the last of them (they reach the end of what stands).
    placeholder: whether the one new token is the request's last sampled one, which no result has told yet.
    The request goes on changing while the step runs: what a runner needs of it later it must copy at launch.
    """

    request: Request
    start: int
    count: int
    samples: bool
    placeholder: bool = False

    @property
    def context(self) -> int:
        """Tokens in the cache after the step."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Step:
    """What one launch runs: parts of one token first, the longer ones after them; at least one part.

    preempted: requests that lost their blocks since the last step was made.
    """

    number: int
    parts: tuple[Part, ...]
    preempted: tuple[Request, ...] = ()

    @property
    def tokens(self) -> int:
        """New tokens of all parts."""
        return sum(part.count for part in self.parts)

    @property
    def sequences(self) -> int:
        return len(self.parts)

    @property
    def samples(self) -> int:
        """Rows of logits that are sampled from."""
        return sum(part.samples for part in self.parts)

    def facts(self) -> Batch:
        """The host-side facts by which the step's operations are priced."""
        return Batch.of((part.count for part in self.parts), (part.context for part in self.parts))


@dataclass(slots=True)
class Result:
    """What a step gave, by part that samples, in the order of the step's parts.

    tokens: the sampled token of each sampling part. logprobs: beside it, or None where none were asked for; empty when
    no part asked. prompt_logprobs: by request id, those of the prompt tokens that this step computed (the first token
    of a prompt has none). embeddings: by request id, the last hidden state. seconds: measured or predicted time of the
    step on the device, None when unknown.
    """

    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None] = ()
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    embeddings: dict[str, list[float]] = field(default_factory=dict)
    seconds: float | None = None


class Pending(Protocol):
    """A launched step."""

    def result(self) -> Result:
        """Wait for the step and say what it gave; called once, in the order of launches."""
        ...


class Runner(Protocol):
    """Executes or prices steps, strictly in order.

    A request's slot names the runner's row for it from admission to finish or preemption; `request.admissions` tells a
    new tenancy of a slot. A runner reads `request.blocks` at launch: they may have grown since the last step.
    """

    def launch(self, step: Step) -> Pending:
        """Begin a step; may return before it is through."""
        ...

    def close(self) -> None:
        """Give memory and threads back."""
        ...


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a step should take: expected on this machine, and the roof; bound: the largest term of the roof."""

    seconds: float
    roof_seconds: float
    bound: str = ""


class Predictor(Protocol):
    """Prices a step from its sizes alone."""

    def forecast(self, step: Step) -> Forecast: ...
