"""A server on a real port in a thread, in front of a scripted engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import OpenAI

from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.api.app import build_app
from rooflight.serve.api.server import Server, address_of, listen
from rooflight.serve.settings import ServerSettings
from tests.serve.api.fake_engine import FakeEngine

CHATML = """{%- if tools %}<|tools|>{{ tools | tojson }}
{% endif -%}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
{{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def with_template(template: str = CHATML) -> Tokenizer:
    """The byte tokenizer with a chat template beside it."""
    plain = Tokenizer.bytes()
    return Tokenizer(plain.inner.to_str(), plain.eos_id, {"chat_template.jinja": template})


@dataclass
class Running:
    """A server that runs."""

    url: str
    server: Server
    engine: FakeEngine
    thread: threading.Thread
    clients: list[OpenAI] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        made = OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10, **options)
        self.clients.append(made)
        return made

    def until(self, holds: Callable[[], bool], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.005)


Starter = Callable[..., Running]


@pytest.fixture(scope="module")
def start() -> Iterator[Starter]:
    """Start a server in front of an engine; all of a module's end with it."""
    running: list[Running] = []

    def begin(engine: FakeEngine, **settings: Any) -> Running:
        extra = settings.pop("extra_routes", ())
        options = ServerSettings(**{"port": 0, "disable_log_requests": True, **settings}).check()
        bound = listen(options)
        server = Server(build_app(engine, options, extra))
        thread = threading.Thread(target=lambda: asyncio.run(server.run_on(bound)), daemon=True)
        found = Running(address_of(bound), server, engine, thread)
        thread.start()
        found.until(lambda: server.started)
        running.append(found)
        return found

    yield begin
    for each in running:
        # One that is left to the collector warns of its open sockets, whenever that comes by.
        for client in each.clients:
            client.close()
        each.server.should_exit = True
        each.server.force_exit = True
    for each in running:
        each.thread.join(5)


@pytest.fixture(scope="module")
def plain(start: Starter) -> Running:
    """A server with all defaults, whose model chats."""
    return start(FakeEngine(tokenizer=with_template()))
