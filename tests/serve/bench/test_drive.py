"""`drive`: what each request sees, against queues worked out by hand."""

from __future__ import annotations

import random
import time

import pytest

from rooflight.serve.bench.drive import Sampling, drive
from rooflight.serve.bench.traffic import Arrival
from rooflight.serve.clock import RealClock, VirtualClock
from rooflight.serve.scheduler import Output
from tests.serve.bench.engines import TOKEN, engine_of


def random_arrivals(count: int, seed: int) -> list[Arrival]:
    draw = random.Random(seed)
    moment, found = 0.0, []
    for index in range(count):
        moment += draw.randint(0, 12) / 4
        found.append(Arrival(index, (1,) * draw.randint(1, 9), draw.randint(1, 6), moment))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("begin", [0.0, 1000.0])
def test_one_at_a_time_is_a_queue(seed: int, begin: float) -> None:
    """An engine with one place and steps of a second: each request waits for the one before it."""
    arrivals = random_arrivals(30, seed)
    clock = VirtualClock(begin)
    found = drive(engine_of(clock, lambda step: 1.0, seqs=1), clock, arrivals)
    free = 0.0
    for arrival, outcome in zip(arrivals, found, strict=True):
        began = max(free, arrival.at)
        assert outcome.start == arrival.at and outcome.queued == 0.0
        assert outcome.ttft == pytest.approx(began + 1.0 - arrival.at)
        free = began + arrival.output_len
        assert outcome.latency == pytest.approx(free - arrival.at)
        assert outcome.itls == pytest.approx([1.0] * (arrival.output_len - 1))
        assert (outcome.output_tokens, outcome.prompt_tokens) == (arrival.output_len, len(arrival.prompt))


@pytest.mark.parametrize("seed", range(4))
def test_limited_concurrency_waits_outside(seed: int) -> None:
    """With one request under way at once it waits unsent: the same ends, but it starts when it is sent."""
    arrivals = random_arrivals(30, seed)
    clock = VirtualClock()
    found = drive(engine_of(clock, lambda step: 1.0), clock, arrivals, max_concurrency=1)
    free = 0.0
    for arrival, outcome in zip(arrivals, found, strict=True):
        began = max(free, arrival.at)
        assert outcome.start == began
        assert outcome.queued == began - arrival.at
        assert outcome.ttft == pytest.approx(1.0)
        free = began + arrival.output_len
        assert outcome.end == pytest.approx(free)


def test_concurrency_is_never_exceeded() -> None:
    clock = VirtualClock()
    found = drive(engine_of(clock, lambda step: 0.25 * step.sequences), clock, random_arrivals(60, 9), 3)
    for outcome in found:
        at_once = sum(other.start <= outcome.start < other.end for other in found)
        assert 1 <= at_once <= 3
    assert any(outcome.queued for outcome in found)


def test_one_that_comes_during_a_step_waits_since_it_came() -> None:
    clock = VirtualClock()
    arrivals = [Arrival(0, (1,), 2, 0.0), Arrival(1, (1,), 1, 0.25)]
    first, second = drive(engine_of(clock, lambda step: 1.0), clock, arrivals)
    assert (first.ttft, first.latency) == (1.0, 2.0)
    # Its step begins when the running one ends, at 1.0, and ends at 2.0.
    assert (second.start, second.ttft) == (0.25, 1.75)


def test_a_step_ahead_takes_no_longer() -> None:
    arrivals = [Arrival(index, (1,) * 4, 5) for index in range(20)]
    ends = []
    for ahead in (0, 1):
        clock = VirtualClock()
        found = drive(engine_of(clock, lambda step: 0.5, seqs=4, ahead=ahead), clock, arrivals)
        assert all(outcome.output_tokens == 5 for outcome in found)
        ends.append(max(outcome.end for outcome in found))
    assert ends[0] == 20 / 4 * 5 * 0.5
    assert ends[0] <= ends[1] <= ends[0] + 20 / 4 * 0.5


def test_requests_that_cannot_run_fail_with_their_reason() -> None:
    clock = VirtualClock()
    arrivals = [Arrival(0, (1,) * 5000, 2), Arrival(1, (1,), 2), Arrival(2, (), 2)]
    found = drive(engine_of(clock, lambda step: 1.0), clock, arrivals, max_concurrency=1)
    assert "4096" in found[0].error and "empty prompt" in found[2].error
    assert (found[1].error, found[1].output_tokens) == ("", 2)


def test_an_end_of_text_ends_a_request_that_heeds_it() -> None:
    for ignore, tokens in ((True, 9), (False, 1)):
        clock = VirtualClock()
        sampling = Sampling(ignore_eos=ignore, eos_ids=frozenset({TOKEN}))
        found = drive(engine_of(clock, lambda step: 1.0), clock, [Arrival(0, (1,), 9)], sampling=sampling)
        assert (found[0].error, found[0].output_tokens) == ("", tokens)


def test_a_real_clock_sleeps_until_the_next_arrival() -> None:
    clock = RealClock()
    began = time.monotonic()
    ended: list[float] = []

    def listen(output: Output) -> None:
        if output.finish_reason is not None:
            ended.append(time.monotonic() - began)

    arrivals = [Arrival(0, (1,), 3, 0.05), Arrival(1, (1,), 3, 0.15)]
    found = drive(engine_of(clock, lambda step: 0.0), clock, arrivals, on_output=listen)
    assert [outcome.start for outcome in found] == [0.05, 0.15]
    assert ended[0] >= 0.05 and ended[1] >= 0.15
    assert all(outcome.output_tokens == 3 and outcome.ttft >= 0.0 for outcome in found)
