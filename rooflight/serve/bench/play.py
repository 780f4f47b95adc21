"""Traffic as a client sends it: `play` sends each request when its time has come and notes when its news arrive."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rooflight.errors import RooflightError
from rooflight.serve.bench.drive import Sampling
from rooflight.serve.bench.statistics import Outcome
from rooflight.serve.bench.traffic import Arrival

if TYPE_CHECKING:
    from rooflight.serve.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class News:
    """What a stream brought at once. tokens: new ones, at least 1 where there is any text. usage: counts at the end."""

    tokens: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Sender(Protocol):
    """A way to have a request answered piece by piece."""

    def stream(self, arrival: Arrival) -> AsyncIterator[News]:
        """The news of one request; raises RooflightError or OSError where it fails."""
        ...


async def play(
    sender: Sender,
    arrivals: Sequence[Arrival],
    max_concurrency: int = 0,
    on_finish: Callable[[], None] | None = None,
) -> tuple[list[Outcome], float]:
    """Outcomes in the order of `arrivals`, and the seconds from the begin to the last request's end.

    A request that waits for a place counts from when it is sent, as with vLLM; the wait is told as `queued`.
    """
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    begin = time.perf_counter()

    async def one(arrival: Arrival) -> Outcome:
        delay = begin + arrival.at - time.perf_counter()
        if delay > 0.0:
            await asyncio.sleep(delay)
        came = time.perf_counter()
        async with places:
            outcome = await _listen(sender, arrival, begin)
        outcome.queued = max(0.0, outcome.start + begin - came)
        if on_finish is not None:
            on_finish()
        return outcome

    outcomes = await asyncio.gather(*(one(arrival) for arrival in arrivals))
    return list(outcomes), time.perf_counter() - begin


async def _listen(sender: Sender, arrival: Arrival, begin: float) -> Outcome:
    sent = last = time.perf_counter()
    outcome = Outcome(arrival.index, len(arrival.prompt), start=sent - begin)
    counted = None
    try:
        async for news in sender.stream(arrival):
            if news.tokens:
                now = time.perf_counter()
                if outcome.output_tokens:
                    outcome.itls.append(now - last)
                else:
                    outcome.ttft = now - sent
                outcome.output_tokens += news.tokens
                last = now
            if news.prompt_tokens is not None:
                outcome.prompt_tokens = news.prompt_tokens
            counted = news.output_tokens if news.output_tokens is not None else counted
    except (RooflightError, OSError) as error:
        outcome.error = str(error) or type(error).__name__
    outcome.latency = last - sent
    if not outcome.error and not outcome.output_tokens:
        outcome.error = "the answer held no token"
    elif counted is not None and not outcome.error:
        # A piece of news may hold several tokens, or one that has no text yet: the server's count is right.
        outcome.output_tokens = counted
    return outcome


class EngineSender:
    """Requests to an `AsyncEngine` in this process."""

    def __init__(self, engine: AsyncEngine, sampling: Sampling):
        self._engine, self._sampling = engine, sampling

    async def stream(self, arrival: Arrival) -> AsyncIterator[News]:
        """Pieces of news as the engine's deltas come."""
        params = self._sampling.params(arrival)
        deltas = self._engine.generate(list(arrival.prompt), params, f"bench-{arrival.index}")
        async for delta in deltas:
            yield News(len(delta.token_ids))
            if delta.finish_reason not in (None, "stop", "length"):
                raise RooflightError(f"the engine ended the request: {delta.finish_reason}")
