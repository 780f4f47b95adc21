"""From a request's fields to `SamplingParams`: the model's own defaults where it is silent, the server's limits."""

from __future__ import annotations

import json
import re
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.protocol import Sampled
from rooflight.serve.params import SamplingParams, Structured
from rooflight.serve.settings import ServerSettings

_PLAIN = (
    "presence_penalty", "frequency_penalty", "seed", "min_tokens", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def params_of(
    body: Sampled,
    settings: ServerSettings,
    defaults: dict[str, Any],
    vocab_size: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How a request samples; raises ApiError 400 on what is out of range or over the server's limits."""
    most = {
        "n": (body.n, settings.max_n),
        "logprobs": (logprobs, settings.max_logprobs),
        "prompt_logprobs": (body.prompt_logprobs, settings.max_logprobs),
    }
    for name, (value, limit) in most.items():
        if value is not None and value > limit:
            raise ApiError(400, f"{name} {value} is too large; this server allows {limit}", name)
    if len(body.stop) > settings.max_stops:
        raise ApiError(400, f"stop has {len(body.stop)} texts; this server allows {settings.max_stops}", "stop")
    given = {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
    for name in _DEFAULTED:
        value = getattr(body, name)
        value = defaults.get(name) if value is None else value
        if value is not None:
            given[name] = value
    if prompt_logprobs is not None:
        given["prompt_logprobs"] = max(prompt_logprobs, given.get("prompt_logprobs", 0))
    try:
        return SamplingParams(
            n=1 if body.n is None else body.n,
            max_tokens=max_tokens,
            stop=tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logit_bias=body.logit_bias,
            logprobs=logprobs,
            structured=structured_of(body, settings),
            **given,
        ).check(vocab_size)
    except InvalidValue as error:
        # The first word of such a text is the field's name.
        name = str(error).split(" ", 1)[0]
        raise ApiError(400, str(error), name if name in type(body).model_fields else None) from error


def structured_of(body: Sampled, settings: ServerSettings) -> Structured | None:
    """What the output must match, by whichever of OpenAI's and vLLM's fields names it."""
    found: list[tuple[str, Structured]] = []
    form = body.response_format
    if form is not None and form.type == "json_object":
        found.append(("response_format", Structured("json")))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(400, "response_format json_schema needs json_schema.schema", "response_format")
        found.append(("response_format", _schema(form.json_schema.schema_)))
    given = body.structured_outputs
    if given is not None:
        found += _fields("structured_outputs.", given.json_, given.regex, given.choice, given.grammar)
        if given.json_object:
            found.append(("structured_outputs.json_object", Structured("json")))
    found += _fields("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ApiError(400, f"{names} are given; only one of them can hold", found[1][0])
    if not found:
        return None
    name, structured = found[0]
    kib = len(structured.text.encode("utf-8", "replace")) / 1024
    if kib > settings.max_grammar_kib:
        limit = settings.max_grammar_kib
        raise ApiError(400, f"{name} takes {kib:.1f} KiB; this server allows {limit:g} KiB", name)
    return structured


def _fields(
    prefix: str, schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[tuple[str, Structured]]:
    found = []
    if schema is not None:
        found.append((prefix + "json", _schema(schema)))
    if regex is not None:
        found.append((prefix + "regex", Structured("regex", regex)))
    if choice is not None:
        if not choice:
            raise ApiError(400, f"{prefix}choice is empty; give at least one text", prefix + "choice")
        found.append((prefix + "choice", Structured("regex", "|".join(f"(?:{_literal(text)})" for text in choice))))
    if grammar is not None:
        found.append((prefix + "grammar", Structured("grammar", grammar)))
    return found


def _schema(spec: str | dict[str, Any] | bool) -> Structured:
    return Structured("json_schema", spec if isinstance(spec, str) else json.dumps(spec, ensure_ascii=False))


def _literal(text: str) -> str:
    """A regex that matches the text alone; only what every dialect knows as its signs is escaped."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)
