"""Errors of the API: an exception that knows its HTTP status, and OpenAI's JSON for it."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from rooflight.errors import EngineDead, QueueFull, RooflightError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that gets an error as its answer: the HTTP status, one line of text, the field it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's JSON of the error."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer; a body that was not read to its end ends the connection too."""
        headers = {401: {"www-authenticate": "Bearer"}, 413: {"connection": "close"}, 503: {"retry-after": "1"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


class ClientGone(Exception):
    """The client closed its connection before the answer was through."""


def as_api_error(error: BaseException) -> ApiError | None:
    """What a client is told of an exception of the engine; None for one that nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error) or "too many requests are waiting; try again later", code="queue_full")
    if isinstance(error, EngineDead):
        return ApiError(503, str(error) or "the engine has stopped", code="engine_dead")
    if isinstance(error, RooflightError):
        return ApiError(400, str(error))
    return None
