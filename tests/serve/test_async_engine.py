"""`AsyncEngine`: what coroutines get is what `LLM` gives, however some of them end, and nothing is left of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rooflight.errors import EngineDead, InvalidValue, QueueFull
from rooflight.serve.async_engine import AsyncEngine
from rooflight.serve.llm import LLM
from rooflight.serve.outputs import Delta
from rooflight.serve.params import SamplingParams, Structured
from rooflight.serve.settings import EngineSettings
from rooflight.serve.step import Pending, Step
from tests.serve.checkpoints import CONTEXT, VOCAB, checkpoint, text

SETTINGS: dict[str, Any] = {"device": "cpu", "num_blocks": 160, "block_size": 8, "on": "cloud-cpu"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
SECONDS = 30


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    made = LLM(str(directory), **SETTINGS)
    yield made
    made.close()


class Gate:
    """A runner whose launches pass one by one, as `let` allows, until `open`; it fails at the launch that is told."""

    def __init__(self, inner: Any):
        self.inner, self.fails_at, self.launched = inner, 0, 0
        self._free, self._passes = threading.Event(), threading.Semaphore(0)

    def launch(self, step: Step) -> Pending:
        if not self._free.is_set():
            assert self._passes.acquire(timeout=SECONDS)
        self.launched += 1
        if self.launched == self.fails_at:
            raise RuntimeError("the device is on fire")
        return self.inner.launch(step)

    def let(self, steps: int) -> None:
        self._passes.release(steps)

    def open(self) -> None:
        self._free.set()
        self._passes.release()

    def close(self) -> None:
        self.inner.close()


def serve(
    directory: Path, body: Callable[[AsyncEngine, Gate], Awaitable[None]], max_queue: int = 4096, **settings: Any
) -> None:
    """Run `body` beside an engine; afterwards nothing may be left in it."""

    async def run() -> None:
        engine = AsyncEngine.from_settings(
            EngineSettings(model=str(directory), **{**SETTINGS, **settings}), max_queue=max_queue
        )
        gate = Gate(engine.engine.runner)
        engine.engine.runner = gate
        await engine.start()
        try:
            async with asyncio.timeout(SECONDS):
                await body(engine, gate)
        finally:
            gate.open()
            await engine.stop()
        assert not engine.unfinished and not engine._inbox
        if not engine.errored:
            engine.engine.scheduler.check_idle()
            assert not engine.engine.has_work
        assert not any(thread.name == "rooflight-engine" for thread in threading.enumerate())

    asyncio.run(run())


async def until(holds: Callable[[], Any]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


async def all_of(engine: AsyncEngine, prompt: list[int], params: SamplingParams, name: str) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt, params, name)]


async def fails(kind: type[Exception], words: str, call: Awaitable[Any]) -> None:
    with pytest.raises(kind, match=words):
        await call


def ids(seed: int, count: int = 9) -> list[int]:
    return [(seed * 31 + place * 7) % VOCAB for place in range(count)]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_many_at_once_get_what_the_llm_gives(mode: str, llm: LLM, directory: Path) -> None:
    kinds = [
        GREEDY,
        SamplingParams(seed=1, max_tokens=30, n=3),
        SamplingParams(seed=2, max_tokens=60, stop=("e", "ar")),
        SamplingParams(seed=3, max_tokens=9, logprobs=2, prompt_logprobs=1),
        SamplingParams(seed=4, max_tokens=40, structured=Structured("regex", "[a-f]{2,9}!")),
        SamplingParams(seed=5, max_tokens=25, repetition_penalty=1.5, min_tokens=5),
    ]
    assert llm.tokenizer is not None
    prompts = [llm.tokenizer.encode(text(2 + index % 9, index)) for index in range(36)]
    asked = [kinds[index % len(kinds)] for index in range(36)]
    expected = llm.generate(prompts, asked)
    vectors = llm.embed(prompts[:6])

    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.open()
        calls = [engine.complete(prompt, own, f"r{index}") for index, (prompt, own) in enumerate(zip(prompts, asked))]
        embeds = [engine.embed(prompt, f"e{index}") for index, prompt in enumerate(prompts[:6])]
        found = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*embeds))
        for mine, theirs in zip(found[0], expected, strict=True):
            assert mine.prompt_token_ids == theirs.prompt_token_ids
            for output, wanted in zip(mine.outputs, theirs.outputs, strict=True):
                assert (output.index, output.text, output.token_ids) == (wanted.index, wanted.text, wanted.token_ids)
                assert output.finish_reason == wanted.finish_reason and output.stop_reason == wanted.stop_reason
                assert (output.logprobs is None) == (wanted.logprobs is None)
                assert [one.token for one in output.logprobs or ()] == [one.token for one in wanted.logprobs or ()]
                assert [one.logprob for one in output.logprobs or ()] == pytest.approx(
                    [one.logprob for one in wanted.logprobs or ()], abs=1e-4
                )
            assert (mine.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
            assert len(mine.prompt_logprobs or ()) == len(theirs.prompt_logprobs or ())
        for mine, theirs in zip(found[1], vectors, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        stopped = [output for result in expected[2::6] for output in result.outputs if output.stop_reason]
        assert stopped, "no stop text ended anything"
        assert {output.finish_reason for result in expected for output in result.outputs} == {"stop", "length"}

    serve(directory, body, async_scheduling=mode)


def test_tokens_come_as_they_are_made(directory: Path) -> None:
    async def body(engine: AsyncEngine, gate: Gate) -> None:
        stream = engine.generate(ids(1), GREEDY, "a")
        for step in range(1, 4):
            gate.let(1)
            delta = await anext(stream)
            assert (gate.launched, len(delta.token_ids), delta.finish_reason) == (step, 1, None)
        gate.open()
        rest = [delta async for delta in stream]
        assert sum(len(delta.token_ids) for delta in rest) == 13
        assert rest[-1].finish_reason == "length"

    serve(directory, body)


def test_a_reader_that_stops_reading_delays_nobody(directory: Path, llm: LLM) -> None:
    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.open()
        idle = engine.generate(ids(1), replace(LONG, logprobs=0), "idle")
        first = await anext(idle)
        others = await asyncio.gather(*(engine.complete(ids(seed), GREEDY, f"r{seed}") for seed in range(2, 60)))
        assert all(output.finished for output in others)
        await until(lambda: not engine.unfinished)
        rest = [delta async for delta in idle]
        # What had piled up is one delta, and whole.
        assert len(rest) == 1
        wanted = llm.generate(ids(1), LONG)[0].outputs[0]
        assert first.token_ids + rest[0].token_ids == wanted.token_ids
        assert first.text + rest[0].text == wanted.text
        assert [one.token for one in rest[0].logprobs or ()] == rest[0].token_ids
        assert rest[0].finish_reason == "length"

    serve(directory, body)


def test_news_that_pile_up_are_kept_apart_by_completion(directory: Path, llm: LLM) -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=40)

    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.open()
        stream = engine.generate(ids(4), params, "a")
        found: dict[int, list[int]] = {}
        delta = await anext(stream)
        await until(lambda: not engine.unfinished)
        found.setdefault(delta.index, []).extend(delta.token_ids)
        count = 0
        async for delta in stream:
            found.setdefault(delta.index, []).extend(delta.token_ids)
            count += 1
        assert count <= 2 * 4
        assert found == {output.index: output.token_ids for output in llm.generate(ids(4), params)[0].outputs}

    serve(directory, body)


# By how many steps have been launched: none, half of the prompt, all of it, some tokens, nearly all of them.
GOING = [("task", steps) for steps in (0, 1, 2, 8)] + [("close", 21)]
GOING += [("embed", steps) for steps in (0, 1)]


@pytest.mark.parametrize(("how", "steps"), GOING)
@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_reader_that_goes_cancels_its_request(mode: str, how: str, steps: int, directory: Path, llm: LLM) -> None:
    """At any phase; its neighbour's tokens stay what they are, and its blocks and its slot are free."""
    wanted = llm.generate(ids(2), GREEDY)[0].outputs[0].token_ids
    params = SamplingParams(n=2, max_tokens=20, ignore_eos=True, seed=1)

    async def body(engine: AsyncEngine, gate: Gate) -> None:
        neighbour = asyncio.ensure_future(engine.complete(ids(2), GREEDY, "neighbour"))
        stream = engine.generate(ids(1, 60), params, "a")
        call = {
            "task": engine.complete,
            "close": lambda *_: anext(stream),
            "embed": lambda *_: engine.embed(ids(1, 150), "a"),
        }[how]
        going = asyncio.ensure_future(call(ids(1, 60), params, "a"))
        await asyncio.sleep(0.01)
        if steps:
            gate.let(steps)
        await until(lambda: gate.launched == steps)
        if how == "close":
            assert (await going).token_ids
            await stream.aclose()
        else:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
        assert engine.unfinished <= 1
        gate.open()
        assert (await neighbour).outputs[0].token_ids == wanted
        await until(lambda: not engine.engine.has_work)
        # Long before the 20th token that the one who went would have had.
        assert gate.launched < max(steps, 16) + 4
        assert engine.engine.scheduler.pool.used == 0
        ended = {one.id: one.finish_reason for record in engine.recent for one in record.finished}
        assert ended.pop("neighbour") == "length"
        assert steps > 8 or set(ended.values()) == {"abort"}

    serve(directory, body, max_num_batched_tokens=40, async_scheduling=mode)


