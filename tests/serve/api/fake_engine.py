"""A scripted engine with `AsyncEngine`'s face: what it answers is known beforehand, to the token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.async_engine import EngineDead
from rooflight.serve.detokenize import Detokenizer
from rooflight.serve.outputs import Delta
from rooflight.serve.params import SamplingParams
from rooflight.serve.step import TokenLogprobs

VOCABULARY, WIDTH = 256, 8
# Long enough for every limit that the tests set.
SAYS = "The quick brown fox jumps over the lazy dog, and then it says: näive café ✓. " * 40


def logprob(token: int) -> float:
    """The scripted log-probability of a token."""
    return -(1 + token % 16) / 4


def logprobs(token: int, top: int) -> TokenLogprobs:
    """The scripted record of a chosen token: it is the likeliest, the others follow by id."""
    others = [(other, -5.0 - place) for place, other in enumerate((token + 1 + i) % VOCABULARY for i in range(top))]
    return TokenLogprobs(token, logprob(token), 1, tuple([(token, logprob(token)), *others][:top]))


@dataclass
class FakeEngine:
    """Answers each prompt with the bytes of `says`; see the fields for what else it can be told to do.

    pause: seconds between tokens. hang_after: tokens after which it never goes on. fail: raised by `generate`.
    """

    says: str | Callable[[Sequence[int], int], str] = SAYS
    tokenizer: Tokenizer | None = field(default_factory=Tokenizer.bytes)
    max_model_len: int = 512
    pause: float = 0.0
    hang_after: int | None = None
    fail: Exception | None = None
    cached: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    errored: bool = False
    draining: bool = False

    def __post_init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=VOCABULARY, width=WIDTH)
        self.settings = SimpleNamespace(model="fake")
        self.eos_ids = frozenset({255})
        self.seen: list[tuple[list[int], SamplingParams, str, int]] = []
        self.cancelled: list[str] = []
        self.running = 0
        self.stopped: float | None = None
        self.dead = asyncio.Event()

    async def start(self) -> None:
        self.stopped = None

    async def stop(self, drain_seconds: float = 0.0) -> None:
        self.draining, self.stopped = True, drain_seconds
        for _ in range(round(drain_seconds / 0.02)):
            if self.running:
                await asyncio.sleep(0.02)
        self.dead.set()

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, priority: int = 0
    ) -> AsyncGenerator[Delta, None]:
        if self.fail is not None:
            raise self.fail
        if len(prompt_ids) >= self.max_model_len:
            raise InvalidValue(f"the prompt has {len(prompt_ids)} tokens; at most {self.max_model_len - 1} fit")
        self.seen.append((prompt_ids, params, request_id, priority))
        self.running += 1
        whole = False
        try:
            streams = [self._completion(prompt_ids, params, index) for index in range(params.n)]
            live = list(reversed(streams))
            while live:
                for stream in list(live):
                    delta = next(stream, None)
                    if delta is None:
                        live.remove(stream)
                        continue
                    await asyncio.sleep(self.pause)
                    yield delta
                if self.hang_after is not None and not live:
                    await self.dead.wait()
                    raise EngineDead("the server is shutting down")
            whole = True
        finally:
            self.running -= 1
            if not whole:
                self.cancelled.append(request_id)

    def _completion(self, prompt_ids: list[int], params: SamplingParams, index: int):
        says = self.says if isinstance(self.says, str) else self.says(prompt_ids, index)
        script = list(says.encode())
        most = self.max_model_len - len(prompt_ids)
        most = min(most, params.max_tokens if params.max_tokens is not None else most)
        text = Detokenizer(self.tokenizer, params.stop, params.include_stop_str_in_output)
        for place, token in enumerate(script[:most]):
            if self.hang_after is not None and place == self.hang_after:
                return
            last = place + 1 == min(most, len(script))
            piece = text.add([token], last=last)
            delta = Delta(index, piece.text, [token], cached_tokens=self.cached)
            if params.logprobs is not None:
                delta.logprobs = [logprobs(token, params.logprobs)]
            if place == 0 and index == 0 and params.prompt_logprobs is not None:
                told = [logprobs(token, params.prompt_logprobs) for token in prompt_ids[1:]]
                delta.prompt_logprobs = [None, *told]
            if last:
                delta.finish_reason = "length" if place + 1 == most and len(script) > most else "stop"
            if piece.stop is not None:
                delta.finish_reason, delta.stop_reason, last = "stop", piece.stop, True
            yield delta
            if last:
                return

    async def embed(self, prompt_ids: list[int], request_id: str) -> list[float]:
        await asyncio.sleep(self.pause)
        return [float(sum(prompt_ids) * (place + 1)) / 7 for place in range(WIDTH)]
