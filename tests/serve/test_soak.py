"""Hundreds of requests through one `AsyncEngine`, a third of whose readers go: the others' answers stay right, and
nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rooflight.serve.async_engine import AsyncEngine, _Stream
from rooflight.serve.detokenize import Detokenizer
from rooflight.serve.engine import StepRecord
from rooflight.serve.llm import LLM
from rooflight.serve.outputs import Completion, Delta, RequestOutput
from rooflight.serve.params import SamplingParams, Structured
from rooflight.serve.request import Request
from rooflight.serve.settings import EngineSettings
from rooflight.serve.structured import Matcher
from tests.serve.checkpoints import checkpoint, text

# More readers than slots, and fewer blocks than these could fill: some wait, some are preempted.
READERS, MOST_TOKENS = 24, 30
SETTINGS: dict[str, Any] = {
    "device": "cpu", "on": "cloud-cpu", "block_size": 8, "num_blocks": 36, "max_num_seqs": 8,
    "max_num_batched_tokens": 32, "max_model_len": 160,
}  # fmt: skip
KINDS = [
    SamplingParams(temperature=0.0, max_tokens=MOST_TOKENS),
    SamplingParams(seed=1, max_tokens=12, n=3),
    SamplingParams(seed=2, max_tokens=MOST_TOKENS, stop=("e", "ou", " ")),
    SamplingParams(seed=3, max_tokens=10, logprobs=2, prompt_logprobs=0),
    SamplingParams(seed=4, max_tokens=20, structured=Structured("regex", "[a-f]{2,9}!")),
    SamplingParams(seed=5, max_tokens=MOST_TOKENS, frequency_penalty=0.5, top_k=40, ignore_eos=True),
]


@dataclass
class Question:
    """What may be asked, and the answer that nobody else's requests may change."""

    prompt: list[int]
    params: SamplingParams | None
    answer: Any


def told(output: RequestOutput) -> Any:
    return [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("soak") / "model")


@pytest.fixture(scope="module")
def questions(directory: Path) -> list[Question]:
    llm = LLM(str(directory), **SETTINGS)
    assert llm.tokenizer is not None
    begin = text(8, 99)
    # Some begin alike, and some take several steps to be read.
    prompts = [
        llm.tokenizer.encode((begin if seed % 2 else "") + text((2, 9, 25)[seed % 3], seed))[:100] for seed in range(30)
    ]
    asked = [KINDS[index % len(KINDS)] for index in range(len(prompts))]
    found = [Question(prompt, params, told(llm.generate(prompt, params)[0])) for prompt, params in zip(prompts, asked)]
    found += [Question(prompt, None, llm.embed(prompt)[0]) for prompt in prompts[:6]]
    llm.close()
    return found


def alive() -> Counter[str]:
    """How many objects there are of the kinds that a request brings."""
    gc.collect()
    kinds = (Request, Completion, RequestOutput, Delta, Detokenizer, StepRecord, Matcher, _Stream)
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, kinds))


@dataclass
class Soak:
    """Readers of one engine; `seen` counts what became of them."""

    engine: AsyncEngine
    questions: list[Question]
    draw: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    before: Counter[str] = field(default_factory=lambda: alive())
    number: int = 0

    def __post_init__(self) -> None:
        self.engine.add_listener(lambda record: self.seen.update(preempted=record.preempted, steps=1))

    async def ask(self, count: int) -> None:
        """Let so many readers come, some of whom go early, and wait until the last has what he wants."""
        room = asyncio.Semaphore(READERS)
        tasks = []
        for _ in range(count):
            await room.acquire()
            task = asyncio.ensure_future(self._read())
            task.add_done_callback(lambda _: room.release())
            tasks.append(task)
            if len(tasks) % 50 == 0:
                tasks = [task for task in tasks if not task.done() or task.result()]
        await asyncio.gather(*tasks)
        while self.engine.engine.has_work or self.engine.unfinished:
            await asyncio.sleep(0.001)

    async def _read(self) -> None:
        question, name = self.draw.choice(self.questions), f"r{self.number}"
        self.number += 1
        going = self.draw.choice(("at once", "soon", "after news")) if self.draw.random() < 1 / 3 else ""
        if question.params is None:
            call: Any = self._embed(question, name)
        elif going == "after news":
            call = self._read_some(question, question.params, name)
        else:
            call = self._read_all(question, question.params, name)
        task = asyncio.ensure_future(call)
        if going in ("at once", "soon"):
            await asyncio.sleep(0.0 if going == "at once" else self.draw.random() * 0.05)
            if not task.done():
                self.seen[going] += 1
            task.cancel()
        await asyncio.gather(task, return_exceptions=going != "")

    async def _read_all(self, question: Question, params: SamplingParams, name: str) -> None:
        assert told(await self.engine.complete(question.prompt, params, name)) == question.answer
        self.seen["answered"] += 1

    async def _embed(self, question: Question, name: str) -> None:
        assert await self.engine.embed(question.prompt, name) == pytest.approx(question.answer, abs=1e-5)
        self.seen["embedded"] += 1

    async def _read_some(self, question: Question, params: SamplingParams, name: str) -> None:
        left = self.draw.randint(1, MOST_TOKENS)
        stream = self.engine.generate(question.prompt, params, name)
        async for _ in stream:
            left -= 1
            if not left:
                break
        await stream.aclose()
        self.seen["after news"] += 1

    def check_nothing_is_left(self) -> None:
        engine, scheduler = self.engine, self.engine.engine.scheduler
        assert not engine._completions and not engine._embeddings and not engine._inbox
        assert not scheduler._requests and not scheduler._waiting and not scheduler.running
        scheduler.check_idle()
        assert scheduler.pool.used == 0 and sorted(scheduler._slots) == list(range(SETTINGS["max_num_seqs"]))
        assert len(asyncio.all_tasks()) == 1
        engine.recent.clear()
        left = alive() - self.before
        # A slot keeps the matcher of its last tenant, and the engine's thread the outputs of its last step.
        for kept in ("Matcher", "Request"):
            assert left.pop(kept, 0) <= SETTINGS["max_num_seqs"]
        assert not left


