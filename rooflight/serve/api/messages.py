"""A conversation to token ids: messages as chat templates expect them, rendered and encoded."""

from __future__ import annotations

import json
from typing import Any

from rooflight.serve.api.context import Context
from rooflight.serve.api.errors import ApiError
from rooflight.serve.api.protocol import ChatBody, Message, Rendered

# What a client may not set by chat_template_kwargs, because fields of their own say it.
_OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")


def has_tools(body: ChatBody) -> bool:
    """Whether the model may call tools; raises ApiError 400 on a choice of tool that cannot be enforced."""
    if body.tool_choice not in (None, "auto", "none"):
        raise ApiError(400, "tool_choice can only be 'auto' or 'none'", "tool_choice")
    return bool(body.tools) and body.tool_choice != "none"


async def encoded(context: Context, body: Rendered, *, special: bool) -> list[int]:
    """The token ids of a conversation. A template writes its own first tokens; `special` adds the tokenizer's too."""
    if not body.messages:
        raise ApiError(400, "messages is empty; it must have at least one message", "messages")
    if body.chat_template is not None:
        raise ApiError(
            400, "chat_template is not taken from requests; start the server with --chat-template FILE", "chat_template"
        )
    wrong = next((name for name in body.chat_template_kwargs or {} if name in _OWN), None)
    if wrong is not None:
        raise ApiError(400, f"chat_template_kwargs may not have {wrong}; it is a field of its own", wrong)
    tools = None if isinstance(body, ChatBody) and not has_tools(body) else body.tools
    continued = bool(body.continue_final_message)
    text = context.template.render(
        [_plain(message, number) for number, message in enumerate(body.messages)],
        tools or None,
        add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continued,
        variables=body.chat_template_kwargs,
    )
    return await context.tokens.encode(text, special=special)


def _plain(message: Message, number: int) -> dict[str, Any]:
    """A message as templates take it: no fields without a value, and the arguments of tool calls as objects."""
    plain = {name: value for name, value in message.model_dump().items() if value is not None}
    for call in plain.get("tool_calls", ()):
        function = call.get("function")
        if not isinstance(function, dict):
            raise ApiError(400, f"messages.{number}.tool_calls has a call without function", "messages")
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError:
                raise ApiError(
                    400, f"messages.{number}.tool_calls has arguments that are no valid JSON", "messages"
                ) from None
    return plain
