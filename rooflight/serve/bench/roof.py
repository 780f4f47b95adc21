"""The roof beside a benchmark's figures: of its steps as they ran, and of a prefill and a decode step of its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rooflight.serve.bench.statistics import Outcome, decoding
from rooflight.serve.engine import StepRecord
from rooflight.serve.step import Forecast


class SizePredictor(Protocol):
    """Prices a step from its sizes; `rooflight.serve.predict.StepPredictor` does."""

    def forecast_sizes(self, counts: Sequence[int], contexts: Sequence[int], samples: int) -> Forecast:
        """counts: new tokens of each sequence; contexts: its tokens after the step; samples: rows sampled from."""
        ...


@dataclass(frozen=True, slots=True)
class Roof:
    """Seconds that physics allows; None where they are not known.

    run: of all the run's steps. steps, predicted: what these steps took, and should have taken. ttft: of one mean
    prompt's prefill alone. tpot: of a decode step of as many sequences as a decoding request saw, at their mean
    context. e2el: ttft and the mean number of decode steps.
    """

    run: float | None = None
    steps: float | None = None
    predicted: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None


def roof_of_steps(records: Sequence[StepRecord]) -> float | None:
    """Summed roof seconds of steps; None without steps, and where one has no forecast."""
    forecasts = [record.forecast for record in records]
    known = [forecast.roof_seconds for forecast in forecasts if forecast is not None]
    return sum(known) if known and len(known) == len(forecasts) else None


def roof_of_run(
    records: Sequence[StepRecord], outcomes: Sequence[Outcome], predictor: SizePredictor | None, budget: int
) -> Roof:
    """The roof of a run. records: its steps, empty where they are not known. budget: most tokens of a step."""
    run = roof_of_steps(records)
    steps = sum(record.seconds for record in records) if records else None
    known = [record.forecast.seconds for record in records if record.forecast is not None]
    predicted = sum(known) if known and len(known) == len(records) else None
    done = [outcome for outcome in outcomes if not outcome.error]
    if predictor is None or not done:
        return Roof(run, steps, predicted)
    prompt = sum(outcome.prompt_tokens for outcome in done) / len(done)
    cached = sum(record.cached_tokens for record in records) / len(done)
    ttft = prefill_roof(predictor, round(prompt), min(round(cached), round(prompt) - 1), budget)
    sequences, context = decoding(outcomes)
    if not sequences:
        return Roof(run, steps, predicted, ttft, None, ttft)
    rows = max(1, round(sequences))
    tpot = predictor.forecast_sizes([1] * rows, [round(context)] * rows, rows).roof_seconds
    decodes = sum(outcome.output_tokens - 1 for outcome in done) / len(done)
    return Roof(run, steps, predicted, ttft, tpot, ttft + decodes * tpot)


def prefill_roof(predictor: SizePredictor, prompt: int, cached: int, budget: int) -> float:
    """Roof seconds of one prompt's prefill, alone, in steps of at most `budget` tokens, after its cached tokens."""
    seconds, start = 0.0, max(0, cached)
    while start < prompt:
        end = min(prompt, start + budget)
        seconds += predictor.forecast_sizes([end - start], [end], int(end == prompt)).roof_seconds
        start = end
    return seconds
