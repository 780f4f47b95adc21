"""`Request`: one prompt on its way to its tokens, and where it stands. Knows neither torch nor the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from rooflight.serve.params import SamplingParams


class Status(Enum):
    """waiting: has no blocks (new, or preempted); running: has blocks and a slot; finished: neither, for good."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log of the chosen token's probability, its rank (1: likeliest), and the likeliest tokens with theirs."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Times:
    """Seconds of the engine's clock at which a request arrived, first ran, gave its first and its last token."""

    arrival: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, how it is sampled, and its state; there is no prefill or decode phase, only tokens yet to compute.

    tokens: the prompt and every known output token. computed: how many tokens have their keys and values in the cache,
    or will have them once the launched steps are through. in_flight: sampled tokens that no result has told yet; they
    follow `tokens`, so `length` − `computed` is what the next step may take.
    cached: tokens that the prefix cache gave at the first admission. kept: blocks that the prefix cache knows by now.
    slot: the row that the runner keeps for it. admissions: the number of its last admission among all requests', by
    which a new tenant of a slot is known even under an old id; 0: none yet.
    embed: wants the last hidden state of its prompt and no token.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int
    priority: int = 0
    eos_ids: frozenset[int] = frozenset()
    embed: bool = False
    times: Times = field(default_factory=Times)
    status: Status = Status.WAITING
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    kept: int = 0
    slot: int = -1
    order: int = 0
    admissions: int = 0
    preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.ends = frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else self.eos_ids)

    @property
    def length(self) -> int:
        """Tokens that stand: known ones and those in flight."""
        return len(self.tokens) + self.in_flight

    @property
    def outputs(self) -> int:
        """Output tokens known so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def sampled(self) -> int:
        """Output tokens known or in flight."""
        return self.outputs + self.in_flight