def test_a_drain_lets_requests_end_and_takes_no_more(directory: Path, llm: LLM) -> None:
    wanted = llm.generate(ids(1), LONG)[0].outputs[0].token_ids

    async def body(engine: AsyncEngine, gate: Gate) -> None:
        running = asyncio.ensure_future(engine.complete(ids(1), LONG, "a"))
        vector = asyncio.ensure_future(engine.embed(ids(2), "b"))
        await asyncio.sleep(0.01)
        stop = asyncio.ensure_future(engine.stop(SECONDS))
        await asyncio.sleep(0.01)
        await fails(EngineDead, "shutting down", engine.complete(ids(1), GREEDY, "c"))
        await fails(EngineDead, "shutting down", engine.embed(ids(1), "d"))
        assert not stop.done()
        gate.open()
        await stop
        assert (await running).outputs[0].token_ids == wanted
        assert len(await vector) == llm.config.width
        # The thread has ended, and being told twice is no error.
        await engine.stop()

    serve(directory, body)


def test_what_has_not_ended_in_time_hears_of_it(directory: Path) -> None:
    async def body(engine: AsyncEngine, gate: Gate) -> None:
        calls = [engine.complete(ids(1), LONG, "a"), engine.complete(ids(1), replace(LONG, temperature=1.0, n=3), "b")]
        running = [asyncio.ensure_future(call) for call in (*calls, engine.embed(ids(3), "c"))]
        await asyncio.sleep(0.01)
        stop = asyncio.ensure_future(engine.stop(0.05))
        for one in running:
            await fails(EngineDead, "shutting down", one)
        gate.open()
        await stop

    serve(directory, body)


