"""What every endpoint of a server shares: the engine, the limits, the names and the tokens."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rooflight import __version__
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.templates import ChatTemplate
from rooflight.serve.api.tokens import Tokens
from rooflight.serve.outputs import Delta
from rooflight.serve.params import SamplingParams
from rooflight.serve.settings import ServerSettings


class ServingEngine(Protocol):
    """What the API needs of an `AsyncEngine`."""

    @property
    def config(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def settings(self) -> Any: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def directory(self) -> Path | None: ...
    @property
    def defaults(self) -> dict[str, Any]: ...
    @property
    def errored(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    def generate(
        self, prompt_ids: list[int], params: SamplingParams, request_id: str, priority: int = 0
    ) -> AsyncGenerator[Delta, None]: ...
    async def embed(self, prompt_ids: list[int], request_id: str) -> list[float]: ...
    async def start(self) -> Any: ...
    async def stop(self, drain_seconds: float) -> None: ...


@dataclass(slots=True)
class Context:
    """The state of a server. draining: no new work is taken; what runs may end."""

    engine: ServingEngine
    settings: ServerSettings
    tokens: Tokens
    template: ChatTemplate
    names: tuple[str, ...]
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    @staticmethod
    def of(engine: ServingEngine, settings: ServerSettings) -> Context:
        """The context of an engine; raises InvalidValue on a chat template that cannot be read."""
        described = f"{__version__} {engine.settings!r} {engine.config!r}"
        return Context(
            engine=engine,
            settings=settings,
            tokens=Tokens(engine.tokenizer, engine.config.vocab_size, engine.max_model_len),
            template=ChatTemplate.of(engine.tokenizer, settings.chat_template, engine.directory),
            names=settings.served_model_name or (engine.settings.model,),
            fingerprint="fp_" + hashlib.sha256(described.encode()).hexdigest()[:12],
        )

    @property
    def closed(self) -> bool:
        """Whether new work is refused because the server is on its way out."""
        return self.draining or self.engine.draining

    def model_of(self, named: str | None) -> str:
        """The model that a request named, or the first one; raises ApiError 404 on one that is not served."""
        if named is None:
            return self.names[0]
        if named not in self.names:
            raise ApiError(
                404, f"the model {named[:200]!r} is not served; use {self.names[0]!r}", "model", "model_not_found"
            )
        return named

    def room(self, ids: Sequence[int], max_tokens: int | None, param: str) -> None:
        """Raise ApiError 400 on a prompt that the model does not know or that leaves no room for its output."""
        self.tokens.check(ids, param)
        most, wanted = self.engine.max_model_len, 1 if max_tokens is None else max(max_tokens, 1)
        if len(ids) + wanted > most:
            raise ApiError(
                400,
                f"the model's context is {most} tokens; {param} has {len(ids)} and the output would have up to "
                f"{wanted}: shorten one of them",
                param if len(ids) >= most else "max_tokens",
                "context_length_exceeded",
            )
