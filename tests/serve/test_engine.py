"""The engine's loop: what its records say against counts by hand, the order of launches, cancels and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from rooflight.errors import InvalidValue, RooflightError
from rooflight.serve.clock import RealClock, VirtualClock
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.request import Request
from rooflight.serve.scheduler import Output, Scheduler
from rooflight.serve.step import Forecast, Pending, Result, Step
from tests.serve.scripted import ScriptedRunner, config, expected, request


@dataclass
class Prices:
    """Forecasts a tenth of a second a token."""

    def forecast(self, step: Step) -> Forecast:
        return Forecast(step.tokens / 10, step.tokens / 20, "memory")


def build(ahead: int = 0, **changed: int | bool) -> tuple[Engine, ScriptedRunner, list[StepRecord]]:
    records: list[StepRecord] = []
    sizes, clock = config(**changed), VirtualClock(100.0)
    runner = ScriptedRunner(sizes, clock)
    return Engine(Scheduler(sizes), runner, clock, Prices(), ahead, records.append), runner, records


def drain(engine: Engine) -> list[list[Output]]:
    told = []
    while engine.has_work:
        told.append(engine.step())
        assert len(told) < 1000, "the engine turns without getting on"
    return told


def fields(record: StepRecord, *names: str) -> tuple:
    return tuple(getattr(record, name) for name in names)


def test_records_against_counts_by_hand() -> None:
    engine, _, records = build(max_num_batched_tokens=8, num_blocks=16)
    a, b, c = request("a", [1] * 10, 2), request("b", [2] * 3, 1), request("c", [1] * 10, 1)
    engine.add(a)
    engine.add(b)
    outputs = drain(engine)
    engine.add(c)
    outputs += drain(engine)
    sizes = [fields(one, "number", "tokens", "sequences", "decodes", "prefill_tokens", "generated") for one in records]
    assert sizes == [
        (1, 8, 1, 0, 8, 0),  # the first 8 of a's prompt
        (2, 5, 2, 0, 5, 2),  # its last 2, and b's 3
        (3, 1, 1, 1, 0, 1),  # a's second token
        (4, 2, 1, 0, 2, 1),  # c: 8 of its 10 are cached
    ]
    state = [fields(one, "running", "waiting", "used_blocks", "total_blocks", "preempted") for one in records]
    assert state == [(1, 1, 2, 16, 0), (1, 0, 3, 16, 0), (0, 0, 0, 16, 0), (0, 0, 0, 16, 0)]
    assert [fields(one, "queried_tokens", "cached_tokens") for one in records] == [(10, 0), (3, 0), (0, 0), (10, 8)]
    assert [fields(one, "first", "finished") for one in records] == [((), ()), ((a, b), (b,)), ((), (a,)), ((c,), (c,))]
    assert [fields(one, "began", "ended", "seconds") for one in records] == [
        (100.0, 101.0, 1.0),
        (101.0, 102.0, 1.0),
        (102.0, 103.0, 1.0),
        (103.0, 104.0, 1.0),
    ]
    assert [one.forecast for one in records] == [
        Forecast(0.8, 0.4, "memory"),
        Forecast(0.5, 0.25, "memory"),
        Forecast(0.1, 0.05, "memory"),
        Forecast(0.2, 0.1, "memory"),
    ]
    assert [[output.request.id for output in told] for told in outputs] == [[], ["a", "b"], ["a"], ["c"]]
    times = a.times
    assert (times.arrival, times.scheduled, times.first_token, times.last_token) == (100.0, 100.0, 102.0, 103.0)
    assert (times.finished, b.times.scheduled, b.times.finished, c.times.arrival) == (103.0, 101.0, 102.0, 103.0)


def test_preemptions_are_counted() -> None:
    engine, _, records = build(num_blocks=8)
    items = [request("a", range(8), 16), request("b", range(8, 16), 16)]
    for item in items:
        engine.add(item)
    drain(engine)
    assert sum(one.preempted for one in records) == sum(item.preemptions for item in items) > 0
    assert [item.tokens[8:] for item in items] == [expected(item)[0] for item in items]


def test_a_step_is_launched_before_the_last_is_read() -> None:
    engine, runner, records = build(ahead=1, max_num_batched_tokens=8)
    engine.add(request("a", [1] * 10, 3))
    engine.add(request("b", [2] * 3, 1))
    told = [[(output.request.id, output.finish_reason) for output in news] for news in drain(engine)]
    assert runner.events == [
        ("launch", 1),
        ("launch", 2),
        ("result", 1),
        ("launch", 3),
        ("result", 2),
        ("launch", 4),
        ("result", 3),
        ("result", 4),
    ]
    # A turn without a step that may be launched reads all that there is.
    assert told == [[], [], [("a", None), ("b", "length")], [("a", None)], [("a", "length")]]
    # Step 4 was launched when step 2 had been read, one second after 1: it ran from the end of step 3 on.
    assert [fields(one, "began", "ended", "seconds") for one in records] == [
        (100.0, 101.0, 1.0),
        (100.0, 102.0, 1.0),
        (101.0, 103.0, 1.0),
        (102.0, 104.0, 1.0),
    ]
    assert [part.placeholder for step in runner.steps for part in step.parts] == [False, False, False, True, True]


def test_a_stop_token_ends_a_request_whose_next_step_is_under_way() -> None:
    free = request("free", range(6), 12)
    want = expected(free)[0]
    item = request("a", range(6), 12, stop_token_ids=(want[3],))
    place = want.index(want[3])
    engine, runner, records = build(ahead=1)
    engine.add(item)
    tokens = [token for news in drain(engine) for output in news for token in output.tokens]
    assert tokens == want[: place + 1] and item.finish_reason == "stop"
    # One step more than tokens: the last had been launched already, and its token is nobody's.
    assert len(runner.steps) == len(tokens) + 1 == len(records)
    assert [one.generated for one in records] == [1] * len(tokens) + [0]
    assert [one.finished for one in records] == [()] * place + [(item,), ()]


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_is_cancelled_is_told_once_and_says_nothing_more(ahead: int) -> None:
    engine, _, records = build(ahead)
    runs, waits = request("runs", range(6), 12), request("waits", [9] * 20, 4)
    other = request("other", range(4), 9)
    for item in (runs, other, waits):
        engine.add(item)
    engine.step()
    engine.step()
    assert runs.in_flight == ahead
    told = len(records)
    assert engine.cancel("runs") and engine.cancel("waits")
    assert not engine.cancel("runs") and not engine.cancel("nobody")
    moment = engine.clock.now()
    news = [output.request for outputs in drain(engine) for output in outputs]
    assert set(news) == {other}
    assert records[told].finished == (runs, waits)
    assert [item for one in records for item in one.finished].count(runs) == 1
    for item in (runs, waits):
        assert (item.finish_reason, item.times.finished) == ("abort", moment)
    assert other.tokens[4:] == expected(other)[0]


def test_cancelling_the_last_request_leaves_its_step_to_be_read() -> None:
    engine, runner, _ = build(ahead=1)
    engine.add(request("a", range(6), 12))
    engine.step()
    engine.cancel("a")
    assert engine.has_work
    assert engine.step() == [] and not engine.has_work
    assert runner.events == [("launch", 1), ("result", 1)]


def test_a_request_that_has_all_it_should_ends_with_a_stop() -> None:
    engine, _, records = build(ahead=1)
    engine.add(item := request("a", range(6), 12))
    engine.step()
    engine.step()
    assert engine.cancel("a", "stop")
    drain(engine)
    assert item.finish_reason == "stop" and records[-1].finished == (item,)


def test_an_id_can_be_used_again_after_its_request_has_ended() -> None:
    engine, _, _ = build(ahead=1)
    engine.add(request("a", range(6), 12))
    with pytest.raises(InvalidValue, match="request id 'a' is in use"):
        engine.add(request("a", range(6), 12))
    engine.step()
    engine.step()
    engine.cancel("a")
    again = request("a", [3] * 7, 5)
    engine.add(again)
    drain(engine)
    assert again.tokens[7:] == expected(again)[0]


def test_an_embedding_comes_once_and_no_token() -> None:
    for ahead in (0, 1):
        engine, _, records = build(ahead, max_num_batched_tokens=4)
        engine.add(item := request("a", range(10), 0))
        item.embed = True
        outputs = [output for news in drain(engine) for output in news]
        assert len(outputs) == 1 and outputs[0].tokens == [] and len(outputs[0].embedding or []) == 1
        assert outputs[0].finish_reason == item.finish_reason == "stop"
        assert [one.generated for one in records] == [0, 0, 0]
        assert [one.finished for one in records] == [(), (), (item,)]


class Breaks:
    """A runner that fails at the launch or at the result of the step of a number."""

    def __init__(self, inner: ScriptedRunner, at_launch: int = 0, at_result: int = 0):
        self.inner, self.at_launch, self.at_result = inner, at_launch, at_result

    def launch(self, step: Step) -> Pending:
        if step.number == self.at_launch:
            raise RuntimeError("the launch failed")
        pending = self.inner.launch(step)
        return self if step.number == self.at_result else pending

    def result(self) -> Result:
        raise RuntimeError("the step failed")

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize(("which", "words"), [({"at_launch": 2}, "the launch failed"), ({"at_result": 2}, "the step")])
@pytest.mark.parametrize("ahead", [0, 1])
def test_an_error_of_the_runner_is_the_engines(ahead: int, which: dict[str, int], words: str) -> None:
    engine, runner, _ = build(ahead)
    engine.runner = Breaks(runner, **which)
    engine.add(request("a", range(6), 12))
    with pytest.raises(RuntimeError, match=words):
        drain(engine)


def test_a_lost_block_is_found_when_the_engine_is_idle() -> None:
    engine, _, _ = build()
    engine.add(request("a", range(6), 3))
    engine.step()
    engine.scheduler.pool.take(1)
    with pytest.raises(RooflightError, match="1 of 32 KV blocks are still in use without a request"):
        drain(engine)


def test_seconds_are_the_runners_where_it_measured_them() -> None:
    engine, runner, records = build()
    launch: Callable[[Step], Pending] = runner.launch

    def measured(step: Step) -> Pending:
        pending = launch(step)
        pending.given.seconds = 0.125  # type: ignore[attr-defined]
        return pending

    runner.launch = measured  # type: ignore[method-assign]
    engine.add(request("a", range(6), 2))
    drain(engine)
    assert [one.seconds for one in records] == [0.125, 0.125]


def test_clocks_never_go_back() -> None:
    clock = VirtualClock(5.0)
    clock.move_to(4.0)
    assert clock.now() == 5.0
    clock.move_to(7.5)
    assert clock.now() == 7.5
    real = RealClock()
    assert real.now() <= real.now()


def test_the_engine_needs_neither_predictor_nor_listener() -> None:
    sizes = config()
    engine = Engine(Scheduler(sizes), ScriptedRunner(sizes), RealClock(), ahead=1)
    items: list[Request] = [request(str(number), range(number + 1), 5) for number in range(9)]
    for item in items:
        engine.add(item)
    drain(engine)
    assert [item.tokens[len(item.prompt) :] for item in items] == [expected(item)[0] for item in items]
    assert engine.step() == []
