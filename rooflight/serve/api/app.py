"""The application: routes, who may come in, what every answer's log line says, and errors as OpenAI's JSON."""

from __future__ import annotations

import hmac
import sys
import time
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rooflight.errors import RooflightError
from rooflight.serve.api.chat import chat_completions
from rooflight.serve.api.completions import completions
from rooflight.serve.api.context import Context, ServingEngine
from rooflight.serve.api.errors import ApiError, ClientGone, as_api_error
from rooflight.serve.api.http import TALLY, Tally, unforeseen
from rooflight.serve.api.texts import detokenize, embeddings, health, models, tokenize, version
from rooflight.serve.settings import ServerSettings

# nginx's number for a request whose client went before the answer; it shows in the log alone.
CLIENT_GONE = 499
# Of the page and the metrics: what they show is no request's content.
OPEN_PATHS = frozenset({"/", "/live", "/live/events", "/metrics"})


def build_app(engine: ServingEngine, settings: ServerSettings, extra_routes: Sequence[BaseRoute] = ()) -> Gate:
    """The server's application; raises InvalidValue on a chat template that cannot be read.

    extra_routes: such as /metrics and the live page; they are behind the same key and in the same log.
    """
    app = Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health", health),
            Route("/version", version),
            *extra_routes,
        ],
        exception_handlers={HTTPException: _plain_error, ApiError: _error, RooflightError: _error, Exception: _error},
    )
    app.state.context = Context.of(engine, settings)
    return Gate(app, app.state.context)


class Gate:
    """Stands before every route: the key, the drain, the log line, and nothing but JSON for what goes wrong."""

    def __init__(self, app: ASGIApp, context: Context):
        self._app = app
        self.context = context
        self._key = context.settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        tally = scope[TALLY] = Tally()
        status = CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, watched)
            else:
                await refusal.response()(scope, receive, watched)
        except ClientGone:
            status = CLIENT_GONE
        except Exception as error:
            # Its answer was sent where that was still possible; what is left is to say why.
            if as_api_error(error) is None:
                unforeseen(error)
        finally:
            if not self.context.settings.disable_log_requests:
                print(_line(scope, status, tally), file=sys.stderr, flush=True)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] == "/health":
            return None
        # A browser and Prometheus carry no key; what they are shown is no request's content.
        if self._key and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            if not (hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer"):
                return ApiError(
                    401, "the request has no valid key; send Authorization: Bearer KEY", code="invalid_api_key"
                )
        if self.context.closed and scope["method"] == "POST":
            return ApiError(503, "the server is shutting down; try another one", code="draining")
        return None


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        raise error
    return (as_api_error(error) or ApiError(500, "the server failed at this request; its log says why")).response()


async def _plain_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    texts = {
        404: f"there is no {request.url.path[:200]}",
        405: f"{request.url.path[:200]} does not answer {request.method}",
    }
    response = ApiError(error.status_code, texts.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


def _line(scope: Scope, status: int, tally: Tally) -> str:
    """A request's line in the log."""
    now = time.monotonic()
    path = "".join(character if character.isprintable() else "?" for character in scope["path"][:200])
    line = f"{scope['method']} {path} {status}"
    if tally.prompt_tokens is not None:
        line += f", {tally.prompt_tokens} tokens in"
    if tally.output_tokens is not None:
        line += f", {tally.output_tokens} out"
    if tally.first_token is not None:
        line += f", TTFT {(tally.first_token - tally.began) * 1000:.1f} ms"
    return f"{line}, {now - tally.began:.3f} s"
