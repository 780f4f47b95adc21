"""Structured output: which tokens a JSON schema, a regular expression or a grammar allows next, by llguidance.

Legend: M rows with a mask  W 32-bit words of a mask, a bit a token, lowest first
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from rooflight.errors import InvalidValue
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.params import Structured
from rooflight.serve.step import Part

KINDS = ("json_schema", "regex", "grammar", "json")
MOST_BYTES = 64 * 1024
_MOST_COMPILED = 64
# Between JSON's tokens: any blanks, but not without end, as a model that is unsure may write them.
_BLANKS: Any = {"whitespace_pattern": r"[ \n\t\r]{1,40}"}
_LONGEST_REASON = 300


class Grammars:
    """Compiled constraints over one tokenizer, the last used of them kept; safe to use from several threads.

    vocab_size: of the model's logits. eos_ids: tokens that end an output (empty: the tokenizer's own end of text).
    most_bytes: the longest schema, expression or grammar. llguidance is loaded when the first matcher is wanted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Sequence[int] | frozenset[int],
        most_bytes: int = MOST_BYTES,
    ):
        self._tokenizer, self._most_bytes = tokenizer, most_bytes
        self.eos_ids = frozenset(eos_ids) or frozenset({tokenizer.eos_id})
        # Logits may have more columns than the tokenizer has tokens; none of those is ever allowed.
        self._tokens = max(vocab_size, tokenizer.vocab_size)
        self.words = -(-self._tokens // 32)
        self._compiled: OrderedDict[Structured, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._inner: Any = None
        self._executor: Any = None

    def matcher(self, structured: Structured) -> Matcher:
        """A matcher at the beginning of an output. Raises InvalidValue on what cannot be compiled."""
        with self._lock:
            compiled = self._compiled.get(structured)
            if compiled is not None:
                self._compiled.move_to_end(structured)
        if compiled is None:
            compiled = self._compile(structured)
            with self._lock:
                self._compiled[structured] = compiled
                while len(self._compiled) > _MOST_COMPILED:
                    self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), self.words)

    def fill(self, matchers: Sequence[Matcher], masks_MW: np.ndarray) -> None:
        """Write each matcher's mask into its row of a contiguous int32 array, on several cores."""
        if len(matchers) == 1:
            matchers[0].fill(masks_MW[0])
            return
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor()
        fill_next_token_bitmask_par(self._executor, [(m.inner, row) for row, m in enumerate(matchers)], masks_MW)

    def _compile(self, structured: Structured) -> Any:
        from llguidance import LLMatcher, LLParserLimits, regex_to_lark

        kind, text = structured.kind, structured.text
        if kind not in KINDS:
            raise InvalidValue(f"structured output of kind {kind!r} is unknown; use {', '.join(KINDS)}")
        size = len(text.encode())
        if size > self._most_bytes:
            raise InvalidValue(f"the {kind} has {size} bytes; at most {self._most_bytes} are taken")
        if kind == "json":
            grammar = LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_BLANKS)
        elif kind == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(_schema(text), overrides=_BLANKS)
        elif kind == "regex":
            # \d is 0 to 9, as all but the strictest reader of Unicode means it.
            grammar = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'd')}/")
        else:
            grammar = LLMatcher.grammar_from_lark(text)
        compiled = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if compiled.is_error():
            raise InvalidValue(f"the {kind} cannot be followed: {_reason(compiled.get_error())}")
        return compiled

    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._inner is None:
                text = self._tokenizer.inner.to_str()
                self._inner = LLTokenizer(text, n_vocab=self._tokens, eos_token=sorted(self.eos_ids))
            return self._inner


class Matcher:
    """How far one output has come in what it must match."""

    def __init__(self, inner: Any, words: int):
        self.inner, self._words = inner, words
        self.advanced = 0

    def mask(self) -> np.ndarray:
        """int32 [W], a set bit for each token that may come next; ends of text where the output may stop."""
        mask_W = np.empty(self._words, np.int32)
        self.fill(mask_W)
        return mask_W

    def fill(self, mask_W: np.ndarray) -> None:
        """`mask` into a contiguous array; ends of text alone once the output is complete or does not fit."""
        self.inner.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)

    def advance(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the output; see `error` for one that does not fit."""
        self.advanced += len(tokens)
        # One by one: ends of text after the first, of a request that ignores them, are taken only so.
        for token in tokens:
            self.inner.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether nothing but an end of text may follow."""
        return self.inner.is_stopped()

    @property
    def error(self) -> str:
        """Why the output cannot go on: a token that did not fit, a constraint grown too complex; empty if neither."""
        return _reason(self.inner.get_error()) if self.inner.is_error() else ""


class Masks:
    """The matchers of requests under way, by slot; they catch up with the output whenever a mask is wanted."""

    def __init__(self, grammars: Grammars):
        self._grammars = grammars
        self._held: dict[int, tuple[tuple[str, int], Matcher]] = {}

    def rows(self, parts: Sequence[Part]) -> list[np.ndarray | None]:
        """The mask of each part's next token, or None where all tokens are allowed.

        Every output token so far must be known: params.needs_tokens keeps such requests from running ahead.
        """
        masks: list[np.ndarray | None] = [None] * len(parts)
        places = [place for place, part in enumerate(parts) if part.request.params.structured is not None]
        if places:
            masks_MW = np.empty((len(places), self._grammars.words), np.int32)
            self._grammars.fill([self._current(parts[place]) for place in places], masks_MW)
            for place, mask_W in zip(places, masks_MW, strict=True):
                masks[place] = mask_W
        return masks

    def _current(self, part: Part) -> Matcher:
        request = part.request
        tenancy, matcher = self._held.get(request.slot, (None, None))
        if matcher is None or tenancy != (request.id, request.admissions):
            # After a preemption too: it has its output still, and takes it again from the beginning.
            matcher = self._grammars.matcher(request.params.structured)  # type: ignore[arg-type]
            self._held[request.slot] = ((request.id, request.admissions), matcher)
        matcher.advance(request.tokens[len(request.prompt) + matcher.advanced :])
        return matcher


def _schema(text: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"the json_schema is no JSON: {error}; give a schema as JSON text") from error
    if not isinstance(schema, dict | bool):
        raise InvalidValue(f"the json_schema is a {type(schema).__name__}; a schema is an object, true or false")
    return json.dumps(schema)


def _reason(text: str) -> str:
    """llguidance's message on one line, without the picture of the place and the state that follow it."""
    lines = [line.strip() for line in text.split("\n<", 1)[0].splitlines()]
    kept = [line for number, line in enumerate(lines) if number == 0 or line.startswith("error")]
    return " ".join(kept)[:_LONGEST_REASON]
