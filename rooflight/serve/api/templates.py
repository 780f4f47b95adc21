"""Chat templates: messages to a prompt's text, by the checkpoint's Jinja template in a sandbox.

The environment is the one that templates are written for (transformers' `apply_chat_template`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rooflight.errors import InvalidValue
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.api.errors import ApiError

_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATE, _TEMPLATE_JSON, _CONFIG, _MAP = (
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# Stands at the end of a message that is to be continued; private characters that no message has a use for.
_MARK = "\uf8ff\uf8fecontinue\uf8fe\uf8ff"


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0
    )
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _raise
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


class ChatTemplate:
    """The templates of a model by name, and what their variables for special tokens hold."""

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str]):
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        self._variables: dict[str, set[str]] = {}
        self._tokens = dict(tokens)
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
                self._variables[name] = meta.find_undeclared_variables(environment.parse(source))
            except jinja2.TemplateError as error:
                raise InvalidValue(f"chat template {name!r} is no valid Jinja: {error}") from error

    @staticmethod
    def of(tokenizer: Tokenizer | None, given: str = "", directory: Path | None = None) -> ChatTemplate:
        """The template of a file that was given, else of the tokenizer's files, else of the checkpoint's directory.

        Raises InvalidValue on a file that is missing, or that is no template.
        """
        files = _files_of(directory) | (dict(tokenizer.carried) if tokenizer else {})
        tokens = _special_tokens(files)
        if tokenizer is not None:
            tokens.setdefault("eos_token", tokenizer.eos_token)
        if not given:
            return ChatTemplate(_sources(files), tokens)
        try:
            return ChatTemplate({"default": Path(given).expanduser().read_text(encoding="utf-8")}, tokens)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            raise InvalidValue(f"--chat-template {given}: {reason}; name a readable Jinja file") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a prompt; raises ApiError 400 without a template, or where it refuses the messages."""
        if not self._templates:
            raise ApiError(
                400,
                "the model has no chat template; start the server with --chat-template FILE, or use /v1/completions",
                "messages",
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            name = next(iter(self._templates))
        if tools and "tools" not in self._variables[name]:
            raise ApiError(400, "the model's chat template knows no tools; leave tools out", "tools")
        if continue_final_message:
            if add_generation_prompt:
                raise ApiError(
                    400,
                    "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
                    "continue_final_message",
                )
            messages = copy.deepcopy(messages)
            messages[-1]["content"] = messages[-1].get("content", "") + _MARK
        given = {
            **self._tokens,
            "documents": None,
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._templates[name].render(given)
        except Exception as error:  # a template is a program of others: whatever it raises is about the messages
            raise ApiError(400, f"the chat template refuses the messages: {error}", "messages") from error
        if not continue_final_message:
            return text
        if _MARK not in text:
            raise ApiError(
                400, "the chat template does not show the final message, so it cannot be continued", "messages"
            )
        return text[: text.rindex(_MARK)]


def _files_of(directory: Path | None) -> dict[str, str]:
    if directory is None:
        return {}
    names = (_TEMPLATE, _TEMPLATE_JSON, _CONFIG, _MAP)
    return {name: (directory / name).read_text(encoding="utf-8") for name in names if (directory / name).is_file()}


def _json_of(files: Mapping[str, str], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except ValueError as error:
        raise InvalidValue(f"{name} beside the tokenizer is no valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _sources(files: Mapping[str, str]) -> dict[str, str]:
    """Templates by name: the file of its own first, then the one in the tokenizer's config."""
    if _TEMPLATE in files:
        return {"default": files[_TEMPLATE]}
    found = _json_of(files, _TEMPLATE_JSON).get("chat_template") or _json_of(files, _CONFIG).get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found if {"name", "template"} <= entry.keys()}
    return dict(found) if isinstance(found, dict) else {}


def _special_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """The texts of the special tokens that the tokenizer's files name."""
    named = {**_json_of(files, _MAP), **_json_of(files, _CONFIG)}
    found = {}
    for name, token in named.items():
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (name in _TOKENS or re.fullmatch(r"\w+_token", name)):
            found[name] = token
    return found
