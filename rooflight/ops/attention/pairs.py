"""Which keys a query sees, as a mask for references and as a count for prices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Count

NO_WINDOW = 0


def _triangle(n: Any) -> Any:
    """1 + 2 + … + n, and 0 for a negative n; symbolic n included."""
    if isinstance(n, int):
        return n * (n + 1) // 2 if n > 0 else 0
    n = torch.sym_max(n, 0)
    return n * (n + 1) // 2


def visible_pairs(query: Count, context: Count, causal: bool, window: int = NO_WINDOW) -> Count:
    """Number of (query, key) pairs that meet: the last `query` of `context` tokens look back.

    Causal: Σ_{i=context−query}^{context−1} min(i + 1, window). Not causal: query · context.
    """
    if not causal:
        return query * context
    start = context - query
    if not window:
        return query * start + query * (query + 1) // 2
    beyond = _triangle(context - window) - _triangle(start - window)
    return query * start + query * (query + 1) // 2 - beyond


def visible_keys(query: Count, context: Count, window: int = NO_WINDOW) -> Count:
    """Number of distinct keys that the last `query` of `context` tokens read, all of them without a window."""
    if not window:
        return context
    reach = window + query - 1
    if isinstance(context, int) and isinstance(reach, int):
        return min(context, reach)
    return torch.sym_min(context, reach)


def hidden_mask(query_positions: Tensor, key_positions: Tensor, causal: bool, window: int = NO_WINDOW) -> Tensor | None:
    """True where a query must not see a key, from broadcastable absolute positions; None when all is visible."""
    if not causal:
        return None
    hidden = key_positions > query_positions
    if window:
        hidden = hidden | (query_positions - key_positions >= window)
    return hidden
