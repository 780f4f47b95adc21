"""`Batch`: the host-side facts of one forward pass that tensor shapes cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rooflight.errors import RooflightError


@dataclass(frozen=True, slots=True)
class Group:
    """`count` sequences that each add `query` tokens and then hold `context` tokens, the new ones included."""

    count: Any
    query: Any
    context: Any


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one step, equal ones grouped; sizes may be symbolic.

    expert_tokens: tokens that each expert of a layer receives; None means that routing is even.
    """

    groups: tuple[Group, ...]
    expert_tokens: tuple[int, ...] | None = None

    @staticmethod
    def uniform(sequences: Any, query: Any, context: Any) -> Batch:
        return Batch((Group(sequences, query, context),))

    @staticmethod
    def of(query_lengths: Iterable[int], context_lengths: Iterable[int]) -> Batch:
        counts: dict[tuple[int, int], int] = {}
        for lengths in zip(query_lengths, context_lengths, strict=True):
            counts[lengths] = counts.get(lengths, 0) + 1
        return Batch(tuple(Group(n, query, context) for (query, context), n in counts.items()))


_current: ContextVar[Batch | None] = ContextVar("rooflight_batch", default=None)
_latest: Batch | None = None


@contextmanager
def use(batch: Batch) -> Iterator[Batch]:
    """Make `batch` the one that cost functions read inside the block."""
    global _latest
    token, before = _current.set(batch), _latest
    _latest = batch
    try:
        yield batch
    finally:
        _current.reset(token)
        _latest = before


def current_or_none() -> Batch | None:
    """The batch in force, or None outside of any.

    A thread that set none, as autograd's for a GPU, takes the one that is in force in another.
    """
    return _current.get() or _latest


def current() -> Batch:
    """The batch in force; an operation over a KV cache cannot be priced without one."""
    batch = current_or_none()
    if batch is None:
        raise RooflightError(
            "this operation's cost depends on context lengths, which no tensor shape holds; "
            "run it inside `with rooflight.ops.batch.use(Batch(...))`"
        )
    return batch
