"""Log-probabilities as completions, chat completions and vLLM's prompt_logprobs write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rooflight.serve.api.tokens import Offsets, Tokens
from rooflight.serve.step import TokenLogprobs

# JSON has no −inf; OpenAI writes this for what is impossible.
LEAST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST


def _likeliest(entry: TokenLogprobs) -> list[tuple[int, float]]:
    """The likeliest tokens, and the chosen one where it is not among them."""
    if any(token == entry.token for token, _ in entry.top):
        return list(entry.top)
    return [*entry.top, (entry.token, entry.logprob)]


class Spelling:
    """How a token is written in a log-probability: its text, or its id."""

    def __init__(self, tokens: Tokens, as_ids: bool):
        self._tokens = tokens
        self._as_ids = as_ids or not tokens.present

    def __call__(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokens.text(token)

    def raw(self, token: int) -> list[int]:
        return list(self._tokens.raw(token))


def completion_logprobs(
    tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], spelling: Spelling, offsets: Offsets
) -> dict[str, list[Any]]:
    """The `logprobs` of a completion's choice for a run of tokens; a token without an entry has null."""
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry is None:
            top.append(None)
            continue
        named: dict[str, float] = {}
        for token, logprob in _likeliest(entry):
            # Tokens that spell alike, such as parts of characters, share a name: the likeliest has it.
            named.setdefault(spelling(token), _finite(logprob))
        top.append(named)
    return {
        "tokens": [spelling(token) for token in tokens],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": top,
        "text_offset": [offsets.next(token) for token in tokens],
    }


def chat_logprobs(entries: Sequence[TokenLogprobs | None], spelling: Spelling) -> dict[str, Any]:
    """The `logprobs` of a chat choice for a run of tokens."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": spelling(token), "logprob": _finite(logprob), "bytes": spelling.raw(token)}

    return {
        "content": [
            {**one(entry.token, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top]}
            for entry in entries
            if entry is not None
        ],
        "refusal": None,
    }


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], spelling: Spelling
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt a map from token ids; null for the first."""
    found: list[dict[str, dict[str, Any]] | None] = []
    for entry in entries:
        if entry is None:
            found.append(None)
            continue
        ranks = {token: place for place, (token, _) in enumerate(entry.top, 1)} | {entry.token: entry.rank}
        found.append(
            {
                str(token): {"logprob": _finite(logprob), "rank": ranks[token], "decoded_token": spelling(token)}
                for token, logprob in _likeliest(entry)
            }
        )
    return found
