"""A dry run decides what a wet one decides: step by step the same parts, admissions, preemptions and blocks.

Both run the same traffic; the wet one executes each step and its clock is then moved by the predicted seconds, so that
nothing but the tokens differs. A dry answer is one token over and over. So the two are comparable wherever which
blocks hold equal tokens does not depend on the answers:
- without a prefix cache always, for then nothing depends on tokens;
- with one, where no prompt holds an earlier prompt's answer, as a conversation's next turn does (a dry run finds only
  the prompt's blocks then: the last test), and where equal prompts get equal answers, as greedy ones do;
- where length alone ends an answer: no ends of text, stop texts or structured output.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rooflight.cli import main
from rooflight.serve.bench.stand import Stand, twin, wet_stand
from rooflight.serve.clock import VirtualClock
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.scheduler import Scheduler
from rooflight.serve.settings import EngineSettings
from rooflight.serve.step import Pending, Predictor, Result, Runner, Step

VOCAB, CONTEXT = 256, 256


@dataclass
class Moved:
    """A step that was executed, and that ends at its predicted moment."""

    inner: Pending
    clock: VirtualClock
    end: float
    seconds: float

    def result(self) -> Result:
        found = self.inner.result()
        self.clock.move_to(self.end)
        return replace(found, seconds=self.seconds)


class Predicted:
    """Executes steps for real and says that each took what was predicted, one after the other."""

    def __init__(self, inner: Runner, predictor: Predictor, clock: VirtualClock):
        self._inner, self._predictor, self._clock, self._free = inner, predictor, clock, 0.0

    def launch(self, step: Step) -> Moved:
        seconds = self._predictor.forecast(step).seconds
        self._free = max(self._free, self._clock.now()) + seconds
        return Moved(self._inner.launch(step), self._clock, self._free, seconds)

    def close(self) -> None: ...


@dataclass
class Decided:
    """All that an engine decided, with the clock's time."""

    engine: Engine
    steps: list[Any] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine.on_step = self.records.append
        launch = self.engine.runner.launch

        def noted(step: Step) -> Pending:
            parts = [
                (part.request.id, part.request.admissions, part.request.slot, tuple(part.request.blocks), part.start,
                 part.count, part.samples, part.placeholder)
                for part in step.parts
            ]  # fmt: skip
            self.steps.append((self.engine.clock.now(), step.number, parts, [gone.id for gone in step.preempted]))
            return launch(step)

        self.engine.runner.launch = noted  # type: ignore[method-assign]

    @property
    def counts(self) -> list[tuple[Any, ...]]:
        """What the records say, without requests."""
        return [
            (one.began, one.ended, one.tokens, one.generated, one.running, one.waiting, one.used_blocks, one.preempted,
             one.queried_tokens, one.cached_tokens, [each.id for each in one.first], [each.id for each in one.finished])
            for one in self.records
        ]  # fmt: skip

    def answer(self, name: str) -> list[int]:
        request = self.requests[name]
        return request.tokens[len(request.prompt) :]


@dataclass(frozen=True)
class Asked:
    """A request that comes `at`, and its reader who goes `leaves` seconds later, unless that is 0."""

    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    priority: int = 0
    leaves: float = 0.0


def play(decided: Decided, traffic: list[Asked]) -> Decided:
    """Add and cancel each request when the clock has passed its moment, and step until all have ended."""
    engine, clock = decided.engine, decided.engine.clock
    assert isinstance(clock, VirtualClock)
    events = [(one.at, 0, index) for index, one in enumerate(traffic)]
    events += [(one.at + one.leaves, 1, index) for index, one in enumerate(traffic) if one.leaves]
    events.sort()
    while events or engine.has_work:
        while events and events[0][0] <= clock.now():
            _, going, index = events.pop(0)
            one = traffic[index]
            if going:
                decided.ends.append((clock.now(), f"r{index}", engine.cancel(f"r{index}")))
                continue
            decided.requests[f"r{index}"] = Request(f"r{index}", one.prompt, one.params, one.max_tokens, one.priority)
            engine.add(decided.requests[f"r{index}"])
        if not engine.has_work:
            if events:
                clock.move_to(events[0][0])
            continue
        for output in engine.step():
            decided.ends.append((clock.now(), output.request.id, output.request.outputs, output.finish_reason))
    engine.scheduler.check_idle()
    return decided


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    """A tiny model loaded once; engines of other sizes are made around its runner."""
    settings = EngineSettings(
        model="tiny", load_format="dummy", device="cpu", on="cloud-cpu", block_size=8, num_blocks=200, max_num_seqs=8,
        max_num_batched_tokens=CONTEXT, max_model_len=CONTEXT, seed=3,
    )  # fmt: skip
    made = wet_stand(settings, lambda text: None)
    yield made
    made.engine.runner.close()


