"""A whole engine whose steps take what a formula says, on a virtual clock or a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rooflight.serve.clock import Clock, VirtualClock
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.scheduler import Scheduler, SchedulerConfig
from rooflight.serve.step import Forecast, Result, Step

TOKEN = 3


class Settled:
    """A step that ends at a moment of the clock."""

    def __init__(self, clock: Clock, end: float, step: Step, seconds: float):
        self._clock, self._end, self._step, self._seconds = clock, end, step, seconds

    def result(self) -> Result:
        if isinstance(self._clock, VirtualClock):
            self._clock.move_to(self._end)
        return Result([TOKEN] * self._step.samples, seconds=self._seconds)


class FormulaRunner:
    """A device that works in order; `cost` gives a step's seconds."""

    def __init__(self, clock: Clock, cost: Callable[[Step], float]):
        self._clock, self._cost, self._free = clock, cost, 0.0

    def launch(self, step: Step) -> Settled:
        seconds = self._cost(step)
        self._free = max(self._free, self._clock.now()) + seconds
        return Settled(self._clock, self._free, step, seconds)

    def close(self) -> None: ...


class HalfRoof:
    """A predictor: a step takes what the formula says, and its roof is half of that."""

    def __init__(self, cost: Callable[[Step], float]):
        self._cost = cost

    def forecast(self, step: Step) -> Forecast:
        return Forecast(self._cost(step), self._cost(step) / 2)

    def forecast_sizes(self, counts: Sequence[int], contexts: Sequence[int], samples: int) -> Forecast:
        """A thousandth of a second a new token, and a millionth a token of context."""
        roof = 1e-3 * sum(counts) + 1e-6 * sum(contexts)
        return Forecast(2 * roof, roof)


def engine_of(
    clock: Clock,
    cost: Callable[[Step], float],
    seqs: int = 8,
    budget: int = 10_000,
    blocks: int = 10_000,
    ahead: int = 0,
    records: list[StepRecord] | None = None,
) -> Engine:
    config = SchedulerConfig(seqs, budget, 4096, 16, blocks, enable_prefix_caching=False)
    on_step = None if records is None else records.append
    return Engine(Scheduler(config), FormulaRunner(clock, cost), clock, HalfRoof(cost), ahead, on_step)
