"""Statistics of a run against sums and sorts written out by hand, and against a clock that ticks."""

from __future__ import annotations

import math
import random

import pytest

from rooflight.serve.bench.statistics import Outcome, decoding, distribution, statistics


def outcomes(count: int, seed: int) -> list[Outcome]:
    """Requests with times of 1/64 s, so that sums are exact; every seventh failed, every fifth of one token."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        tokens = 1 if index % 5 == 0 else draw.randint(2, 40)
        itls = [draw.randint(1, 20) / 64 for _ in range(tokens - 1)]
        start, ttft = draw.randint(0, 500) / 64, draw.randint(1, 100) / 64
        error = "HTTP 500: no" if index % 7 == 6 else ""
        found.append(Outcome(index, draw.randint(1, 90), tokens, start, 0.0, ttft, ttft + sum(itls), itls, error))
    return found


def percentile_by_hand(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@pytest.mark.parametrize("seed", range(3))
def test_against_brute_force(seed: int) -> None:
    ran = outcomes(60, seed)
    seconds = max(outcome.start + outcome.latency for outcome in ran)
    found = statistics(ran, seconds, percentiles=(50, 90, 99), limits={"ttft": 0.8, "tpot": 0.15})
    done = [outcome for outcome in ran if outcome.index % 7 != 6]
    assert (found.completed, found.failed) == (len(done), 60 - len(done))
    tokens = sum(1 + len(outcome.itls) for outcome in done)
    assert found.output_tokens == tokens
    assert found.output_throughput == pytest.approx(tokens / seconds)
    assert found.total_throughput == pytest.approx((tokens + sum(each.prompt_tokens for each in done)) / seconds)
    assert found.request_throughput == pytest.approx(len(done) / seconds)
    good = 0
    values: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2el": []}
    for each in done:
        slow = False
        values["ttft"].append(each.ttft)
        values["e2el"].append(each.ttft + sum(each.itls))
        values["itl"] += each.itls
        if each.itls:
            values["tpot"].append(sum(each.itls) / len(each.itls))
            slow = sum(each.itls) / len(each.itls) > 0.15
        good += each.ttft <= 0.8 and not slow
    assert 0 < good < len(done)
    assert found.goodput == pytest.approx(good / seconds)
    for name, seen in values.items():
        told = found.metrics[name]
        mean = sum(seen) / len(seen)
        assert told.mean == pytest.approx(mean)
        assert told.median == pytest.approx(percentile_by_hand(seen, 50))
        assert told.std == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in seen) / len(seen)))
        assert dict(told.percentiles) == pytest.approx({p: percentile_by_hand(seen, p) for p in (50, 90, 99)})


@pytest.mark.parametrize("seed", range(3))
def test_peaks_against_a_ticking_clock(seed: int) -> None:
    ran = outcomes(40, seed)
    found = statistics(ran, 100.0)
    done = [outcome for outcome in ran if not outcome.error]
    # All times are multiples of 1/64 s: between two ticks nothing changes.
    at_once = [
        sum(each.start <= (tick + 0.5) / 64 < each.start + each.latency for each in done) for tick in range(64 * 100)
    ]
    assert found.peak_concurrency == max(at_once)
    first = min(each.start for each in done)
    per_second: dict[int, int] = {}
    for each in done:
        moment = each.start + each.ttft
        for itl in [0.0, *each.itls]:
            moment += itl
            per_second[int(moment - first)] = per_second.get(int(moment - first), 0) + 1
    assert found.peak_output_throughput == max(per_second.values())


@pytest.mark.parametrize("seed", range(3))
def test_decoding_sequences_as_each_saw_them(seed: int) -> None:
    ran = outcomes(40, seed)
    done = [outcome for outcome in ran if not outcome.error and outcome.output_tokens > 1]
    seen = ticks = 0
    for tick in range(64 * 100):
        running = sum(each.start + each.ttft <= (tick + 0.5) / 64 < each.start + each.latency for each in done)
        seen, ticks = seen + running * running, ticks + running
    sequences, context = decoding(ran)
    assert sequences == pytest.approx(seen / ticks)
    total = sum(each.output_tokens for each in done)
    assert context == pytest.approx(
        sum((each.prompt_tokens + each.output_tokens / 2) * each.output_tokens for each in done) / total
    )


def test_nothing_came_back() -> None:
    found = statistics([Outcome(0, 5, error="refused")], 0.0, limits={"ttft": 1.0})
    assert (found.completed, found.failed, found.errors) == (0, 1, ("refused",))
    assert found.output_throughput == found.goodput == found.peak_concurrency == 0
    assert all(each.mean is None and each.percentiles == ((99.0, None),) for each in found.metrics.values())
    assert decoding([]) == (0.0, 0.0)
    assert distribution([], (50,)).count == 0


def test_one_that_ends_when_another_starts_is_not_at_once_with_it() -> None:
    ran = [Outcome(0, 1, 1, 0.0, 0.0, 1.0, 1.0), Outcome(1, 1, 1, 1.0, 0.0, 1.0, 1.0)]
    assert statistics(ran, 2.0).peak_concurrency == 1


def test_without_limits_there_is_no_goodput() -> None:
    assert statistics(outcomes(3, 0), 1.0).goodput is None
