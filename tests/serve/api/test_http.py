"""What a socket sees: errors as JSON, limits, keys, disconnects, slow readers, and log lines."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from openai import APIError, AuthenticationError, InternalServerError, RateLimitError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from rooflight.errors import InvalidValue
from rooflight.serve.async_engine import EngineDead, QueueFull
from tests.serve.api.conftest import Running, Starter, with_template
from tests.serve.api.fake_engine import SAYS, FakeEngine


@contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        yield raw


def head(path: str = "/v1/completions", method: str = "POST", **fields: object) -> bytes:
    given = {"host": "x", "content_type": "application/json", **fields}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def ask(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    return head(path, content_length=len(data)) + data


def answer(raw: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body of one answer that has a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = raw.recv(65536)
        assert piece, data
        data += piece
    first, *lines = data.split(b"\r\n\r\n", 1)[0].decode().split("\r\n")
    headers = {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in lines}
    body = data.split(b"\r\n\r\n", 1)[1]
    while len(body) < int(headers["content-length"]):
        body += raw.recv(65536)
    return int(first.split()[1]), headers, body


def error_of(server: Running, sent: bytes) -> tuple[int, dict[str, Any]]:
    """The status and OpenAI error that bytes on a socket get."""
    with connected(server) as raw:
        raw.sendall(sent)
        status, headers, body = answer(raw)
    assert headers["content-type"] == "application/json"
    found = json.loads(body)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in found["error"]["message"]
    return status, found["error"]


def listening(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What servers say from here on. Not by capfd: what is written between its read and its cut would be lost."""
    found = io.StringIO()
    monkeypatch.setattr(sys, "stderr", found)
    return found


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (head("/nowhere", "GET"), 404, "/nowhere"),
        (head("/v1/completions", "GET"), 405, "GET"),
        (head("/v1/models", content_length=2) + b"{}", 405, "POST"),
        (head(content_length=3) + b"{]}", 400, "valid JSON"),
        (head(content_length=0), 400, "valid JSON"),
        (head(content_length=4) + b"null", 400, "JSON object"),
        (head(content_length=12) + b'{"prompt":"\xff', 400, "valid JSON"),
        (head(content_length=20_007) + b'{"x":' + b"[" * 20_000 + b"]}", 400, "recursion"),
        (head(content_length=2, content_type="text/plain") + b"{}", 415, "text/plain"),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", 415, "(none)"),
        (head(content_length=2, content_type="application/json; charset=utf-8") + b"{}", 400, "prompt is missing"),
    ],
)
def test_errors_are_json_with_their_status(plain: Running, sent: bytes, status: int, words: str) -> None:
    found, error = error_of(plain, sent)
    assert found == status
    assert words in error["message"]


def test_a_body_over_the_limit_is_refused_unread(start: Starter) -> None:
    server = start(FakeEngine(), max_body_mib=0.01)
    # Declared: refused before a byte of it is sent.
    status, error = error_of(server, head(content_length=20_000))
    assert (status, error["type"]) == (413, "invalid_request_error")
    assert "0.01 MiB" in error["message"]
    # Undeclared: refused as soon as it is over, while the client still has more to send.
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    assert error_of(server, head(transfer_encoding="chunked") + chunk * 3)[0] == 413
    assert server.client().completions.create(model="fake", prompt="x", max_tokens=1).choices[0].text == "T"


def test_a_key_guards_everything_but_health_and_figures(start: Starter) -> None:
    extra = [Route("/metrics", lambda request: PlainTextResponse("metrics"))]
    server = start(FakeEngine(), api_key="secret", extra_routes=extra)
    assert server.client("secret").completions.create(model="fake", prompt="x", max_tokens=1).choices
    for key in ("wrong", "secre", "secret2"):
        with pytest.raises(AuthenticationError):
            server.client(key).completions.create(model="fake", prompt="x")
    for path in ("/v1/models", "/version", "/nowhere", "/metrics/"):
        status, error = error_of(server, head(path, "GET"))
        assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
    for value in ("secret", "Basic secret", "Bearer", "Bearer sécret"):
        assert error_of(server, head("/v1/models", "GET", authorization=value))[0] == 401
    with connected(server) as raw:
        raw.sendall(head("/health", "GET"))
        assert answer(raw)[0] == 200
    with connected(server) as raw:
        raw.sendall(head("/metrics", "GET"))
        assert answer(raw)[2] == b"metrics"
    with connected(server) as raw:
        raw.sendall(head("/v1/models", "GET", authorization="bearer secret"))
        assert answer(raw)[0] == 200