def pair(stand: Stand, ahead: int, **changed: Any) -> tuple[Decided, Decided]:
    """A wet and a dry engine with the same scheduler's sizes."""
    assert stand.predictor is not None
    config = replace(stand.engine.scheduler.config, **changed)
    clock = VirtualClock()
    runner = Predicted(stand.engine.runner, stand.predictor, clock)
    wet = Engine(Scheduler(config), runner, clock, stand.predictor, ahead)
    dry = twin(replace(stand, engine=wet)).engine
    return Decided(wet), Decided(dry)


def traffic_of(stand: Stand, count: int, seed: int, shared: bool) -> list[Asked]:
    """Poisson arrivals, a few in the time of each decode step; prompts of all lengths, some with a common begin."""
    assert stand.predictor is not None
    draw = random.Random(seed)
    pace = stand.predictor.forecast_sizes([1] * 8, [60] * 8, 8).seconds
    begins = [tuple(draw.randrange(VOCAB) for _ in range(40)) for _ in range(3)]
    found, now = [], 0.0
    for index in range(count):
        now += draw.expovariate(1 / (3 * pace))
        begin = draw.choice(begins)[: draw.choice((8, 21, 40))] if shared and draw.random() < 0.7 else ()
        # Its number, in the first place that is its own: no prompt is the begin of another.
        own = (index, *(draw.randrange(VOCAB) for _ in range(draw.choice((0, 5, 30, 90)))))
        params = SamplingParams(
            temperature=draw.choice((0.0, 1.0)), repetition_penalty=draw.choice((1.0, 1.0, 1.3)), ignore_eos=True
        )
        leaves = draw.expovariate(1 / (20 * pace)) if draw.random() < 0.25 else 0.0
        found.append(Asked(now, begin + own, draw.randint(1, 40), params, draw.randrange(3), leaves))
    return found


CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "roomy": (False, {"enable_prefix_caching": False}),
    "chunks of 16 tokens": (False, {"enable_prefix_caching": False, "max_num_batched_tokens": 16}),
    "whole prompts": (False, {"chunked_prefill": False, "by_priority": True}),
    "tight blocks": (False, {"enable_prefix_caching": False, "num_blocks": 40}),
    "shared prefixes": (True, {}),
    "shared prefixes, tight blocks": (True, {"num_blocks": 40, "by_priority": True}),
    "shared prefixes, tight blocks, chunks": (True, {"num_blocks": 40, "max_num_batched_tokens": 24}),
}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_dry_decides_as_wet(stand: Stand, case: str, ahead: int) -> None:
    shared, changed = CASES[case]
    wet, dry = pair(stand, ahead, **changed)
    traffic = traffic_of(stand, 50, seed=len(case), shared=shared)
    play(wet, traffic)
    play(dry, traffic)
    for mine, theirs in zip(dry.steps, wet.steps):
        assert mine == theirs
    assert len(dry.steps) == len(wet.steps) > 70
    assert dry.ends == wet.ends
    assert dry.counts == wet.counts
    # The case is what its name says.
    assert any(one.running > 4 and one.waiting > 2 for one in wet.records)
    assert (sum(one.preempted for one in wet.records) > 3) == ("tight" in case)
    assert (sum(one.cached_tokens for one in wet.records) > 100) == shared
    assert sum(end[-1] is True for end in wet.ends) > 3, "too few readers left before the end"
    assert any(placeholder for step in wet.steps for *_, placeholder in step[2]) == bool(ahead)
    # The wet answers are a model's, the dry ones are not.
    assert len({token for name in wet.requests for token in wet.answer(name)}) > 100
    assert {token for name in dry.requests for token in dry.answer(name)} == {0}


