"""Bodies read up to a limit, work that ends when its client goes, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from rooflight.serve.api.errors import ApiError, ClientGone, as_api_error

T = TypeVar("T")
TALLY = "rooflight.tally"


@dataclass(slots=True)
class Tally:
    """What a request's line in the log says."""

    began: float = field(default_factory=time.monotonic)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    first_token: float | None = None


def tally_of(request: Request) -> Tally:
    """The tally of a request."""
    return request.scope[TALLY]


async def read_body(request: Request, most_mib: float) -> bytes:
    """A JSON request's body; raises ApiError 415 on another content type, 413 as soon as it is over the limit."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type {kind or '(none)'} is not accepted; send application/json")
    most = int(most_mib * 2**20)
    too_large = ApiError(413, f"the body is over this server's limit of {most_mib:g} MiB")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most:
        raise too_large
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > most:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work; it is cancelled and ClientGone raised when the client closes its connection first.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for either in (task, gone):
            either.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An answer of server-sent events, one for each object, with `[DONE]` at the end.

    Nothing is sent before the first object is there, so that an error until then is an HTTP error; later ones are an
    event. Each event waits until the client has taken the ones before it; the engine meanwhile goes on.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]):
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        started = False
        async with contextlib.aclosing(self._events) as events:
            try:
                async for event in events:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": [
                                    (b"content-type", b"text/event-stream; charset=utf-8"),
                                    (b"cache-control", b"no-cache"),
                                    (b"x-accel-buffering", b"no"),
                                ],
                            }
                        )
                    await send(_event(json.dumps(event, ensure_ascii=False, separators=(",", ":"))))
            except Exception as error:
                if not started:
                    raise
                told = as_api_error(error)
                if told is None:
                    told = unforeseen(error)
                await send(_event(json.dumps(told.body(), ensure_ascii=False)))
        await send({**_event("[DONE]"), "more_body": False})


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


def unforeseen(error: BaseException) -> ApiError:
    """Log an exception that nobody foresaw; what the client is told of it."""
    print("".join(traceback.format_exception(error)), file=sys.stderr, end="", flush=True)
    return ApiError(500, "the server failed at this request; its log says why")
