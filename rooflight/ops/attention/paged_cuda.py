"""Which calls over the paged cache the Triton kernels of `ops.kernels` compute; the others go to the references.

Legend: T new tokens  B sequences  N blocks  P tokens a block  M blocks a sequence at most
        H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflight.ops.op import KERNEL_DTYPES

CACHE_DTYPES = KERNEL_DTYPES | {torch.float8_e4m3fn}
MOST_HEAD_DIM = 256
# Heads of a group share a tile, whose output lies in registers: powers of two of the group times the head dim.
MOST_ELEMENTS = 8192
MOST_GROUP_FP32 = 16
LINE = 8  # numbers that a schedule says of a part


def _integers(*tensors: Tensor) -> bool:
    return all(x.dtype in (torch.int32, torch.int64) and x.stride(-1) == 1 for x in tensors)


def takes_write(k_TKE: Tensor, v_TKU: Tensor | None, k_NPKE: Tensor, v_NPKU: Tensor | None, slots_T: Tensor) -> bool:
    """Whether `kernels.kv_cache.write_kv` computes this call."""
    new = [x for x in (k_TKE, v_TKU) if x is not None]
    caches = [x for x in (k_NPKE, v_NPKU) if x is not None]
    return (
        len(new) >= len(caches)
        and all(x.dtype in KERNEL_DTYPES for x in new)
        and all(x.dtype in CACHE_DTYPES and x.is_contiguous() for x in caches)
        and _integers(slots_T)
    )


def takes_attention(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKU: Tensor | None,
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
) -> bool:
    """Whether `kernels.paged_attention` computes this call: keys and values equally wide, each in its own cache."""
    head_dim, key_heads = k_NPKE.shape[3], k_NPKE.shape[2]
    if v_NPKU is None or v_NPKU.shape != k_NPKE.shape or value_dim != head_dim or head_dim > MOST_HEAD_DIM:
        return False
    group, width = (1 << (n - 1).bit_length() for n in (q_THE.shape[1] // key_heads, head_dim))
    return (
        group * width <= MOST_ELEMENTS
        and (q_THE.dtype != torch.float32 or group <= MOST_GROUP_FP32)
        and q_THE.dtype in KERNEL_DTYPES
        and k_NPKE.dtype == v_NPKU.dtype
        and k_NPKE.dtype in CACHE_DTYPES
        and k_NPKE.stride() == v_NPKU.stride()
        and k_NPKE.stride(3) == 1
        and k_NPKE.stride(0) % k_NPKE.stride(1) == 0
        and _integers(block_table_BM, context_lengths_B, query_starts_B1)
        and scale > 0
    )


def takes_schedule(
    context_lengths_B: Tensor, query_starts_B1: Tensor, longest: int, key_heads: int, window: int
) -> bool:
    """Whether `kernels.paged_parts.attention_schedule` computes this call."""
    return _integers(context_lengths_B, query_starts_B1)
