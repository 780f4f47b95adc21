"""`Engine`: the loop that schedules, launches and settles steps; its clock and its runner make it wet or dry."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rooflight.serve.clock import Clock
from rooflight.serve.request import Request
from rooflight.serve.scheduler import Admission, Output, Scheduler
from rooflight.serve.step import Forecast, Pending, Predictor, Runner, Step


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One settled step: what ran, how long it took and should have taken, and how the engine stood then.

    began, ended: seconds of the engine's clock. seconds: of the step itself, as the runner measured or predicted it, or
    else from its begin or the last step's end to its end. queried_tokens, cached_tokens: of the requests that it
    admitted, how many tokens stood and how many the prefix cache gave. first: those that got their first token in it.
    """

    number: int
    began: float
    ended: float
    seconds: float
    forecast: Forecast | None
    tokens: int
    sequences: int
    decodes: int
    prefill_tokens: int
    generated: int
    running: int
    waiting: int
    used_blocks: int
    total_blocks: int
    preempted: int
    queried_tokens: int
    cached_tokens: int
    first: tuple[Request, ...]
    finished: tuple[Request, ...]


@dataclass(slots=True)
class _Launched:
    step: Step
    pending: Pending
    began: float
    forecast: Forecast | None
    admission: Admission


class Engine:
    """Requests in, tokens out, a step at a time.

    ahead: how many steps are launched before the oldest is settled: 1 lets a GPU begin the next step while the host
    reads the last, 0 where the runner computes within `launch`.
    on_step: is handed the record of each settled step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Clock,
        predictor: Predictor | None = None,
        ahead: int = 0,
        on_step: Callable[[StepRecord], None] | None = None,
    ):
        self.scheduler, self.runner, self.clock = scheduler, runner, clock
        self.predictor, self.ahead, self.on_step = predictor, ahead, on_step
        self._launched: deque[_Launched] = deque()
        self._ended: list[Request] = []
        self._last_end = clock.now()

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a step not yet settled."""
        return bool(self.scheduler.unfinished or self._launched)

    def add(self, request: Request) -> None:
        """Queue a request; raises InvalidValue on one that could never run."""
        self.scheduler.add(request, self.clock.now())

    def cancel(self, request_id: str, reason: str = "abort") -> bool:
        """End a request at once, with `stop` as the reason for one that has all it should; False when it has ended."""
        request = self.scheduler.cancel(request_id, reason)
        if request is not None:
            request.times.finished = self.clock.now()
            self._ended.append(request)
        return request is not None

    def step(self) -> list[Output]:
        """Launch the next step if there is one, and settle what is due; the news of the requests in it."""
        step = self.scheduler.schedule(self.clock.now())
        if step is not None:
            admission, self.scheduler.admission = self.scheduler.admission, Admission()
            began = self.clock.now()
            pending = self.runner.launch(step)
            # After the launch, so that a GPU is at work by now.
            forecast = self.predictor.forecast(step) if self.predictor is not None else None
            self._launched.append(_Launched(step, pending, began, forecast, admission))
        outputs: list[Output] = []
        while len(self._launched) > (self.ahead if step is not None else 0):
            outputs += self._settle(self._launched.popleft())
        if not self.has_work:
            self.scheduler.check_idle()
        return outputs

    def _settle(self, launched: _Launched) -> list[Output]:
        result = launched.pending.result()
        now = self.clock.now()
        outputs = self.scheduler.settle(launched.step, result, now)
        if self.on_step is not None:
            self.on_step(self._record(launched, result.seconds, now, outputs))
        self._last_end = now
        self._ended.clear()
        return outputs

    def _record(self, launched: _Launched, seconds: float | None, now: float, outputs: list[Output]) -> StepRecord:
        step, scheduler = launched.step, self.scheduler
        longer = sum(part.count for part in step.parts if part.count > 1)
        ended = [output.request for output in outputs if output.finish_reason is not None]
        return StepRecord(
            number=step.number,
            began=launched.began,
            ended=now,
            seconds=now - max(launched.began, self._last_end) if seconds is None else seconds,
            forecast=launched.forecast,
            tokens=step.tokens,
            sequences=step.sequences,
            decodes=sum(part.count == 1 for part in step.parts),
            prefill_tokens=longer,
            generated=sum(len(output.tokens) for output in outputs),
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            used_blocks=scheduler.pool.used,
            total_blocks=scheduler.pool.total,
            preempted=len(step.preempted),
            queried_tokens=launched.admission.queried_tokens,
            cached_tokens=launched.admission.cached_tokens,
            first=tuple(output.request for output in outputs if output.tokens and output.request.outputs == 1),
            finished=(*ended, *self._ended),
        )
