"""POST /v1/chat/completions: messages to the assistant's next one, whole or as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from rooflight.serve.api.context import Context
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.generation import Head, Usage, deltas_of
from rooflight.serve.api.http import EventStream, Tally, read_body, tally_of, while_connected
from rooflight.serve.api.logprobs import Spelling, chat_logprobs, prompt_logprobs
from rooflight.serve.api.messages import encoded, has_tools
from rooflight.serve.api.protocol import ChatBody, parse
from rooflight.serve.api.sampling import params_of
from rooflight.serve.api.tools import ToolCalls
from rooflight.serve.outputs import Delta
from rooflight.serve.params import SamplingParams


async def chat_completions(request: Request) -> ASGIApp:
    """Answer one request."""
    context: Context = request.app.state.context
    body = parse(ChatBody, await read_body(request, context.settings.max_body_mib))
    answer = await _Answer.of(context, body, tally_of(request))
    if body.stream:
        return EventStream(answer.chunks())
    return JSONResponse(await while_connected(request.receive, answer.whole()))


class _Answer:
    """The answer to one request."""

    def __init__(self, context: Context, body: ChatBody, ids: list[int], params: SamplingParams, tally: Tally):
        self._context, self._body, self._ids, self._params = context, body, ids, params
        self._head = Head.of(context, "chatcmpl", "chat.completion", context.model_of(body.model))
        self._spelling = Spelling(context.tokens, bool(body.return_tokens_as_token_ids))
        self._usage = Usage(tally, len(ids))
        self._tools = [ToolCalls() for _ in range(params.n)] if has_tools(body) else None

    @staticmethod
    async def of(context: Context, body: ChatBody, tally: Tally) -> _Answer:
        """Check a request and encode its messages; raises ApiError on what cannot be served."""
        context.model_of(body.model)
        _check(body)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        params = params_of(
            body,
            context.settings,
            context.engine.defaults,
            context.engine.config.vocab_size,
            max_tokens=most,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        ids = await encoded(context, body, special=bool(body.add_special_tokens))
        context.room(ids, most, "messages")
        return _Answer(context, body, ids, params, tally)

    def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        return deltas_of(self._context.engine, [self._ids], self._params, self._head.id, self._body.priority or 0)

    async def whole(self) -> dict[str, Any]:
        """The whole answer as one object."""
        choices = [_empty(index) for index in range(self._params.n)]
        prompt: list[Any] | None = None
        async with contextlib.aclosing(self._deltas()) as deltas:
            async for _, delta in deltas:
                self._usage.add(0, delta)
                prompt = delta.prompt_logprobs if delta.prompt_logprobs is not None else prompt
                self._extend(choices[delta.index], delta)
        for choice in choices:
            message = choice["message"]
            for call in message["tool_calls"]:
                del call["index"]
            if not message["tool_calls"]:
                del message["tool_calls"]
            elif not message["content"]:
                message["content"] = None
        answer = {**self._head.body(), "choices": choices, "usage": self._usage.body()}
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(prompt or (), self._spelling)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._ids
        return answer

    def _extend(self, choice: dict[str, Any], delta: Delta) -> None:
        content, calls = self._parted(delta)
        choice["message"]["content"] += content
        choice["message"]["tool_calls"] += calls
        choice["finish_reason"], choice["stop_reason"] = self._reason(delta), delta.stop_reason
        if self._body.logprobs:
            found = chat_logprobs(delta.logprobs or (), self._spelling)
            if choice["logprobs"] is None:
                choice["logprobs"] = found
            else:
                choice["logprobs"]["content"] += found["content"]
        if self._body.return_token_ids:
            choice.setdefault("token_ids", []).extend(delta.token_ids)

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as the objects of a stream: each choice's role, its news, and how it ended."""
        options = self._body.stream_options
        shown = bool(options and options.include_usage)
        always = bool(options and options.continuous_usage_stats)
        head, begun = self._head.body("chat.completion.chunk"), False

        def chunk(*choices: dict[str, Any]) -> dict[str, Any]:
            usage = {"usage": self._usage.body()} if always or not choices else {"usage": None} if shown else {}
            return {**head, "choices": list(choices), **usage}

        async with contextlib.aclosing(self._deltas()) as deltas:
            async for _, delta in deltas:
                if not begun:
                    begun = True
                    for index in range(self._params.n):
                        choice = _news(index, {"role": "assistant", "content": ""})
                        if self._body.return_token_ids:
                            choice["prompt_token_ids"] = self._ids
                        yield chunk(choice)
                self._usage.add(0, delta)
                for choice in self._parts(delta):
                    yield chunk(choice)
        if shown:
            yield chunk()

    def _parts(self, delta: Delta) -> list[dict[str, Any]]:
        """The choices that one delta gives: one, or none while a tool call is not yet whole."""
        content, calls = self._parted(delta)
        said: dict[str, Any] = {"content": content} if content or not calls else {}
        if calls:
            said["tool_calls"] = calls
        choice = _news(delta.index, said)
        choice["finish_reason"], choice["stop_reason"] = self._reason(delta), delta.stop_reason
        if self._body.logprobs:
            choice["logprobs"] = chat_logprobs(delta.logprobs or (), self._spelling)
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        told = self._body.logprobs or self._body.return_token_ids or delta.finish_reason is not None
        # Without tools each delta is a chunk, also one without text: clients time tokens by chunks.
        return [choice] if content or calls or told or self._tools is None else []

    def _parted(self, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        if self._tools is None:
            return delta.text, []
        return self._tools[delta.index].feed(delta.text, last=delta.finish_reason is not None)

    def _reason(self, delta: Delta) -> str | None:
        called = self._tools is not None and self._tools[delta.index].count > 0
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason


def _empty(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": "", "refusal": None, "tool_calls": []},
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }


def _news(index: int, said: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": said, "logprobs": None, "finish_reason": None}


def _check(body: ChatBody) -> None:
    """Raise ApiError 400 on what chat completions refuse."""
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, f"top_logprobs {body.top_logprobs} needs logprobs; set logprobs to true", "top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed; set stream to false", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for stream; set stream to true, or leave them out", "stream_options")
