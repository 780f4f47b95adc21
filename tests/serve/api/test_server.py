"""The server's life as a process: its port, its drain on SIGTERM, and what a second signal does."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rooflight.errors import InvalidValue
from rooflight.serve.api.server import address_of, listen
from rooflight.serve.settings import ServerSettings

ROOT = Path(__file__).parents[3]
# A hundred tokens of 10 ms; or, asked for by the first argument, three tokens and then nothing.
PROGRAM = """
import sys
from rooflight.serve.api.server import serve
from rooflight.serve.settings import ServerSettings
from tests.serve.api.fake_engine import FakeEngine

hang, drain = sys.argv[1] == "hang", float(sys.argv[2])
engine = FakeEngine(pause=0.01, hang_after=3 if hang else None)
serve(engine, ServerSettings(port=0, drain_seconds=drain, served_model_name=("m",)))
print("stopped once" if engine.stopped == drain else f"stopped {engine.stopped}", file=sys.stderr)
"""


class Process:
    """A server as a process of its own; `begin` waits until it takes connections."""

    def __init__(self, *arguments: str):
        self.connections: list[http.client.HTTPConnection] = []
        self.port = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )

    def begin(self) -> Process:
        first = self.line()
        found = re.fullmatch(r"serving m at http://127\.0\.0\.1:(\d+)/v1\n", first)
        assert found, first
        self.port = int(found[1])
        return self

    def line(self) -> str:
        """The next line of its log."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def ask(self, tokens: int) -> http.client.HTTPResponse:
        """The answer to a request for a stream, of which the first token has come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        self.connections.append(connection)
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": tokens})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        return connection.getresponse()

    def end(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        with self.process:
            said = self.process.stderr.read()
        return self.process.returncode, said


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*arguments: str) -> Process:
        started.append(Process(*arguments))
        return started[-1].begin()

    yield begin
    for each in started:
        for connection in each.connections:
            connection.close()
        each.process.kill()
        each.process.wait()
        if each.process.stderr is not None:
            each.process.stderr.close()


def test_a_signal_drains(start: Callable[..., Process]) -> None:
    server = start("go", "20")
    stream = server.ask(100)
    assert stream.readline().startswith(b"data: ")
    server.process.send_signal(signal.SIGTERM)
    assert server.line().startswith("SIGTERM: no new requests; up to 20 s")
    refused = server.ask(5)
    assert refused.status == 503
    assert json.loads(refused.read())["error"]["code"] == "draining"
    # What ran goes on to its own end.
    rest = stream.read()
    assert rest.count(b'"text"') == 99
    assert rest.endswith(b"data: [DONE]\n\n")
    code, said = server.end()
    assert code == 0, said
    assert said.endswith("stopped once\n")


def test_a_drain_ends_when_its_time_is_up(start: Callable[..., Process]) -> None:
    server = start("hang", "0.2")
    stream = server.ask(100)
    assert stream.readline().startswith(b"data: ")
    server.process.send_signal(signal.SIGTERM)
    rest = stream.read()
    assert b'"error"' in rest
    code, said = server.end()
    assert code == 0, said


def test_a_second_signal_does_not_wait(start: Callable[..., Process]) -> None:
    server = start("hang", "1000")
    stream = server.ask(100)
    assert stream.readline().startswith(b"data: ")
    server.process.send_signal(signal.SIGTERM)
    assert server.line().startswith("SIGTERM: ")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=10) == 0


def test_a_port_that_is_taken_is_one_line() -> None:
    with listen(ServerSettings(port=0)) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        assert address_of(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(InvalidValue, match=f"--port {port}: Address already in use; name another"):
            listen(ServerSettings(port=port))
    with pytest.raises(InvalidValue, match="--host 203.0.113.7"):
        listen(ServerSettings(host="203.0.113.7", port=0))
    with pytest.raises(InvalidValue, match=r"--host no\.such\.host\.invalid"):
        listen(ServerSettings(host="no.such.host.invalid", port=0))
