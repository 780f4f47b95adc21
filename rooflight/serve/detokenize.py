"""Tokens to text as they come, and the stop texts that end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rooflight.models.tokenizer import Tokenizer

_UNFINISHED = "�"
# Tokens decoded again with each new one: a decoder may join them (a leading space, bytes of one character).
_OVERLAP = 6


@dataclass(slots=True)
class Piece:
    """New text; `stop` is the stop text that ended it, if one did."""

    text: str
    stop: str | None = None


class Detokenizer:
    """One completion's text, a few tokens at a time.

    Text that may yet turn out to be the begin of a stop text, or half of a character, is held back until it is clear.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
    ):
        self._tokenizer, self._stops, self._include = tokenizer, tuple(stops), include_stop
        self._skip_special = skip_special
        self._ids: list[int] = []
        # _ids[:_settled] are decoded for good; those from _context on are decoded again with what follows.
        self._context = self._settled = 0
        self._before = ""
        self._held = ""
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def add(self, tokens: Sequence[int], last: bool = False) -> Piece:
        """The text that new tokens bring; after the `last` ones nothing is held back."""
        if self._tokenizer is None:
            return Piece("")
        text = ""
        for token in tokens:
            text += self._decode(token)
        if last:
            text += self._rest()
        return self._up_to_stop(text, last)

    def _decode(self, token: int) -> str:
        self._ids.append(token)
        whole = self._text(self._ids[self._context :])
        if whole.endswith(_UNFINISHED) and len(self._ids) - self._settled < _OVERLAP:
            # Perhaps the first bytes of a character whose others are still to come.
            return ""
        return self._settle(whole)

    def _rest(self) -> str:
        return self._settle(self._text(self._ids[self._context :])) if self._settled < len(self._ids) else ""

    def _settle(self, whole: str) -> str:
        new = whole[len(self._before) :]
        self._settled = len(self._ids)
        self._context = max(self._settled - _OVERLAP, 0)
        self._before = self._text(self._ids[self._context :])
        return new

    def _text(self, ids: Sequence[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(ids, self._skip_special)

    def _up_to_stop(self, text: str, last: bool) -> Piece:
        if not self._stops:
            return Piece(text)
        text, self._held = self._held + text, ""
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            place, stop = min(found)
            return Piece(text[: place + len(stop)] if self._include else text[:place], stop)
        if not last:
            keep = self._begin_of_stop(text)
            if keep:
                text, self._held = text[:-keep], text[-keep:]
        return Piece(text)

    def _begin_of_stop(self, text: str) -> int:
        """Characters at the end of `text` with which a stop text may begin."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