def test_an_engine_that_never_started_can_be_stopped(directory: Path) -> None:
    engine = AsyncEngine.from_settings(EngineSettings(model=str(directory), **SETTINGS))
    asyncio.run(engine.stop())


def test_more_than_may_wait_are_refused(directory: Path) -> None:
    async def body(engine: AsyncEngine, gate: Gate) -> None:
        first = asyncio.ensure_future(engine.complete(ids(1), GREEDY, "a"))
        await asyncio.sleep(0.01)
        gate.let(1)
        await until(lambda: gate.launched == 1)
        # One runs, in the only slot. Of three that may wait two come.
        pair = asyncio.ensure_future(engine.complete(ids(2), replace(GREEDY, temperature=1.0, n=2), "b"))
        await asyncio.sleep(0.01)
        await fails(
            QueueFull, "2 requests wait and 3 may", engine.complete(ids(2), replace(GREEDY, temperature=1.0, n=2), "c")
        )
        last = asyncio.ensure_future(engine.embed(ids(3), "d"))
        await asyncio.sleep(0.01)
        await fails(QueueFull, "3 requests wait and 3 may", engine.embed(ids(3), "e"))
        gate.open()
        await asyncio.gather(first, pair, last)
        assert (await engine.complete(ids(4), GREEDY, "f")).finished

    serve(directory, body, max_queue=3, max_num_seqs=1)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_when_a_step_fails_everybody_hears_of_it(mode: str, directory: Path) -> None:
    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.fails_at = 4
        calls = [engine.complete(ids(seed), LONG, f"r{seed}") for seed in range(6)]
        running = [asyncio.ensure_future(call) for call in (*calls, engine.embed(ids(9, 90), "e"))]
        await asyncio.sleep(0.01)
        gate.open()
        for one in running:
            await fails(EngineDead, "the engine has stopped: the device is on fire", one)
        assert engine.errored and not engine.unfinished
        await fails(EngineDead, "on fire", engine.complete(ids(1), GREEDY, "late"))
        await fails(EngineDead, "on fire", engine.embed(ids(1), "late"))

    serve(directory, body, max_num_batched_tokens=16, async_scheduling=mode)


