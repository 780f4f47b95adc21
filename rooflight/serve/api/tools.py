"""Tool calls as Hermes' and Qwen's templates have models write them: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

import json
import uuid
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCalls:
    """Parts a completion's text into content and tool calls as it comes; a call comes out when it is whole."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self.count = 0

    def feed(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """The content and the calls that new text brings; after the `last` nothing is held back."""
        self._held += text
        content, calls = "", []
        while True:
            mark = CLOSE if self._inside else OPEN
            place = self._held.find(mark)
            if place < 0:
                break
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            if self._inside:
                call = self._call(before)
                calls += [call] if call else []
                content += "" if call else OPEN + before + CLOSE
            else:
                content += self._between(before)
            self._inside = not self._inside
        if self._inside:
            if last:
                # A model that ends its turn within the call may leave its closing mark out.
                call = self._call(self._held)
                calls += [call] if call else []
                content += "" if call else OPEN + self._held
                self._held = ""
            return content, calls
        keep = 0 if last else _begin_of_mark(self._held)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if self.count and not last and not ready.strip():
            # Blanks after a call show only when more than blanks follows.
            self._held = ready + self._held
            return content, calls
        return content + self._between(ready), calls

    def _between(self, text: str) -> str:
        """Text outside of calls; blanks alone between calls are none."""
        return "" if self.count and not text.strip() else text

    def _call(self, text: str) -> dict[str, Any] | None:
        """OpenAI's tool call of a call's JSON; None when it is no call."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", {})
        self.count += 1
        return {
            "index": self.count - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": found["name"],
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            },
        }


def _begin_of_mark(text: str) -> int:
    """Characters at the end of a text with which a call's mark may begin."""
    return next((size for size in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-size:])), 0)
