"""From prompts to their deltas: one stream of news of all prompts of a request, and what it has used so far."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rooflight.serve.api.context import Context, ServingEngine
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.http import Tally
from rooflight.serve.outputs import Delta
from rooflight.serve.params import SamplingParams


@dataclass(slots=True)
class Usage:
    """Tokens of a request: of its prompts, of those that the prefix cache gave, and of its output."""

    tally: Tally
    prompt: int
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def add(self, prompt: int, delta: Delta) -> None:
        """Count one delta of the prompt of that number."""
        if delta.token_ids and self.tally.first_token is None:
            self.tally.first_token = time.monotonic()
        self.completion += len(delta.token_ids)
        self.cached[prompt] = max(self.cached.get(prompt, 0), delta.cached_tokens)
        self.tally.prompt_tokens, self.tally.output_tokens = self.prompt, self.completion

    def body(self) -> dict[str, Any]:
        """OpenAI's JSON of it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


@dataclass(slots=True)
class Head:
    """What every object of one answer begins with."""

    id: str
    kind: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def of(context: Context, prefix: str, kind: str, model: str) -> Head:
        return Head(f"{prefix}-{uuid.uuid4().hex}", kind, model, context.fingerprint)

    def body(self, kind: str = "") -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind or self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


async def deltas_of(
    engine: ServingEngine, prompts: Sequence[list[int]], params: SamplingParams, request_id: str, priority: int
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of every prompt beside the prompt's number, as they come; closing it cancels them all."""
    if len(prompts) == 1:
        async with contextlib.aclosing(engine.generate(prompts[0], params, request_id, priority)) as deltas:
            async for delta in deltas:
                yield 0, _sound(delta)
        return
    # A short queue: a reader that does not read must leave the merging of its news to the engine.
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(maxsize=len(prompts))

    async def pump(number: int, ids: list[int]) -> None:
        try:
            async with contextlib.aclosing(engine.generate(ids, params, f"{request_id}-{number}", priority)) as deltas:
                async for delta in deltas:
                    await queue.put((number, delta))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(number, ids)) for number, ids in enumerate(prompts)]
    try:
        left = len(tasks)
        while left:
            news = await queue.get()
            if news is None:
                left -= 1
            elif isinstance(news, BaseException):
                raise news
            else:
                yield news[0], _sound(news[1])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sound(delta: Delta) -> Delta:
    if delta.finish_reason == "error":
        raise ApiError(500, "the engine failed at this request; its log says why")
    return delta