def test_a_grammar_that_is_compiled_while_the_engine_stops(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that waits for it must hear of the stop, instead of waiting for ever."""
    compiling, go_on = threading.Event(), threading.Event()

    def slow(grammars: Any, params: SamplingParams) -> None:
        compiling.set()
        assert go_on.wait(SECONDS)

    monkeypatch.setattr("rooflight.serve.async_engine.check_structured", slow)

    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.open()
        call = engine.complete(ids(1), replace(GREEDY, structured=Structured("json")), "a")
        waiting = asyncio.ensure_future(call)
        await until(compiling.is_set)
        await engine.stop()
        go_on.set()
        await fails(EngineDead, "shutting down", waiting)

    serve(directory, body)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(directory: Path, llm: LLM) -> None:
    wanted = llm.generate([ids(1), ids(2)], GREEDY)
    vector = llm.embed(ids(3))[0]
    pair = replace(GREEDY, temperature=1.0, n=2, seed=1)

    async def body(engine: AsyncEngine, gate: Gate) -> None:
        calls = [
            engine.complete(ids(1), GREEDY, "a"),
            engine.complete(ids(2), GREEDY, "b-1"),
            engine.embed(ids(3), "c"),
        ]
        owners = [asyncio.ensure_future(call) for call in calls]
        two = asyncio.ensure_future(engine.complete(ids(4), pair, "d"))
        await asyncio.sleep(0.01)
        for name in ("a", "b-1", "c", "d-0", "d-1"):
            await fails(InvalidValue, f"request id '{name}' is in use", engine.complete(ids(5), GREEDY, name))
            await fails(InvalidValue, f"request id '{name}' is in use", engine.embed(ids(5), name))
        await fails(InvalidValue, "'b-1' is in use", engine.complete(ids(5), pair, "b"))
        gate.open()
        first, second, embedded = await asyncio.gather(*owners)
        assert [first.outputs[0].token_ids, second.outputs[0].token_ids] == [
            result.outputs[0].token_ids for result in wanted
        ]
        assert embedded == pytest.approx(vector, abs=1e-5)
        assert (await two).finished
        # Free again.
        assert (await engine.complete(ids(1), GREEDY, "a")).finished

    serve(directory, body)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_an_id_that_is_used_again_hears_nothing_of_its_past(mode: str, directory: Path, llm: LLM) -> None:
    """News of the cancelled request are on their way to the loop while the next one takes its id."""
    wanted = llm.generate(ids(7), GREEDY)[0].outputs[0].token_ids

    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.open()
        for turn in range(20):
            stream = engine.generate(ids(turn), LONG, "a")
            await anext(stream)
            before = gate.launched
            # The loop does not run while the engine's thread makes more.
            while gate.launched < before + 5 + turn % 3:
                time.sleep(0.0005)
            await stream.aclose()
            assert (await engine.complete(ids(7), GREEDY, "a")).outputs[0].token_ids == wanted

    serve(directory, body, async_scheduling=mode)


def test_what_cannot_be_run_is_told_and_leaves_nothing(directory: Path) -> None:
    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.open()
        for prompt, params, words in (
            ([], GREEDY, "an empty prompt"),
            ([VOCAB], GREEDY, f"token {VOCAB} is outside"),
            ([1] * CONTEXT, GREEDY, "exceed the longest context"),
            ([1], SamplingParams(temperature=-1.0), "temperature -1.0"),
            ([1], SamplingParams(structured=Structured("regex", "a(")), "the regex"),
        ):
            await fails(InvalidValue, words, engine.complete(prompt, params, "a"))
            assert not engine.unfinished
        for prompt in ([], [VOCAB], [1] * (CONTEXT + 1)):
            await fails(InvalidValue, "prompt|token", engine.embed(prompt, "a"))
            assert not engine.unfinished
        assert gate.launched == 0
        assert (await engine.complete([1], GREEDY, "a")).finished

    serve(directory, body)


def test_listeners_hear_of_each_step(directory: Path) -> None:
    async def body(engine: AsyncEngine, gate: Gate) -> None:
        gate.open()
        records: list[Any] = []
        engine.add_listener(records.append)
        done = await asyncio.gather(*(engine.complete(ids(seed), GREEDY, f"r{seed}") for seed in range(5)))
        await until(lambda: not engine.engine.has_work)
        assert [record.number for record in records] == list(range(1, gate.launched + 1))
        assert list(engine.recent) == records
        assert sum(record.generated for record in records) == sum(len(one.outputs[0].token_ids) for one in done)
        assert sorted(request.id for record in records for request in record.finished) == [f"r{n}" for n in range(5)]

    serve(directory, body)
