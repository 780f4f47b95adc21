"""From what came back of each request to the figures that are told; definitions are those of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Outcome:
    """What came back of one request; seconds, `start` since the run's begin.

    start: when it was sent; with limited concurrency that is later than its arrival, by `queued`. ttft: from start to
    the first token. itls: between one piece of news and the next. latency: from start to the last token.
    error: why it failed; empty when it did not.
    """

    index: int
    prompt_tokens: int
    output_tokens: int = 0
    start: float = 0.0
    queued: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (latency − ttft) / (n − 1); None for one token."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def end(self) -> float:
        return self.start + self.latency


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a metric, in seconds; None where nothing was seen."""

    count: int
    mean: float | None
    median: float | None
    std: float | None
    percentiles: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """The figures of a run of `seconds`. Rates are a second; goodput is None where no limit was given.

    peak_output_throughput: output tokens of the fullest second. peak_concurrency: most requests under way at once.
    """

    seconds: float
    completed: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_throughput: float
    goodput: float | None
    peak_output_throughput: float
    peak_concurrency: int
    metrics: Mapping[str, Distribution]
    errors: tuple[str, ...]


def statistics(
    outcomes: Sequence[Outcome],
    seconds: float,
    metrics: Sequence[str] = ("ttft", "tpot", "itl", "e2el"),
    percentiles: Sequence[float] = (99.0,),
    limits: Mapping[str, float] | None = None,
) -> Statistics:
    """Figures over the requests that completed; `limits` in seconds by metric (ttft, tpot, e2el) define goodput.

    A request of one token has no TPOT, and keeps every limit on it. Percentiles interpolate linearly.
    """
    done = [outcome for outcome in outcomes if not outcome.error]
    failed = [outcome for outcome in outcomes if outcome.error]
    values: dict[str, list[float]] = {
        "ttft": [outcome.ttft for outcome in done],
        "tpot": [outcome.tpot for outcome in done if outcome.tpot is not None],
        "itl": [itl for outcome in done for itl in outcome.itls],
        "e2el": [outcome.latency for outcome in done],
    }
    prompt_tokens = sum(outcome.prompt_tokens for outcome in done)
    output_tokens = sum(outcome.output_tokens for outcome in done)
    per_second = 1.0 / seconds if seconds > 0.0 else 0.0
    return Statistics(
        seconds=seconds,
        completed=len(done),
        failed=len(failed),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        request_throughput=len(done) * per_second,
        output_throughput=output_tokens * per_second,
        total_throughput=(prompt_tokens + output_tokens) * per_second,
        goodput=sum(_keeps(outcome, limits) for outcome in done) * per_second if limits else None,
        peak_output_throughput=_peak_tokens(done),
        peak_concurrency=_peak_concurrency(done),
        metrics={name: distribution(values[name], percentiles) for name in metrics},
        errors=tuple(dict.fromkeys(outcome.error for outcome in failed)),
    )


def distribution(values: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    """Mean, median, standard deviation and percentiles; None each where there are no values."""
    if not len(values):
        return Distribution(0, None, None, None, tuple((percentile, None) for percentile in percentiles))
    array = np.asarray(values, dtype=np.float64)
    return Distribution(
        len(array),
        float(array.mean()),
        float(np.median(array)),
        float(array.std()),
        tuple((percentile, float(np.percentile(array, percentile))) for percentile in percentiles),
    )


def decoding(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """(sequences, context): what a decoding request saw on average while it decoded.

    sequences: requests between their first and last token, itself among them, averaged over all requests' decode time:
    ∫c² dt / ∫c dt. context: tokens before the middle one of its output, weighted by output tokens. 0, 0 where nothing
    was decoded.
    """
    done = [outcome for outcome in outcomes if not outcome.error and outcome.output_tokens > 1]
    events = sorted([(outcome.start + outcome.ttft, 1) for outcome in done] + [(outcome.end, -1) for outcome in done])
    running, before, area, weighted = 0, 0.0, 0.0, 0.0
    for moment, change in events:
        area += running * (moment - before)
        weighted += running**2 * (moment - before)
        running, before = running + change, moment
    tokens = sum(outcome.output_tokens for outcome in done)
    if not area or not tokens:
        return 0.0, 0.0
    contexts = sum((outcome.prompt_tokens + outcome.output_tokens / 2) * outcome.output_tokens for outcome in done)
    return weighted / area, contexts / tokens


def _keeps(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    seen = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.latency}
    return all(seen[name] <= limit for name, limit in limits.items())


def _peak_tokens(done: Sequence[Outcome]) -> float:
    """Most pieces of news within one of the seconds that follow each other from the first start on."""
    if not done:
        return 0.0
    first = min(outcome.start for outcome in done)
    counts: dict[int, int] = {}
    for outcome in done:
        for moment in outcome.start + outcome.ttft - first + np.cumsum([0.0, *outcome.itls]):
            counts[int(moment)] = counts.get(int(moment), 0) + 1
    return float(max(counts.values()))


def _peak_concurrency(done: Sequence[Outcome]) -> int:
    # One that ends when another starts is not at once with it: at equal times −1 sorts before +1.
    events = sorted([(outcome.start, 1) for outcome in done] + [(outcome.end, -1) for outcome in done])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most
