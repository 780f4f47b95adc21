"""One batch of equal requests, again and again: the time of an iteration, to the first tokens, and a token after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rooflight.errors import RooflightError
from rooflight.serve.bench.drive import Driven, Sampling, drive
from rooflight.serve.bench.result import Row, distribution_rows
from rooflight.serve.bench.roof import roof_of_steps
from rooflight.serve.bench.settings import LatencySettings
from rooflight.serve.bench.statistics import distribution
from rooflight.serve.bench.traffic import Arrival
from rooflight.serve.clock import Clock
from rooflight.serve.engine import StepRecord

# Those that vLLM tells.
PERCENTILES = (10.0, 25.0, 75.0, 90.0, 99.0)


@dataclass(frozen=True, slots=True)
class Iteration:
    """One batch from first to last token. ttft: until every request has its first token, in seconds like the rest.

    roof, ttft_roof: roofs of all its steps, and of those until every request had its first token; None when unknown.
    """

    seconds: float
    ttft: float
    output_len: int
    roof: float | None = None
    ttft_roof: float | None = None

    @property
    def tpot(self) -> float | None:
        """(seconds − ttft) / (output_len − 1); None for one token."""
        return (self.seconds - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None

    @property
    def tpot_roof(self) -> float | None:
        """The roof of a step after the first tokens."""
        if self.roof is None or self.ttft_roof is None or self.output_len < 2:
            return None
        return (self.roof - self.ttft_roof) / (self.output_len - 1)


def batch(settings: LatencySettings, vocab_size: int, seed: int) -> list[Arrival]:
    """Requests of random token ids that come at once."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=(settings.batch_size, settings.input_len))
    return [Arrival(index, tuple(row), settings.output_len) for index, row in enumerate(ids.tolist())]


def iterate(
    engine: Driven,
    clock: Clock,
    records: list[StepRecord],
    settings: LatencySettings,
    arrivals: Sequence[Arrival],
    on_end: Callable[[], None] | None = None,
) -> list[Iteration]:
    """The iterations that count. records: where the engine writes its steps; emptied before each.

    on_end: is called after each iteration, those of the warm-up too.

    Raises RooflightError when a request fails, as a batch with a hole is another batch.
    """
    sampling = Sampling(settings.temperature, ignore_eos=True)
    found: list[Iteration] = []
    for number in range(settings.num_iters_warmup + settings.num_iters):
        records.clear()
        begin = clock.now()
        outcomes = drive(engine, clock, arrivals, sampling=sampling)
        for outcome in outcomes:
            if outcome.error:
                raise RooflightError(f"a request of the batch failed: {outcome.error}")
        if number >= settings.num_iters_warmup:
            ttft = max(outcome.ttft for outcome in outcomes)
            until = [record for record in records if record.ended - begin <= ttft]
            seconds = max(outcome.latency for outcome in outcomes)
            roofs = roof_of_steps(records), roof_of_steps(until)
            found.append(Iteration(seconds, ttft, settings.output_len, *roofs))
        if on_end is not None:
            on_end()
    return found


def latency_rows(iterations: Sequence[Iteration], settings: LatencySettings) -> list[Row]:
    """Rates, and the distribution over iterations of their time, TTFT and TPOT, each with its mean roof."""
    seconds = [each.seconds for each in iterations]
    mean = float(np.mean(seconds))
    tokens = settings.batch_size * settings.output_len
    roof = _mean([each.roof for each in iterations])
    share = roof / mean if roof is not None and mean else None
    rows = [
        Row("num_iters", "Iterations", "count", len(iterations)),
        Row("output_throughput", "Output tokens", "tok/s", tokens / mean if mean else None, share),
    ]
    rows += distribution_rows("latency", distribution(seconds, PERCENTILES), roof)
    ttft_roof = _mean([each.ttft_roof for each in iterations])
    rows += distribution_rows("ttft", distribution([each.ttft for each in iterations], PERCENTILES), ttft_roof)
    tpots = [each.tpot for each in iterations if each.tpot is not None]
    if tpots:
        tpot_roof = _mean([each.tpot_roof for each in iterations])
        rows += distribution_rows("tpot", distribution(tpots, PERCENTILES), tpot_roof)
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
