"""Tokens to text as they come, and the stop texts that end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rooflight.models.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
# Bytes of a character at most, and so tokens too.
_LONGEST = 4
# Tokens that make no character and are decoded together: without a limit, time would grow with their square.
_HOPELESS = 64


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
        prompt: Sequence[int] = (),
    ):
        self._tokenizer, self._stops, self._include = tokenizer, tuple(stops), include_stop
        self._skip_special = skip_special
        # A decoder may drop the space that a text begins with: with the prompt's end before it there is none to drop.
        self._ids: list[int] = list(prompt[-_LONGEST:])
        # _ids[:_settled] end with a whole character. Those from _context on are decoded again with what follows, for a
        # decoder may leave out a space at the begin; _before is what they gave already.
        self._context, self._settled = 0, len(self._ids)
        self._before = self._text(self._ids)
        self._held = ""
        self._longest = max((len(stop) for stop in self._stops), default=0)

    def add(self, tokens: Sequence[int], last: bool = False, may_stop: bool = True) -> Piece:
        """The text that new tokens bring; after the `last` ones nothing is held back.

        may_stop: whether a stop text that these tokens complete ends the output.
        """
        if self._tokenizer is None:
            return Piece("")
        text = ""
        for token in tokens:
            self._ids.append(token)
            text += self._decode(last=False)
        if last:
            text += self._decode(last)
        return self._up_to_stop(text, last, may_stop)

    def _decode(self, last: bool) -> str:
        whole = self._text(self._ids[self._context :])
        unsettled = len(self._ids) - self._settled
        unfinished = whole.endswith(_UNFINISHED) and unsettled < _HOPELESS and not last
        if unfinished and unsettled < _LONGEST:
            # Perhaps the first bytes of a character whose others are still to come.
            return ""
        if not whole.startswith(self._before):
            # Some decoders let bytes that make no character spoil whole ones before them; what was told stays.
            self._context, self._before = self._settled, ""
            whole = self._text(self._ids[self._context :])
        if unfinished:
            # Bytes that make no character; only the last may yet be the begin of one.
            new, self._before = whole[len(self._before) : -1], whole[:-1]
            return new
        return self._settle(whole)

    def _settle(self, whole: str) -> str:
        new = whole[len(self._before) :]
        if new:
            self._context = self._settled
        self._settled = len(self._ids)
        self._before = self._text(self._ids[self._context :])
        return new

    def _text(self, ids: Sequence[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(ids, self._skip_special)

    def _up_to_stop(self, text: str, last: bool, may_stop: bool) -> Piece:
        if not self._stops:
            return Piece(text)
        text, self._held = self._held + text, ""
        # The stop text that is complete first, of several the longest: wherever tokens end, the text is the same.
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if may_stop and stop in text]
        if found:
            end, _, stop = min(found)
            return Piece(text[: end if self._include else end - len(stop)], stop)
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
