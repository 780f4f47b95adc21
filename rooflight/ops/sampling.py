"""Choosing the next token from logits: greedily, or at random among what temperature, top-k, top-p and min-p leave.

Legend: B sequences  V vocabulary
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rooflight.ops.cost import Access, Cost, Movement, Primitive, elementwise_cost
from rooflight.ops.op import Op

# Passes of a radix sort over 32-bit keys, 8 bits a pass; each reads and writes key and index.
_SORT_PASSES, _SORT_ENTRY_BYTES = 4, 12


def _greedy(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(dim=-1)


def _greedy_shape(logits_BV: Tensor) -> Tensor:
    return logits_BV.new_empty((logits_BV.shape[0],), dtype=torch.int64)


def _greedy_cost(out_B: Tensor, logits_BV: Tensor) -> Cost:
    return elementwise_cost(
        logits_BV.numel(),
        (logits_BV,),
        (out_B,),
        size=(logits_BV.shape[0], logits_BV.shape[1]),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION,),
    )


greedy = Op("greedy", _greedy, cost=_greedy_cost, shape=_greedy_shape)


def _sample(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    """Inverse of the cumulative distribution at uniform_B ∈ [0, 1), over tokens from likely to unlikely.

    Kept: probability ≥ min_p · the greatest; then the top_k most likely (0: all); then the fewest that together reach
    top_p of what is left. A temperature of 0 is greedy; equal logits order by token number.
    """
    sorted_BV, order_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    greedy_B = temperature_B <= 0
    scaled_BV = sorted_BV / torch.where(greedy_B, 1.0, temperature_B.float()).unsqueeze(-1)
    # Relative to the greatest probability, so min_p compares directly and nothing has to be normalised.
    ratio_BV = torch.exp(scaled_BV - scaled_BV[:, :1])
    rank_V = torch.arange(ratio_BV.shape[1], device=ratio_BV.device)
    limit_B1 = torch.where(top_k_B > 0, top_k_B, ratio_BV.shape[1]).unsqueeze(-1)
    kept_BV = (ratio_BV >= min_p_B.unsqueeze(-1)) & (rank_V < limit_B1)
    ratio_BV = torch.where(kept_BV, ratio_BV, 0.0)
    cumulative_BV = ratio_BV.cumsum(-1)
    enough_B1 = (top_p_B * cumulative_BV[:, -1]).unsqueeze(-1)
    # The most likely token stays even at a top_p of 0.
    kept_BV = kept_BV & ((cumulative_BV - ratio_BV < enough_B1) | (rank_V == 0))
    mass_B = torch.where(kept_BV, cumulative_BV, 0.0).amax(-1)
    rank_B = (cumulative_BV < (uniform_B * mass_B).unsqueeze(-1)).sum(-1)
    return order_BV.gather(-1, torch.where(greedy_B, 0, rank_B).unsqueeze(-1)).squeeze(-1)


def _sample_shape(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    return logits_BV.new_empty((logits_BV.shape[0],), dtype=torch.int64)


def _sample_cost(
    out_B: Tensor,
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
) -> Cost:
    rows, columns = logits_BV.shape
    reads = (logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)
    # An element: divide, subtract, exp, compare with min_p, cumulative add, subtract, compare with top_p, maximum,
    # compare with the draw. A row: temperature against 0, two products. A radix sort and ranks are integer work, and
    # count only as traffic.
    cost = elementwise_cost(
        9 * rows * columns + 3 * rows,
        reads,
        (out_B,),
        size=(rows, columns),
        primitive=Primitive.REDUCTION,
        access=Access.RANDOM,
        movement=(Movement.REDUCTION, Movement.GATHER),
    )
    sort_bytes = 2 * _SORT_PASSES * _SORT_ENTRY_BYTES * rows * columns
    return replace(cost, traffic=cost.total_bytes + sort_bytes)


sample = Op("sample", _sample, cost=_sample_cost, shape=_sample_shape)