@pytest.mark.parametrize("ahead", [0, 1])
def test_equal_prompts_with_equal_answers(stand: Stand, ahead: int) -> None:
    draw = random.Random(1)
    kinds = [tuple(draw.randrange(VOCAB) for _ in range(30)) for _ in range(4)]
    assert stand.predictor is not None
    pace = stand.predictor.forecast_sizes([1] * 8, [60] * 8, 8).seconds
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    traffic = [Asked(2 * pace * index, draw.choice(kinds), 30, greedy) for index in range(40)]
    wet, dry = pair(stand, ahead, num_blocks=36)
    play(wet, traffic)
    play(dry, traffic)
    assert dry.steps == wet.steps and dry.ends == wet.ends
    assert sum(one.preempted for one in wet.records) and sum(one.cached_tokens for one in wet.records)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_dry_conversation_finds_its_prompts_alone(stand: Stand, ahead: int) -> None:
    """The second turn holds the first answer, which only a wet cache has: a dry run computes it again."""
    first = tuple(range(32))
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    wet, dry = pair(stand, ahead)
    play(wet, [Asked(0.0, first, 33, params)])
    answer = tuple(wet.answer("r0"))
    later = Asked(wet.engine.clock.now(), first + answer + (1, 2, 3), 5, params)
    play(dry, [Asked(0.0, first, 33, params)])
    found = []
    for decided in (wet, dry):
        decided.records.clear()
        decided.requests["r1"] = Request("r1", later.prompt, params, 5)
        decided.engine.add(decided.requests["r1"])
        while decided.engine.has_work:
            decided.engine.step()
        found.append(sum(one.cached_tokens for one in decided.records))
    # 32 + 33 tokens, of which the last was never fed to the model.
    assert found == [64, 32]


def told_of_8b(capsys: pytest.CaptureFixture[str], count: int, most: int, *more: str) -> dict[str, Any]:
    """What `rooflight bench serve --dry` says of Llama-3.1-8B on an H200 at that many requests."""
    lengths = ("--random-input-len", "100:1024", "--random-output-len", f"20:{most}", "--ignore-eos")
    asked = ("--model", "llama-3.1-8b", "--dry", "--on", "h200", "--num-prompts", str(count), *lengths, "-o", "json")
    assert main(["bench", "serve", *asked, *more]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert (found["completed"], found["failed"]) == (count, 0)
    assert 100 * count <= found["total_input_tokens"] <= 1024 * count
    assert 20 * count <= found["total_output_tokens"] <= most * count
    # No step is faster than the weights are read, all but the embedding's 128,256 · 4,096, at 4.8 TB/s.
    floor = 1e3 * 2 * (8.03e9 - 128256 * 4096) / 4.8e12
    assert floor < found["median_itl_ms"]
    # Nor the run than its products, 2 a weight and token, at 989 TFLOP/s.
    assert found["duration"] > 2 * 7.5e9 * found["total_input_tokens"] / 989e12
    if not more:
        assert found["median_itl_ms"] > 2 * floor
    return found


def test_requests_of_8b_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = told_of_8b(capsys, 40, 300, "--request-rate", "2")
    # Hardly anybody meets anybody: a prompt goes at once, and a token takes little more than the weights' reading.
    assert found["median_itl_ms"] < 6 and found["mean_ttft_ms"] < 60
    assert found["duration"] >= 20


@pytest.mark.slow
def test_a_thousand_requests_of_8b_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen on 2 cores that others used too: 6.5 s each for some 520,000 tokens of output."""
    everybody = told_of_8b(capsys, 1000, 1024)
    steady = told_of_8b(capsys, 1000, 1024, "--request-rate", "20")
    assert steady["duration"] >= 50 > everybody["duration"]
    assert steady["mean_ttft_ms"] < everybody["mean_ttft_ms"]
