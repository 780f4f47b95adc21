"""The bodies of requests: OpenAI's fields and vLLM's, typed, with one clear line for what is wrong in them."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationError

from rooflight.serve.api.errors import ApiError


class Body(BaseModel):
    """A request's body: JSON types as they are (no "5" for 5), unknown fields passed over as clients expect."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


def parse(kind: type[Body], data: bytes) -> Any:
    """The body of a request; raises ApiError 400 naming the first field that is wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is no valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}") from None
        if not first["loc"]:
            raise ApiError(400, "the body must be a JSON object") from None
        param = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ApiError(400, f"{param} is missing", param) from None
        text = first["msg"].removeprefix("Value error, ")
        given = reprlib.repr(first["input"])
        raise ApiError(400, f"{param} {given}: {text[:1].lower()}{text[1:]}", param) from None


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as the list of its prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if not value:
            raise ValueError("must have at least one text or token id")
        if _is_ids(value):
            return [value]
        if all(isinstance(entry, str) for entry in value) or all(_is_ids(entry) for entry in value):
            return value
    raise ValueError("must be a text, a list of token ids, a list of texts, or a list of lists of token ids")


def _texts(value: Any) -> list[str]:
    """None, a text, or a list of texts, as a list."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return value
    raise ValueError("must be a text or a list of texts")


def _biases(value: Any) -> dict[int, float]:
    """OpenAI's map from token ids, which JSON makes texts, to what is added to their logits."""
    if value is None:
        return {}
    try:
        if isinstance(value, dict) and all(type(bias) in (int, float) for bias in value.values()):
            return {int(token): float(bias) for token, bias in value.items()}
    except (ValueError, OverflowError):
        pass
    raise ValueError("must map token ids to numbers from -100 to 100")


def _content(value: Any) -> str:
    """A message's content: a text, or text parts, which come out as one text with a line each."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"has a part of type {str(kind)[:40]!r}; only text parts can be served")
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if not isinstance(text, str):
            raise ValueError("has a text part without text")
        texts.append(text)
    return "\n".join(texts)


def _spec(value: Any) -> Any:
    if value is None or isinstance(value, (str, dict, bool)):
        return value
    raise ValueError("must be a JSON schema")


Prompts = Annotated[list[Any], BeforeValidator(_prompts)]
Texts = Annotated[list[str], BeforeValidator(_texts)]
Biases = Annotated[dict[int, float], BeforeValidator(_biases)]
Content = Annotated[str, BeforeValidator(_content)]
Schema = Annotated[Any, BeforeValidator(_spec)]


class _First(FailFast):
    """FailFast that can stand in a union."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_FIRST = _First()
# A list stops at its first wrong entry: a body of a million of them would make a million errors.
Ids = Annotated[list[int], _FIRST]
Choices = Annotated[list[str], _FIRST]
Objects = Annotated[list[dict[str, Any]], _FIRST]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    name: str | None = None
    schema_: Schema = None

    model_config = ConfigDict(alias_generator=lambda name: name.rstrip("_"))


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's ways to name what the output must match; exactly one is given."""

    json_: Schema = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None

    model_config = ConfigDict(alias_generator=lambda name: name.rstrip("_"))


class Sampled(Body):
    """What completions and chat completions share."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Texts = []
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases = {}
    user: str | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None


class CompletionBody(Sampled):
    prompt: Prompts
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class Message(BaseModel):
    """One message; fields that only a chat template knows are kept for it."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Content = ""
    tool_calls: Objects | None = None


class Rendered(Body):
    """What a chat template is rendered from."""

    messages: Annotated[list[Message], _FIRST]
    tools: Objects | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(Rendered, Sampled):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Any = None


class TokenizeBody(Rendered):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], _FIRST] | None = None  # type: ignore[assignment]
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Ids


class EmbeddingBody(Body):
    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
