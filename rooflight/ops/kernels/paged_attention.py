"""Paged attention on a GPU: one kernel for sequences with one new token, another for those with more.

Legend: T rows of tokens  B sequences  N blocks  P tokens a block  M blocks a sequence at most
        H query heads  K key heads  E head dim
"""

from __future__ import annotations

from torch import Tensor

from rooflight.ops.kernels import flash_hopper_paged
from rooflight.ops.kernels.paged_decode import decode
from rooflight.ops.kernels.paged_prefill import prefill


def paged_attention(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    block_table_BM: Tensor,
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    max_query: int,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    schedule_UX: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q·kᵀ) · v over each sequence's blocks, causal: [T, H, E], zeros in rows of no sequence.

    Nothing of it depends on values on the device, so that a captured launch serves other contexts; deterministic.
    """
    q_THE = q_THE if q_THE.stride(2) == 1 else q_THE.contiguous()
    out_THE = q_THE.new_empty(q_THE.shape)
    if not out_THE.numel():
        return out_THE
    cache = (k_NPKE, v_NPKE, block_table_BM, context_lengths_B, query_starts_B1)
    options = (scale, window, softcap, sinks_H)
    if max_query == 1:
        decode(out_THE, q_THE, *cache, *options, alone=True, schedule_UX=schedule_UX)
        return out_THE
    # A single sequence has more than one new token here, or is as well served by the tiles.
    mixed = block_table_BM.shape[0] > 1
    if mixed:
        decode(out_THE, q_THE, *cache, *options, alone=False, schedule_UX=schedule_UX)
    least = 2 if mixed else 1
    if flash_hopper_paged.takes(q_THE, k_NPKE, v_NPKE, block_table_BM, max_query, *options):
        flash_hopper_paged.prefill(out_THE, q_THE, *cache, scale, least)
    else:
        prefill(out_THE, q_THE, *cache, *options, least)
    return out_THE
