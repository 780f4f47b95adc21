"""POST /v1/completions: prompts to text, whole or as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from rooflight.serve.api.context import Context
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.generation import Head, Usage, deltas_of
from rooflight.serve.api.http import EventStream, Tally, read_body, tally_of, while_connected
from rooflight.serve.api.logprobs import Spelling, completion_logprobs, prompt_logprobs
from rooflight.serve.api.protocol import CompletionBody, parse
from rooflight.serve.api.sampling import params_of
from rooflight.serve.api.tokens import Offsets
from rooflight.serve.outputs import Delta
from rooflight.serve.params import SamplingParams

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's ids, the text that echo shows, and how many characters its leading tokens spell that do not show."""

    ids: list[int]
    text: str
    hidden: int


async def completions(request: Request) -> ASGIApp:
    """Answer one request."""
    context: Context = request.app.state.context
    body = parse(CompletionBody, await read_body(request, context.settings.max_body_mib))
    answer = await _Answer.of(context, body, tally_of(request))
    if body.stream:
        return EventStream(answer.chunks())
    return JSONResponse(await while_connected(request.receive, answer.whole()))


class _Answer:
    """The answer to one request, made of parts of choices: each delta gives one, and a whole answer joins them."""

    def __init__(
        self, context: Context, body: CompletionBody, prompts: list[Prompt], params: SamplingParams, tally: Tally
    ):
        self._context, self._body, self._prompts, self._params = context, body, prompts, params
        self._head = Head.of(context, "cmpl", "text_completion", context.model_of(body.model))
        self._spelling = Spelling(context.tokens, bool(body.return_tokens_as_token_ids))
        # Nothing was asked for but the prompt: a token is sampled all the same, and left out.
        self._none = body.max_tokens == 0
        self._offsets: dict[int, Offsets] = {}
        self._prompt_logprobs: dict[int, list[Any]] = {}
        self._usage = Usage(tally, sum(len(prompt.ids) for prompt in prompts))

    @staticmethod
    async def of(context: Context, body: CompletionBody, tally: Tally) -> _Answer:
        """Check a request and encode its prompts; raises ApiError on what cannot be served."""
        context.model_of(body.model)
        _check(context, body)
        params = params_of(
            body,
            context.settings,
            context.engine.defaults,
            context.engine.config.vocab_size,
            max_tokens=body.max_tokens or (DEFAULT_MAX_TOKENS if body.max_tokens is None else 1),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        prompts = [await _prompt(context, body, given) for given in body.prompt]
        for prompt in prompts:
            context.room(prompt.ids, body.max_tokens, "prompt")
        if body.max_tokens is None:
            room = context.engine.max_model_len - max(len(prompt.ids) for prompt in prompts)
            params = replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, room))
        return _Answer(context, body, prompts, params, tally)

    def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        body, ids = self._body, [prompt.ids for prompt in self._prompts]
        return deltas_of(self._context.engine, ids, self._params, self._head.id, body.priority or 0)

    async def whole(self) -> dict[str, Any]:
        """The whole answer as one object."""
        count = len(self._prompts) * self._params.n
        choices: list[dict[str, Any]] = [{} for _ in range(count)]
        held: list[tuple[int, Delta]] = []
        async with contextlib.aclosing(self._deltas()) as deltas:
            async for prompt, delta in deltas:
                self._note(prompt, delta)
                held.append((prompt, delta))
        for prompt, delta in held:
            part = self._part(prompt, delta)
            choices[part["index"]] = _joined(choices[part["index"]], part)
        return {**self._head.body(), "choices": choices, "usage": self._usage.body()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as the objects of a stream."""
        options = self._body.stream_options
        shown = bool(options and options.include_usage)
        always = bool(options and options.continuous_usage_stats)
        held: dict[int, list[Delta]] = {}
        async with contextlib.aclosing(self._deltas()) as deltas:
            async for prompt, delta in deltas:
                self._note(prompt, delta)
                if self._echoes_logprobs and prompt not in self._prompt_logprobs:
                    # The prompt's log-probabilities come with its first completion; the others wait for them.
                    held.setdefault(prompt, []).append(delta)
                    continue
                for news in (*held.pop(prompt, ()), delta):
                    chunk = {**self._head.body(), "choices": [self._part(prompt, news)]}
                    if always:
                        chunk["usage"] = self._usage.body()
                    elif shown:
                        chunk["usage"] = None
                    yield chunk
        if shown:
            yield {**self._head.body(), "choices": [], "usage": self._usage.body()}

    @property
    def _echoes_logprobs(self) -> bool:
        return bool(self._body.echo) and self._body.logprobs is not None

    def _note(self, prompt: int, delta: Delta) -> None:
        if self._none:
            delta.text, delta.token_ids = "", []
            delta.logprobs = None if delta.logprobs is None else []
            delta.finish_reason, delta.stop_reason = delta.finish_reason and "length", None
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs.setdefault(prompt, list(delta.prompt_logprobs))
        self._usage.add(prompt, delta)

    def _part(self, number: int, delta: Delta) -> dict[str, Any]:
        """A choice with what one delta brings; the first part of each choice has the prompt too."""
        body, prompt, index = self._body, self._prompts[number], number * self._params.n + delta.index
        first = index not in self._offsets
        if first:
            hidden = prompt.hidden if body.echo else 0
            self._offsets[index] = Offsets(self._context.tokens, hidden, self._params.skip_special_tokens)
        part: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        ids, entries = list(delta.token_ids), list(delta.logprobs or ())
        if first and body.echo:
            part["text"] = prompt.text + delta.text
            if self._echoes_logprobs:
                ids, entries = prompt.ids + ids, self._prompt_logprobs[number] + entries
        if body.logprobs is not None:
            part["logprobs"] = completion_logprobs(ids, entries, self._spelling, self._offsets[index])
        if body.return_token_ids:
            part["token_ids"] = list(delta.token_ids)
            if first:
                part["prompt_token_ids"] = prompt.ids
        if body.prompt_logprobs is not None and first:
            part["prompt_logprobs"] = prompt_logprobs(self._prompt_logprobs.get(number, ()), self._spelling)
        return part


def _joined(before: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Two parts of a choice as one."""
    if not before:
        return part
    before["text"] += part["text"]
    before["finish_reason"], before["stop_reason"] = part["finish_reason"], part["stop_reason"]
    if part["logprobs"] is not None:
        for name, values in part["logprobs"].items():
            before["logprobs"][name] += values
    if "token_ids" in part:
        before["token_ids"] += part["token_ids"]
    return before


def _check(context: Context, body: CompletionBody) -> None:
    """Raise ApiError 400 on what completions refuse."""
    most = context.settings.max_prompts
    if len(body.prompt) > most:
        raise ApiError(400, f"prompt has {len(body.prompt)} prompts; this server allows {most}", "prompt")
    if body.suffix:
        raise ApiError(400, "suffix cannot be served; leave it out", "suffix")
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise ApiError(400, f"best_of {body.best_of} cannot be served; leave it out or set it to n", "best_of")
    if body.max_tokens is not None and body.max_tokens < 0:
        raise ApiError(400, f"max_tokens {body.max_tokens} is out of range; it must be 0 or more", "max_tokens")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed; set stream to false", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for stream; set stream to true, or leave them out", "stream_options")


async def _prompt(context: Context, body: CompletionBody, given: str | list[int]) -> Prompt:
    tokens = context.tokens
    if isinstance(given, list):
        tokens.check(given, "prompt")
        return Prompt(given, tokens.decode(given) if body.echo else "", 0)
    special = body.add_special_tokens is not False
    ids = await tokens.encode(given, special=special)
    prefix = tokens.tokenizer.prefix if special else ()
    return Prompt(ids, given, sum(len(tokens.text(token)) for token in prefix))
