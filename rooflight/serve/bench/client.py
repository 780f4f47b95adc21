"""An aiohttp client of OpenAI's completions and chat completions, streaming; it counts tokens and keeps no text."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from rooflight.errors import InvalidValue, RooflightError
from rooflight.serve.bench.play import News
from rooflight.serve.bench.settings import EndpointSettings
from rooflight.serve.bench.traffic import Arrival

# Long benchmarks have requests that wait for hours; vLLM's client has the same limit.
_MOST_SECONDS = 6 * 3600
_CHAT = "/v1/chat/completions"
_POLL_SECONDS = 1.0


class Client:
    """Requests to one server; an async context manager, as it keeps connections open.

    Token ids go as they are; to chat completions only text can go.
    """

    def __init__(self, endpoint: EndpointSettings, model: str, temperature: float, ignore_eos: bool):
        self._endpoint, self.model = endpoint, model
        self._temperature, self._ignore_eos = temperature, ignore_eos
        self._url = endpoint.url + endpoint.endpoint
        self._chat = endpoint.endpoint == _CHAT
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        key = self._endpoint.api_key or os.environ.get("OPENAI_API_KEY", "")
        # No limit on connections: how many requests are under way is the benchmark's own setting.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=_MOST_SECONDS),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def find_model(self) -> str:
        """Wait until the server answers, and take its first model unless one was named; raises InvalidValue else."""
        until = time.monotonic() + self._endpoint.ready_check_timeout_sec
        while True:
            try:
                async with self._open.get(self._endpoint.url + "/v1/models") as answer:
                    if answer.status in (401, 403):
                        raise InvalidValue(f"{self._endpoint.url} refuses the key ({answer.status}); set --api-key")
                    if answer.status < 400:
                        served = _names(await answer.json(content_type=None))
                        break
                    reason = f"HTTP {answer.status}"
            except (aiohttp.ClientError, OSError, ValueError) as error:
                reason = str(error) or type(error).__name__
            if time.monotonic() >= until:
                raise InvalidValue(
                    f"{self._endpoint.url} does not answer /v1/models ({reason}); start the server, or mend --base-url"
                )
            await asyncio.sleep(_POLL_SECONDS)
        if not self.model and not served:
            raise InvalidValue(f"{self._endpoint.url} names no model; name it by --model")
        self.model = self.model or served[0]
        return self.model

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RooflightError("the client is not open; use it in `async with`")
        return self._session

    def payload(self, arrival: Arrival) -> dict[str, Any]:
        """The body of a request."""
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": self._temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._chat:
            if not arrival.text:
                raise InvalidValue(f"{_CHAT} takes text, not token ids; use sharegpt or a file of prompts")
            return body | {
                "messages": [{"role": "user", "content": arrival.text}],
                "max_completion_tokens": arrival.output_len,
            }
        return body | {"prompt": list(arrival.prompt) or arrival.text, "max_tokens": arrival.output_len}

    async def stream(self, arrival: Arrival) -> AsyncIterator[News]:
        """The pieces of one streamed answer; raises RooflightError with the server's own words where it refuses."""
        try:
            async with self._open.post(self._url, json=self.payload(arrival)) as answer:
                if answer.status != 200:
                    raise RooflightError(f"HTTP {answer.status}: {_reason(await answer.text())}")
                async for line in answer.content:
                    data = line.strip().removeprefix(b"data:").strip()
                    # A line that begins with a colon is a comment that keeps the connection alive.
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    yield _news(json.loads(data))
        except aiohttp.ClientError as error:
            raise RooflightError(f"the connection failed: {error or type(error).__name__}") from error
        except ValueError as error:
            raise RooflightError(f"the stream held no JSON: {error}") from error


def _news(data: dict[str, Any]) -> News:
    if "error" in data:
        raise RooflightError(_reason(json.dumps(data)))
    usage = data.get("usage") or {}
    choices = data.get("choices") or []
    return News(_tokens(choices[0]) if choices else 0, usage.get("prompt_tokens"), usage.get("completion_tokens"))


def _tokens(choice: dict[str, Any]) -> int:
    """Tokens in a piece of a stream: its ids where they are told, else one, for even an empty text is a token.

    In a chat the opening piece may only tell the role, and the closing one only why it ended.
    """
    if choice.get("token_ids") is not None:
        return len(choice["token_ids"])
    delta = choice.get("delta")
    if delta is None:
        return 1
    told = any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls"))
    return int(told or not ("role" in delta or choice.get("finish_reason")))


def _names(models: Any) -> list[str]:
    listed = models.get("data") if isinstance(models, dict) else None
    return [each["id"] for each in listed or [] if isinstance(each, dict) and isinstance(each.get("id"), str)]


def _reason(text: str) -> str:
    """The message of an error in OpenAI's JSON, or the text itself, in one short line."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        text = error.get("message", text) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return " ".join(str(text).split())[:300] or "no reason given"
