"""What choosing a token costs: the formulas' arithmetic, and what the kernels on a GPU move and hold for it.

Legend: B sequences  V vocabulary
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rooflight.ops.cost import Access, Cost, Count, Movement, Primitive, elementwise_cost

# Chunks of a row at the most, and bytes of what is known of each: its greatest logit and its whole weight.
_CHUNKS, _CHUNK_BYTES = 256, 4 + 8
# A row's words beside them: how many logits lie at each depth, written as zeros, added to and read; and room for the
# tokens that are gathered, of which some hundreds are used. A test holds them to the kernels'.
_DEPTH_BYTES, _GATHERED_BYTES = 4 * 2048, 4 * 32768


def greedy_cost(out_B: Tensor, logits_BV: Tensor) -> Cost:
    return elementwise_cost(
        logits_BV.numel(),
        (logits_BV,),
        (out_B,),
        size=(logits_BV.shape[0], logits_BV.shape[1]),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION,),
    )


def sample_plain_cost(out_B: Tensor, logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Cost:
    rows, columns = logits_BV.shape
    # An element: maximum, subtract, divide, exp, scale, cumulative add, compare with the draw. A row: temperature
    # against 0, the draw's product.
    cost = elementwise_cost(
        7 * rows * columns + 2 * rows,
        (logits_BV, temperature_B, uniform_B),
        (out_B,),
        size=(rows, columns),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION, Movement.GATHER),
    )
    # Read for the greatest, and again for the weights.
    again = logits_BV.element_size() * rows * columns
    return replace(cost, traffic=cost.total_bytes + again, workspace=_CHUNKS * _CHUNK_BYTES * rows)


def sample_cost(
    out_B: Tensor,
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
    most: int = 0,
) -> Cost:
    rows, columns = logits_BV.shape
    ranked: Count = min(most, columns) if most else columns
    reads = (logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)
    # A ranked element: subtract, divide, exp, compare with min_p, scale, cumulative add, compare with top_p, compare
    # with the draw. A row: temperature against 0, two products. Sorting, selecting and ranks are integer work.
    cost = elementwise_cost(
        8 * rows * ranked + 3 * rows,
        reads,
        (out_B,),
        size=(rows, columns),
        primitive=Primitive.REDUCTION,
        access=Access.RANDOM,
        movement=(Movement.REDUCTION, Movement.GATHER),
    )
    # Read for the greatest, again for the depths, and again for the tokens of the bands.
    again = 2 * logits_BV.element_size() * rows * columns + 3 * _DEPTH_BYTES * rows
    workspace = (_CHUNKS * _CHUNK_BYTES + _DEPTH_BYTES + _GATHERED_BYTES) * rows
    cost = replace(cost, traffic=cost.total_bytes + again, workspace=workspace)
    # A CPU selects the likeliest few, which is another thing to calibrate than sorting them all.
    return cost.named("sample.selected") if most else cost
