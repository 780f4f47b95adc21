"""The dry runner's two lanes by hand, and whole runs of the engine on its clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.serve.clock import VirtualClock
from rooflight.serve.dry_runner import DryRunner
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.scheduler import Scheduler, SchedulerConfig
from rooflight.serve.step import Forecast, Part, Step


class Seconds:
    """A predictor that takes the steps' times from a list, the last one for all that follow."""

    def __init__(self, *seconds: float):
        self.seconds = list(seconds)

    def forecast(self, step: Step) -> Forecast:
        return Forecast(self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0], 0.0)


def request(name: str = "a", prompt: Sequence[int] = (5, 6, 7), tokens: int = 4, **options: Any) -> Request:
    embed = options.pop("embed", False)
    return Request(name, prompt, SamplingParams(**options), tokens, embed=embed, eos_ids=frozenset((0, 1)))


def step(*parts: Part) -> Step:
    return Step(1, parts or (Part(request(), 0, 3, True),))


def runner(predictor: Any, clock: VirtualClock, **options: Any) -> DryRunner:
    return DryRunner(predictor, clock, vocab_size=10, width=4, **options)


def test_a_step_begins_when_launched_and_ends_after_its_seconds() -> None:
    clock = VirtualClock(100.0)
    dry = runner(Seconds(2.0, 3.0), clock)
    pending = dry.launch(step())
    assert clock.now() == 100.0  # launching takes no time, waiting does
    assert pending.result().seconds == 2.0
    assert clock.now() == 102.0
    clock.move_to(110.0)  # nobody had work
    dry.launch(step()).result()
    assert clock.now() == 113.0


def test_steps_launched_ahead_run_one_after_the_other() -> None:
    clock = VirtualClock()
    dry = runner(Seconds(2.0, 3.0, 1.0), clock)
    first, second = dry.launch(step()), dry.launch(step())
    first.result()
    assert clock.now() == 2.0
    third = dry.launch(step())
    second.result()
    assert clock.now() == 5.0
    third.result()
    assert clock.now() == 6.0


@pytest.mark.parametrize(("host", "device"), [(0.5, 2.0), (3.0, 2.0), (0.0, 2.0)])
def test_the_host_adds_to_a_step_that_is_waited_for(host: float, device: float) -> None:
    clock = VirtualClock()
    dry = runner(Seconds(device), clock, host_seconds=host)
    for _ in range(5):
        dry.launch(step()).result()
    assert clock.now() == pytest.approx(5 * (host + device))


@pytest.mark.parametrize(("host", "device"), [(0.5, 2.0), (3.0, 2.0), (0.0, 2.0)])
def test_the_longer_of_host_and_device_counts_when_running_ahead(host: float, device: float) -> None:
    """One step is always launched before the last is waited for: the first in full, then the slower lane's pace."""
    clock = VirtualClock()
    dry = runner(Seconds(device), clock, host_seconds=host)
    before = dry.launch(step())
    for _ in range(9):
        after = dry.launch(step())
        before.result()
        before = after
    before.result()
    assert clock.now() == pytest.approx(host + device + 9 * max(host, device))


def test_tokens_end_nothing_and_come_for_the_parts_that_sample() -> None:
    ends = request("a", stop_token_ids=(2, 3))  # with the ends of text 0 and 1
    free = request("b", ignore_eos=True)
    chunk = request("c")
    parts = (Part(ends, 0, 3, True), Part(free, 0, 3, True), Part(chunk, 0, 2, False))
    given = runner(Seconds(1.0), VirtualClock()).launch(step(*parts)).result()
    assert list(given.tokens) == [4, 0]
    assert not given.logprobs
    assert not given.embeddings


def test_an_embedding_comes_with_the_prompts_last_token() -> None:
    asked = request("e", embed=True)
    dry = runner(Seconds(1.0), VirtualClock())
    assert not dry.launch(step(Part(asked, 0, 2, False))).result().embeddings
    given = dry.launch(step(Part(asked, 2, 1, False))).result()
    assert given.embeddings == {"e": [0.0] * 4}
    assert list(given.tokens) == []


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs_are_refused(name: str) -> None:
    asking: dict[str, Any] = {name: 2}
    with pytest.raises(InvalidValue, match=f"request a: a dry run computes no {name}"):
        runner(Seconds(1.0), VirtualClock()).launch(step(Part(request(**asking), 0, 3, True)))


def test_a_request_that_any_token_ends_is_refused() -> None:
    with pytest.raises(InvalidValue, match="each of the 10 tokens ends it"):
        runner(Seconds(1.0), VirtualClock()).launch(step(Part(request(stop_token_ids=tuple(range(10))), 0, 3, True)))


def test_a_negative_host_time_is_refused() -> None:
    with pytest.raises(InvalidValue, match="host_seconds -1"):
        runner(Seconds(1.0), VirtualClock(), host_seconds=-1.0)


def served(ahead: int, host_seconds: float, requests: list[Request]) -> tuple[float, list[StepRecord]]:
    """When an engine of three slots is through with all requests, each step of 1 s, and its records."""
    clock, records = VirtualClock(), []
    config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=64, block_size=4, num_blocks=40)
    engine = Engine(
        Scheduler(config),
        runner(Seconds(1.0), clock, host_seconds=host_seconds),
        clock,
        ahead=ahead,
        on_step=records.append,
    )
    for one in requests:
        engine.add(one)
    while engine.has_work:
        engine.step()
    return clock.now(), records


def test_an_engine_on_the_virtual_clock() -> None:
    """A prompt of 3 gives its first token after one step and its fourth after four; nothing took real time."""
    one = request()
    end, records = served(0, 0.0, [one])
    assert (end, len(records)) == (4.0, 4)
    assert (one.times.first_token, one.times.last_token) == (1.0, 4.0)
    assert (one.finish_reason, one.tokens) == ("length", [5, 6, 7, 2, 2, 2, 2])
    assert [record.seconds for record in records] == [1.0] * 4


def test_an_engine_that_runs_ahead_hides_the_host() -> None:
    waiting, _ = served(0, 0.25, [request(tokens=10)])
    ahead, records = served(1, 0.25, [request(tokens=10)])
    assert waiting == pytest.approx(10 * 1.25)
    assert len(records) == 10
    assert ahead == pytest.approx(0.25 + 10)


def test_requests_beyond_the_slots_wait_their_turn() -> None:
    """Six requests of 4 tokens over three slots: two rounds of four steps; a prompt of 20 takes three chunks of 8."""
    end, _ = served(0, 0.0, [request(f"r{i}", prompt=[9 + i, 8], tokens=4) for i in range(6)])
    assert end == 8.0
    long = request("long", prompt=list(range(2, 22)), tokens=1)
    end, records = served(0, 0.0, [long])
    assert (end, [record.prefill_tokens for record in records]) == (3.0, [8, 8, 4])
    embedded = request("embedded", prompt=list(range(2, 22)), embed=True)
    assert served(0, 0.0, [embedded])[0] == 3.0
