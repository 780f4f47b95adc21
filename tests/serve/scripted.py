"""A runner whose model is a simulated KV memory: what a step reads there must be what its request has written.

Its next token is a hash of the whole context as read from memory, so that one wrong block changes all that follows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from zlib import crc32

from rooflight.serve.clock import VirtualClock
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request, TokenLogprobs
from rooflight.serve.scheduler import SchedulerConfig
from rooflight.serve.step import Part, Result, Step

VOCABULARY = 24
# A cell of the memory holds a token and its position in one number; positions stay below this.
_FAR = 1 << 20


def config(**changed: int | bool) -> SchedulerConfig:
    """Small sizes: 4 requests at once, 16 tokens a step, 32 blocks of 4, contexts up to 64."""
    sizes = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "block_size": 4,
        "num_blocks": 32,
        **changed,
    }
    return SchedulerConfig(**sizes)  # type: ignore[arg-type]


def request(name: str, prompt: Sequence[int], max_tokens: int = 4, priority: int = 0, **params: object) -> Request:
    """A request that ends by its length alone, unless `params` name stop tokens."""
    return Request(name, list(prompt), SamplingParams(**params), max_tokens, priority)  # type: ignore[arg-type]


def _cells(tokens: Sequence[int], start: int = 0) -> list[int]:
    return [token * _FAR + position for position, token in enumerate(tokens, start)]


def _following(cells: Sequence[int]) -> int:
    return crc32(array("q", cells).tobytes()) % VOCABULARY


class Alone:
    """A prompt's cells and all that follow them, computed with no scheduler and no memory."""

    def __init__(self, prompt: tuple[int, ...]):
        self.cells = _cells(prompt)

    def first(self, count: int) -> list[int]:
        while len(self.cells) < count:
            self.cells.append(_following(self.cells) * _FAR + len(self.cells))
        return self.cells[:count]


alone = lru_cache(maxsize=10_000)(Alone)


def expected(request: Request) -> tuple[list[int], str]:
    """The tokens that a request must have at its end, and why it ends."""
    prompt, params, output = tuple(request.prompt), request.params, []
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else request.eos_ids)
    chain = alone(prompt)
    while True:
        output.append(chain.first(len(prompt) + len(output) + 1)[-1] // _FAR)
        if output[-1] in ends and len(output) > params.min_tokens:
            return output, "stop"
        if len(output) == request.max_tokens:
            return output, "length"


@dataclass(slots=True)
class _Row:
    """What the runner keeps of a slot's tenant."""

    tenancy: tuple[str, int] = ("", 0)
    request: Request | None = None
    blocks: list[int] = field(default_factory=list)
    last: int = -1


@dataclass(slots=True)
class _Pending:
    runner: ScriptedRunner
    number: int
    given: Result

    def result(self) -> Result:
        runner = self.runner
        assert self.number == runner.read + 1, "results are asked for once, in the order of launches"
        runner.read = self.number
        runner.events.append(("result", self.number))
        if runner.clock is not None:
            runner.clock.move_to(runner.clock.now() + runner.takes)
        return self.given


class ScriptedRunner:
    """Runs each step at its launch: all its writes, then all its reads, and checks both.

    takes: seconds by which reading a result moves `clock`. events: launches and readings in their order.
    """

    def __init__(self, config: SchedulerConfig, clock: VirtualClock | None = None, takes: float = 1.0):
        self.config, self.clock, self.takes = config, clock, takes
        self.memory = [-1] * (config.num_blocks * config.block_size)
        self.rows = [_Row() for _ in range(config.max_num_seqs)]
        self.launched = self.read = 0
        self.events: list[tuple[str, int]] = []
        self.steps: list[Step] = []
        self.closed = False

    def launch(self, step: Step) -> _Pending:
        self.launched += 1
        assert step.number == self.launched
        self.events.append(("launch", step.number))
        self.steps.append(step)
        self._check_sizes(step)
        written: set[int] = set()
        for part in step.parts:
            self._admit(part)
            for place, cell in zip(self._places(part), _cells(self._new_tokens(part), part.start), strict=True):
                assert place not in written, "two parts of a step write to one place"
                written.add(place)
                self.memory[place] = cell
        result = Result([], [])
        for part in step.parts:
            self._answer(part, result)
        return _Pending(self, step.number, result)

    def close(self) -> None:
        self.closed = True

    def _check_sizes(self, step: Step) -> None:
        config, parts = self.config, step.parts
        assert 0 < sum(part.count for part in parts) <= config.max_num_batched_tokens
        slots = {part.request.slot for part in parts}
        assert len(slots) == len(parts) <= config.max_num_seqs and slots <= set(range(config.max_num_seqs))
        longer = [part.count > 1 for part in parts]
        assert longer == sorted(longer), "parts of one token come first"
        assert min(part.count for part in parts) >= 1
        for part in parts:
            assert part.context <= config.max_model_len
            assert len(part.request.blocks) == len(set(part.request.blocks))
            assert len(part.request.blocks) * config.block_size >= part.context

    def _admit(self, part: Part) -> None:
        """Take note of a new tenant, or of the blocks that the old one has gained, as a real runner does."""
        request = part.request
        row = self.rows[request.slot]
        if row.tenancy != (request.id, request.admissions):
            self.rows[request.slot] = row = _Row((request.id, request.admissions), request)
        row.blocks += request.blocks[len(row.blocks) :]
        assert row.request is request, "two requests cannot be told apart by id and admissions"
        assert row.blocks == request.blocks, "blocks change only by growing while a request runs"

    def _new_tokens(self, part: Part) -> list[int]:
        if part.placeholder:
            assert part.count == 1 and not part.request.params.needs_tokens
            return [self.rows[part.request.slot].last]
        tokens = part.request.tokens[part.start : part.context]
        assert len(tokens) == part.count, "the host does not know these tokens yet"
        return tokens

    def _places(self, part: Part) -> list[int]:
        size, blocks = self.config.block_size, self.rows[part.request.slot].blocks
        return [blocks[at // size] * size + at % size for at in range(part.start, part.context)]

    def _answer(self, part: Part, result: Result) -> None:
        request, row, size = part.request, self.rows[part.request.slot], self.config.block_size
        context: list[int] = []
        for block in row.blocks:
            context += self.memory[block * size : (block + 1) * size]
        del context[part.context :]
        assert context == alone(tuple(request.prompt)).first(part.context), f"{request.id} reads another's memory"
        if request.params.prompt_logprobs is not None:
            # The distribution after position p is that of token p + 1.
            told = request.prompt[part.start + 1 : part.context + 1]
            result.prompt_logprobs[request.id] = [TokenLogprobs(token, -1.0, 1) for token in told]
        if request.embed and part.context == len(request.prompt):
            result.embeddings[request.id] = [float(crc32(array("q", context).tobytes()))]
        if part.samples:
            row.last = _following(context)
            result.tokens.append(row.last)  # type: ignore[attr-defined]
            wanted = request.params.logprobs is not None
            result.logprobs.append(TokenLogprobs(row.last, -1.0, 1) if wanted else None)  # type: ignore[attr-defined]
