"""The API in front of the real engine with a small random model; what `LLM` answers is the oracle."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from openai import APIError, OpenAI

from rooflight.serve.api.app import build_app
from rooflight.serve.api.server import Server, address_of, listen
from rooflight.serve.async_engine import AsyncEngine
from rooflight.serve.llm import LLM
from rooflight.serve.params import SamplingParams
from rooflight.serve.settings import EngineSettings, ServerSettings

SETTINGS: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "num_blocks": 256, "on": "cloud-cpu"}
PROMPTS = [[10, 20, 30, 40], [5], list(range(50, 90))]


@pytest.fixture(scope="module")
def engine() -> AsyncEngine:
    return AsyncEngine.from_settings(EngineSettings(model="tiny", **SETTINGS), max_queue=64)


@pytest.fixture(scope="module")
def url(engine: AsyncEngine) -> Iterator[str]:
    settings = ServerSettings(port=0, disable_log_requests=True)
    bound = listen(settings)
    server = Server(build_app(engine, settings))
    ready, loops = threading.Event(), []

    async def work() -> None:
        loops.append(asyncio.get_running_loop())
        await engine.start()
        await server.run_on(bound, lambda text: ready.set())

    thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield address_of(bound)
    asyncio.run_coroutine_threadsafe(server.end(), loops[0]).result(20)
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    found = LLM("tiny", **SETTINGS)
    yield found
    found.close()


def test_greedy_tokens_are_those_of_the_llm(client: OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    expected = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    extra = {"ignore_eos": True, "return_token_ids": True}
    asked: Any = {"model": "tiny", "prompt": PROMPTS, "max_tokens": 12, "temperature": 0, "extra_body": extra}
    choices = client.completions.create(**asked).choices
    assert [(choice.model_extra or {})["token_ids"] for choice in choices] == [each.token_ids for each in expected]
    assert [choice.text for choice in choices] == [each.text for each in expected]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [each.text for each in expected]


def test_scores_of_a_prompt_do_not_change_when_it_is_cached(client: OpenAI) -> None:
    found = []
    for max_tokens in (0, 1, 0):
        choices = client.completions.create(
            model="tiny", prompt=PROMPTS, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0
        ).choices
        scores = []
        for prompt, choice in zip(PROMPTS, choices):
            assert choice.logprobs is not None
            assert len(choice.logprobs.token_logprobs or []) == len(prompt) + max_tokens
            scores.append((choice.logprobs.token_logprobs or [])[: len(prompt)])
        found.append(scores)
    for scores in found[1:]:
        for mine, first in zip(scores, found[0]):
            assert mine[0] is None
            assert mine[1:] == pytest.approx(first[1:], abs=1e-5)


def test_structured_output_and_its_errors(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    structured: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(4):
        asked: Any = {"model": "tiny", "prompt": "x", "seed": seed, "max_tokens": 200}
        answer = client.completions.create(**asked, extra_body={"response_format": structured})
        if answer.choices[0].finish_reason == "stop":
            assert json.loads(answer.choices[0].text)["a"] in (1, 22)
        texts = ["a.b|c (d)", 'quote " and \\', "line\nend"]
        answer = client.completions.create(**asked, extra_body={"guided_choice": texts})
        assert answer.choices[0].text in texts
        answer = client.completions.create(**asked, extra_body={"guided_regex": "[a-c]{3,5}!"})
        assert re.fullmatch("[a-c]{3,5}!", answer.choices[0].text)
    with pytest.raises(APIError, match="regex") as caught:
        client.completions.create(model="tiny", prompt="x", extra_body={"guided_regex": "a("})
    assert caught.value.type == "invalid_request_error"


def test_embeddings_are_those_of_the_llm(client: OpenAI, llm: LLM) -> None:
    found = client.embeddings.create(model="tiny", input=PROMPTS, encoding_format="float")
    for entry, expected in zip(found.data, llm.embed(PROMPTS)):
        assert entry.embedding == pytest.approx(expected, abs=1e-5)


def test_a_client_that_goes_frees_its_blocks(engine: AsyncEngine, url: str, client: OpenAI) -> None:
    for stream in (True, False):
        body = json.dumps(
            {"prompt": [[1, 2, 3], [4]], "max_tokens": 250, "n": 2, "stream": stream, "ignore_eos": True}
        ).encode()
        fields = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10) as raw:
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body)
            if stream:
                assert raw.recv(10)
        # A small request behind it is served, and then nothing is left.
        assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices
        deadline = threading.Event()
        for _ in range(500):
            if not engine.unfinished and not engine.engine.has_work:
                break
            deadline.wait(0.01)
        assert engine.unfinished == 0
        assert engine.engine.scheduler.pool.used == 0


def test_more_than_the_queue_holds_is_429(client: OpenAI) -> None:
    # 64 run and 64 may wait.
    with pytest.raises(APIError, match="requests wait") as caught:
        client.completions.create(model="tiny", prompt=["x"] * 250, max_tokens=200, extra_body={"ignore_eos": True})
    assert getattr(caught.value, "status_code", None) == 429
    assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices
