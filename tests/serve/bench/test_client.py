"""The HTTP client against a scripted server: what it sends, what it counts, and every way to fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from rooflight.errors import InvalidValue, RooflightError
from rooflight.serve.bench.client import Client
from rooflight.serve.bench.play import News, play
from rooflight.serve.bench.settings import EndpointSettings
from rooflight.serve.bench.statistics import Outcome
from rooflight.serve.bench.traffic import Arrival

CHAT = "/v1/chat/completions"


class Server:
    """An OpenAI server that answers what its script says, and keeps what it was sent."""

    def __init__(self, script: Callable[[dict[str, Any]], list[Any]], status: int = 200, body: str = ""):
        self.script, self.status, self.body = script, status, body
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.running = self.most = 0

    async def models(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        if self.status in (401, 503):
            return web.Response(status=self.status)
        return web.json_response({"data": [{"id": "served"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.Response(status=self.status, text=self.body)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        self.running += 1
        self.most = max(self.most, self.running)
        for piece in self.script(body):
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                await answer.write((piece if isinstance(piece, str) else f"data: {json.dumps(piece)}\n\n").encode())
        self.running -= 1
        return answer


def against(server: Server, act: Callable[[str], Awaitable[Any]]) -> Any:
    """What `act` gives, told the address at which the server listens."""

    async def whole() -> Any:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/completions", server.complete)
        app.router.add_post(CHAT, server.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            return await act(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    return asyncio.run(whole())


def ran(server: Server, arrivals: list[Arrival], concurrency: int = 0, **given: Any) -> list[Outcome]:
    async def act(url: str) -> list[Outcome]:
        endpoint = EndpointSettings(base_url=url, **given).check()
        async with Client(endpoint, "", 0.5, ignore_eos=True) as client:
            await client.find_model()
            return (await play(client, arrivals, concurrency))[0]

    return against(server, act)


def text(word: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": word, "finish_reason": reason}], "usage": None}


def plain(body: dict[str, Any]) -> list[Any]:
    count = body["max_tokens"]
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
    pieces: list[Any] = [": ping\n\n", *(text("a") for _ in range(count - 1)), text("", "length")]
    return [*pieces, {"choices": [], "usage": usage}, "data: [DONE]\n\n"]


def test_what_is_sent_and_counted() -> None:
    server = Server(plain)
    found = ran(server, [Arrival(0, (4, 5, 6), 3), Arrival(1, (7,), 1)], api_key="secret")
    assert server.keys == ["Bearer secret"]
    assert server.bodies[0] == {
        "model": "served",
        "prompt": [4, 5, 6],
        "max_tokens": 3,
        "temperature": 0.5,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [(each.prompt_tokens, each.output_tokens, len(each.itls), each.error) for each in found] == [
        (3, 3, 2, ""), (1, 1, 0, "")
    ]  # fmt: skip
    for each in found:
        assert 0.0 < each.ttft <= each.latency
        assert each.latency == pytest.approx(each.ttft + sum(each.itls))


def test_times_follow_the_news() -> None:
    """A wait of 0.2 s before the first token and of 0.1 s before the second is seen where it was."""

    def slow(body: dict[str, Any]) -> list[Any]:
        return [0.2, text("a"), 0.1, text("b", "stop")]

    outcome = ran(Server(slow), [Arrival(0, (1,), 2)])[0]
    assert outcome.ttft >= 0.19
    assert len(outcome.itls) == 1 and outcome.itls[0] >= 0.09
    assert outcome.output_tokens == 2


def test_the_servers_count_is_right() -> None:
    def bundled(body: dict[str, Any]) -> list[Any]:
        return [
            text("ab"),
            text("cd", "length"),
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}},
        ]

    outcome = ran(Server(bundled), [Arrival(0, (), 4, text="ab")])[0]
    assert (outcome.output_tokens, outcome.prompt_tokens, len(outcome.itls)) == (4, 9, 1)


def test_token_ids_are_counted_where_they_are_told() -> None:
    def told(body: dict[str, Any]) -> list[Any]:
        return [{"choices": [{"text": "ab", "token_ids": [1, 2]}]}, {"choices": [{"text": "c", "token_ids": [3]}]}]

    assert ran(Server(told), [Arrival(0, (1,), 3)])[0].output_tokens == 3


def test_chat() -> None:
    def chat(body: dict[str, Any]) -> list[Any]:
        deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
        reasons = [None, None, None, "stop"]
        return [{"choices": [{"delta": each, "finish_reason": why}]} for each, why in zip(deltas, reasons, strict=True)]

    server = Server(chat)
    found = ran(server, [Arrival(0, (1, 2), 5, text="hello"), Arrival(1, (1,), 5)], endpoint=CHAT)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert server.bodies[0]["max_completion_tokens"] == 5
    assert (found[0].output_tokens, found[0].error) == (2, "")
    assert "takes text" in found[1].error


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (Server(plain, 400, '{"error": {"message": "max_tokens is too large"}}'), "HTTP 400: max_tokens is too large"),
        (Server(plain, 500, "oh no"), "HTTP 500: oh no"),
        (Server(plain, 500), "no reason given"),
        (Server(lambda body: [text("a"), {"error": {"message": "engine died"}}]), "engine died"),
        (Server(lambda body: ["data: {\n\n"]), "no JSON"),
        (Server(lambda body: ["data: [DONE]\n\n"]), "no token"),
    ],
)
def test_failures_are_told_in_the_servers_words(server: Server, words: str) -> None:
    outcome = ran(server, [Arrival(0, (1,), 3)])[0]
    assert words in outcome.error


def test_concurrency() -> None:
    def slow(body: dict[str, Any]) -> list[Any]:
        return [0.02, *plain(body)]

    server = Server(slow)
    found = ran(server, [Arrival(index, (1,), 2) for index in range(12)], concurrency=3)
    assert server.most == 3
    assert [outcome.index for outcome in found] == list(range(12))
    assert max(outcome.queued for outcome in found) >= 0.04
    free = Server(slow)
    ran(free, [Arrival(index, (1,), 2) for index in range(12)])
    assert free.most > 3


def test_arrivals_are_kept() -> None:
    found = ran(Server(plain), [Arrival(0, (1,), 1), Arrival(1, (1,), 1, 0.2)])
    assert found[0].start < 0.2 <= found[1].start


def test_a_server_that_is_not_there() -> None:
    async def act(url: str) -> None:
        async with Client(EndpointSettings(base_url=url, ready_check_timeout_sec=0), "m", 0.0, False) as client:
            await client.find_model()

    with pytest.raises(InvalidValue, match="refuses the key"):
        against(Server(plain, 401), act)
    with pytest.raises(InvalidValue, match="HTTP 503"):
        against(Server(plain, 503), act)
    with pytest.raises(InvalidValue, match="does not answer"):
        asyncio.run(act("http://127.0.0.1:9"))


def test_a_sender_that_fails_leaves_the_others_be() -> None:
    class Broken:
        async def stream(self, arrival: Arrival) -> AsyncIterator[News]:
            yield News(1)
            if arrival.index == 1:
                raise RooflightError("gone")
            yield News(1)

    found, seconds = asyncio.run(play(Broken(), [Arrival(index, (1,), 2) for index in range(3)]))
    assert [outcome.error for outcome in found] == ["", "gone", ""]
    assert seconds >= max(outcome.end for outcome in found)
