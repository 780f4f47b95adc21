"""How many (query, key) pairs a mask leaves visible, exactly, in closed form."""

from __future__ import annotations

import torch

from rooflight.ops.cost import Count


def _sum_to(limit: Count, keys: Count) -> Count:
    """Σ_{t ≤ limit} clip(t, 0, keys)."""
    if isinstance(limit, int) and limit <= 0:
        return 0
    positive = torch.sym_max(limit, 0)
    capped = torch.sym_min(positive, keys)
    return capped * (capped + 1) // 2 + (positive - capped) * keys


def _at_most(offset: Count, queries: Count, keys: Count) -> Count:
    """Pairs with key ≤ query + offset."""
    return _sum_to(queries + offset, keys) - _sum_to(offset, keys)


def visible_pairs(
    queries: Count, keys: Count, *, left: Count | None = None, right: Count | None = None, offset: Count = 0
) -> Count:
    """Pairs with query + offset − left ≤ key ≤ query + offset + right; None is no limit on that side.

    Causal is right = 0: with offset 0 the mask's top left corner is aligned, with offset = keys − queries its bottom
    right. A sliding window of w keys is also left = w − 1.
    """
    if left is None and right is None:
        return queries * keys
    upper = queries * keys if right is None else _at_most(offset + right, queries, keys)
    return upper if left is None else upper - _at_most(offset - left - 1, queries, keys)