def test_errors_of_the_engine(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listening(monkeypatch)
    server = start(FakeEngine())
    client, ask = server.client(), {"model": "fake", "prompt": "x"}
    for stream in (False, True):
        server.engine.fail = QueueFull("3 requests wait")
        with pytest.raises(RateLimitError, match="3 requests wait"):
            client.completions.create(**ask, stream=stream)  # type: ignore[call-overload]
        server.engine.fail = EngineDead("the engine has stopped: out of memory")
        with pytest.raises(InternalServerError, match="out of memory") as caught:
            client.completions.create(**ask, stream=stream)  # type: ignore[call-overload]
        assert caught.value.status_code == 503
        server.engine.fail = InvalidValue("no such grammar")
        with pytest.raises(APIError, match="no such grammar") as refused:
            client.completions.create(**ask, stream=stream)  # type: ignore[call-overload]
        assert refused.value.type == "invalid_request_error"
        server.engine.fail = ZeroDivisionError("secret detail")
        with pytest.raises(InternalServerError) as failed:
            client.completions.create(**ask, stream=stream)  # type: ignore[call-overload]
        assert failed.value.status_code == 500
        assert "secret detail" not in failed.value.message
        # What the client may not see stands in the log.
        server.until(lambda: "ZeroDivisionError: secret detail" in said.getvalue())
        said.truncate(0)
    server.engine.fail = None


def test_one_bad_prompt_of_many_fails_them_all_and_leaves_none_running(start: Starter) -> None:
    server = start(FakeEngine(says=lambda ids, index: 1 / 0 if ids == [2] else SAYS, pause=0.001))  # type: ignore[return-value]
    with pytest.raises(InternalServerError):
        server.client().completions.create(model="fake", prompt=[[1], [2], [3]], max_tokens=200)
    server.until(lambda: server.engine.running == 0)
    assert len(server.engine.cancelled) == 3


def test_an_error_within_a_stream_is_an_event(start: Starter) -> None:
    class Breaks(FakeEngine):
        async def generate(self, *arguments: Any, **named: Any):  # type: ignore[override]
            async for delta in super().generate(*arguments, **named):
                yield delta
                if delta.token_ids == list(b"q"):
                    raise EngineDead("the engine has stopped: a step failed")

    server = start(Breaks())
    text = ""
    with pytest.raises(APIError, match="a step failed"):
        for chunk in server.client().completions.create(model="fake", prompt="x", max_tokens=50, stream=True):
            text += chunk.choices[0].text
    assert text == "The q"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_goes_cancels_its_request(start: Starter, path: str, stream: bool, prompts: int) -> None:
    server = start(FakeEngine(tokenizer=with_template(), hang_after=3))
    chat = path.endswith("chat/completions")
    if chat and prompts > 1:
        prompts = 1
    prompt = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": [[1]] * prompts}
    with connected(server) as raw:
        raw.sendall(ask({**prompt, "stream": stream, "max_tokens": 50}, path))
        if stream:
            data = b""
            while data.count(b"data:") < 3 * prompts:
                data += raw.recv(65536)
        server.until(lambda: server.engine.running == prompts)
        assert not server.engine.cancelled
    server.until(lambda: server.engine.running == 0)
    assert len(server.engine.cancelled) == prompts


def test_a_client_that_goes_before_its_body_is_whole_starts_nothing(start: Starter) -> None:
    server = start(FakeEngine())
    with connected(server) as raw:
        raw.sendall(head(content_length=100) + b'{"prompt"')
        time.sleep(0.05)
    assert server.client().completions.create(model="fake", prompt="x", max_tokens=1).choices
    assert len(server.engine.seen) == 1


def test_a_client_that_stops_reading_delays_nobody(start: Starter) -> None:
    server = start(FakeEngine(says=SAYS * 200, max_model_len=10**6))
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with slow:
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(ask({"prompt": [1], "stream": True, "max_tokens": 500_000}))
        assert slow.recv(100)
        server.until(lambda: server.engine.running == 1)
        for _ in range(20):
            other = server.client().completions.create(model="fake", prompt="x", max_tokens=50)
            assert other.choices[0].text == SAYS[:50]
        # It is held at its socket, far from its end.
        assert server.engine.running == 1
    server.until(lambda: server.engine.running == 0)
    assert len(server.engine.cancelled) == 1


def test_a_stream_on_the_wire(plain: Running) -> None:
    with connected(plain) as raw:
        raw.sendall(ask({"prompt": "x", "stream": True, "max_tokens": 2}))
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += raw.recv(65536)
        first, body = data.split(b"\r\n\r\n", 1)
        assert b"content-type: text/event-stream; charset=utf-8" in first
        # The connection is kept: it takes another request.
        raw.sendall(head("/health", "GET"))
        assert answer(raw)[0] == 200
    pieces, rest = [], body
    while rest:
        size, rest = rest.split(b"\r\n", 1)
        pieces.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    events = b"".join(pieces).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    objects = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [entry["choices"][0]["text"] for entry in objects] == ["T", "h"]
    assert set(objects[0]) == {"id", "object", "created", "model", "system_fingerprint", "choices"}


def test_each_request_has_a_line_in_the_log(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listening(monkeypatch)
    server = start(FakeEngine(tokenizer=with_template()), disable_log_requests=False)
    server.client().completions.create(model="fake", prompt="abc", max_tokens=5)
    with connected(server) as raw:
        raw.sendall(head("/no\x1b[31mwhere".replace("\x1b", "%1b"), "GET"))
        assert answer(raw)[0] == 404
    server.until(lambda: said.getvalue().count("\n") == 2)
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("POST /v1/completions 200, 3 tokens in, 5 out, TTFT ")
    assert lines[0].endswith(" s")
    assert lines[1].startswith("GET /no?[31mwhere 404, ")


def test_extra_routes_are_served_and_their_failures_are_json(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listening(monkeypatch)

    async def breaks(request: Request) -> JSONResponse:
        raise KeyError("hidden")

    server = start(FakeEngine(), extra_routes=[Route("/breaks", breaks)])
    status, error = error_of(server, head("/breaks", "GET"))
    assert (status, error["type"]) == (500, "server_error")
    server.until(lambda: "KeyError: 'hidden'" in said.getvalue())


def test_many_connections_at_once(start: Starter) -> None:
    server = start(FakeEngine(pause=0.001))
    found: list[str] = []

    def one() -> None:
        answer = server.client().completions.create(model="fake", prompt="x", max_tokens=20)
        found.append(answer.choices[0].text)

    threads = [threading.Thread(target=one) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [SAYS[:20]] * 24