def held_bytes() -> int:
    """Bytes of Python's objects, without what the predictor remembers of sizes, up to a limit of its own."""
    filters = [tracemalloc.Filter(False, f"*/rooflight/{room}/*") for room in ("hardware", "workload")]
    snapshot = tracemalloc.take_snapshot().filter_traces(filters)
    return sum(trace.size for trace in snapshot.traces)


async def soak(directory: Path, questions: list[Question], first: int, more: int) -> Soak:
    """`first` requests, then `more`, after which no more memory is in use."""
    settings = EngineSettings(model=str(directory), **SETTINGS)
    engine = await AsyncEngine.from_settings(settings).start()
    found = Soak(engine, questions, random.Random(first))
    try:
        await found.ask(first)
        found.check_nothing_is_left()
        tracemalloc.start()
        await found.ask(first)
        found.check_nothing_is_left()
        before = held_bytes()
        await found.ask(more)
        found.check_nothing_is_left()
        # A request that stayed would be kilobytes; what grows by itself are the tables of dictionaries and the like.
        assert held_bytes() - before < 120_000 + 20 * more
    finally:
        tracemalloc.stop()
        await engine.stop()
    assert found.seen["answered"] > (2 * first + more) / 3
    assert all(found.seen[kind] for kind in ("embedded", "at once", "soon", "after news", "preempted"))
    return found


def test_two_hundred_requests(directory: Path, questions: list[Question]) -> None:
    asyncio.run(soak(directory, questions, 50, 100))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_two_thousand_requests(directory: Path, questions: list[Question], seed: int) -> None:
    found = asyncio.run(soak(directory, questions, 250, 1500))
    assert found.number == 2000
    # Some go before they are admitted, some while their prompt is read, some in the midst of the answer.
    assert min(found.seen[kind] for kind in ("at once", "soon", "after news")) > 50


def test_readers_that_sleep_delay_nobody(directory: Path, questions: list[Question]) -> None:
    """As many as there are slots take one piece of news each and then nothing, until all others have their answers."""

    async def run() -> None:
        engine = await AsyncEngine.from_settings(EngineSettings(model=str(directory), **SETTINGS)).start()
        asked = [one for one in questions if one.params is not None][: SETTINGS["max_num_seqs"]]
        streams = []
        for index, one in enumerate(asked):
            assert one.params is not None
            streams.append(engine.generate(one.prompt, one.params, f"sleeper-{index}"))
        first = [await anext(stream) for stream in streams]
        found = Soak(engine, questions, random.Random(7))
        await found.ask(40)
        for one, begin, stream in zip(asked, first, streams):
            rest = [begin, *[delta async for delta in stream]]
            for index, (whole, ids, reason, stop) in enumerate(one.answer):
                own = [delta for delta in rest if delta.index == index]
                assert "".join(delta.text for delta in own) == whole
                assert [token for delta in own for token in delta.token_ids] == ids
                assert (own[-1].finish_reason, own[-1].stop_reason) == (reason, stop)
        await engine.stop()

    asyncio.run(run())
