"""Traffic through an engine in this thread, on a real or a virtual clock: `drive`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rooflight.errors import InvalidValue, RooflightError
from rooflight.serve.bench.statistics import Outcome
from rooflight.serve.bench.traffic import Arrival
from rooflight.serve.clock import Clock, VirtualClock
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.scheduler import Output


class Driven(Protocol):
    """What `drive` needs of an engine; `rooflight.serve.engine.Engine` has it."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> Iterable[Output]: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """What all requests of a benchmark share. eos_ids: what ends a request, unless it ignores them."""

    temperature: float = 0.0
    ignore_eos: bool = True
    eos_ids: frozenset[int] = frozenset()

    def params(self, arrival: Arrival) -> SamplingParams:
        return SamplingParams(
            max_tokens=arrival.output_len, temperature=self.temperature, ignore_eos=self.ignore_eos
        ).check()

    def request(self, arrival: Arrival) -> Request:
        params = self.params(arrival)
        return Request(f"bench-{arrival.index}", arrival.prompt, params, arrival.output_len, eos_ids=self.eos_ids)


def wait_until(clock: Clock, moment: float) -> None:
    """Sleep, or move a virtual clock, until `moment`."""
    if isinstance(clock, VirtualClock):
        clock.move_to(moment)
    else:
        time.sleep(max(0.0, moment - clock.now()))


def drive(
    engine: Driven,
    clock: Clock,
    arrivals: Sequence[Arrival],
    max_concurrency: int = 0,
    sampling: Sampling | None = None,
    on_output: Callable[[Output], None] | None = None,
) -> list[Outcome]:
    """Add each request when the clock passes its arrival, step the engine until all have ended; outcomes in order.

    With max_concurrency a request is sent when it has come and fewer are under way. A request that comes while a step
    runs is added after that step, and waits since it came. A request that the engine refuses fails with its reason.
    on_output: is handed each request's news before the next step.
    """
    sampling = sampling or Sampling()
    begin = clock.now()
    waiting = deque(sorted(arrivals, key=lambda arrival: arrival.at))
    outcomes = {arrival.index: Outcome(arrival.index, len(arrival.prompt)) for arrival in arrivals}
    running: dict[str, tuple[Outcome, float]] = {}
    # When a place became free for each request under way; the earliest is taken first.
    freed = deque([0.0] * max_concurrency)
    while waiting or running:
        while waiting and waiting[0].at <= clock.now() - begin and (freed or not max_concurrency):
            arrival = waiting.popleft()
            outcome = outcomes[arrival.index]
            outcome.start = max(arrival.at, freed.popleft()) if max_concurrency else arrival.at
            outcome.queued = outcome.start - arrival.at
            request = sampling.request(arrival)
            try:
                engine.add(request)
            except InvalidValue as error:
                outcome.error = str(error)
                if max_concurrency:
                    freed.appendleft(outcome.start)
                continue
            running[request.id] = outcome, outcome.start
        if not running:
            if waiting:
                wait_until(clock, begin + waiting[0].at)
            continue
        if not engine.has_work:
            raise RooflightError(f"the engine lost {len(running)} requests: it has no work, and they have not ended")
        outputs = engine.step()
        now = clock.now() - begin
        for output in outputs:
            if _note(output, running, now) and max_concurrency:
                freed.append(now)
            if on_output is not None:
                on_output(output)
    return [outcomes[arrival.index] for arrival in arrivals]


def _note(output: Output, running: dict[str, tuple[Outcome, float]], now: float) -> bool:
    """Write a request's news down; whether it has ended."""
    if output.request.id not in running:
        return False
    outcome, last = running[output.request.id]
    if output.tokens:
        if outcome.output_tokens:
            outcome.itls.append(now - last)
        else:
            outcome.ttft = now - outcome.start
        outcome.output_tokens += len(output.tokens)
        outcome.latency = now - outcome.start
        running[output.request.id] = outcome, now
    if output.finish_reason is None:
        return False
    if output.finish_reason not in ("stop", "length"):
        outcome.error = f"the engine ended the request: {output.finish_reason}"
    del running[output.request.id]
    return True
