"""What stands between a layer's qkv product and its paged attention, in one pass: head norms, rotation, cache write.

q' = rotary(norm(q)) is the result; rotary(norm(k)) and v go to the cache. Each stage rounds to the tensors' type, as
the operations that it replaces do (`ops.norm`, `ops.rope`, `ops.attention.paged`); the reference calls theirs.
Legend: T tokens  H query heads  K key heads  E head dim  W = (H + 2K)·E  C rotary frequencies
        N blocks  P tokens a block
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflight.ops.attention.paged import write_kv
from rooflight.ops.attention.paged_cuda import CACHE_DTYPES, MOST_HEAD_DIM
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Part, Primitive, precision_of, tensor_bytes
from rooflight.ops.norm import rms_norm
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy, same_kernel_dtype
from rooflight.ops.rope import rotary

_INDICES = (torch.int32, torch.int64)


def _rotate_and_cache(
    qkv_TW: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    slots_T: Tensor,
    heads: int,
    interleaved: bool = False,
    q_weight_E: Tensor | None = None,
    k_weight_E: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Tensor:
    key_heads, head_dim = k_NPKE.shape[2:]
    widths = (heads * head_dim, key_heads * head_dim, key_heads * head_dim)
    q_THE, k_TKE, v_TKE = (x.unflatten(-1, (-1, head_dim)) for x in qkv_TW.split(widths, dim=-1))
    # The references themselves: the dispatcher would take as long again as one token's arithmetic.
    if q_weight_E is not None:
        q_THE = rms_norm.reference(q_THE, q_weight_E, eps, offset)
    if k_weight_E is not None:
        k_TKE = rms_norm.reference(k_TKE, k_weight_E, eps, offset)
    q_THE, k_TKE = rotary.reference(q_THE, k_TKE, cos_TC, sin_TC, interleaved)
    write_kv.reference(k_TKE, v_TKE, k_NPKE, v_NPKE, slots_T)
    return q_THE


def _rotate_and_cache_shape(
    qkv_TW: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    slots_T: Tensor,
    heads: int,
    interleaved: bool = False,
    q_weight_E: Tensor | None = None,
    k_weight_E: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Tensor:
    return qkv_TW.new_empty((qkv_TW.shape[0], heads, k_NPKE.shape[3]))


def _norm_part(
    tokens: Count, heads: Count, key_heads: Count, head_dim: Count, weights: tuple[Tensor | None, ...], offset: float
) -> Part:
    """`rms_norm`'s arithmetic: 4 an element, 3 a row, the offset once a column; its rows pass through registers."""
    flops: Count = 0
    for rows, weight in zip((tokens * heads, tokens * key_heads), weights, strict=True):
        if weight is not None:
            flops = flops + rows * (4 * head_dim + 3) + (weight.numel() if offset else 0)
    return Part("norm and residual", {VECTOR: flops}, bytes_read=tensor_bytes(weights))


def _rotate_and_cache_cost(
    out_THE: Tensor,
    qkv_TW: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    slots_T: Tensor,
    heads: int,
    interleaved: bool,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    eps: float,
    offset: float,
) -> Cost:
    tokens, _, head_dim = out_THE.shape
    key_heads, weights = k_NPKE.shape[2], (q_weight_E, k_weight_E)
    keys = tokens * key_heads * head_dim
    values_read = keys * qkv_TW.element_size()
    rotation = Part(
        "rotary",
        # Of a pair: four products, an addition and a subtraction.
        {VECTOR: 6 * tokens * (heads + key_heads) * cos_TC.shape[1]},
        bytes_read=tensor_bytes((qkv_TW, cos_TC, sin_TC)) - values_read,
        bytes_written=tensor_bytes(out_THE),
    )
    write = Part(
        "KV cache write",
        {},
        bytes_read=values_read + tensor_bytes(slots_T),
        bytes_written=keys * (k_NPKE.element_size() + v_NPKE.element_size()),
    )
    normed = any(weight is not None for weight in weights)
    norms = (_norm_part(tokens, heads, key_heads, head_dim, weights, offset),) if normed else ()
    parts = (*norms, rotation, write)
    flops: Count = 0
    for part in parts:
        flops = flops + part.flops.get(VECTOR, 0)
    return Cost(
        flops={VECTOR: flops},
        bytes_read=tensor_bytes((qkv_TW, cos_TC, sin_TC, slots_T, *weights)),
        bytes_written=rotation.bytes_written + write.bytes_written,
        primitive=Primitive.ELEMENTWISE,
        access=Access.RANDOM,
        movement=(*((Movement.REDUCTION,) if normed else ()), Movement.BROADCAST, Movement.SCATTER),
        size=(tokens, (heads + 2 * key_heads) * head_dim),
        precision=precision_of(qkv_TW),
        parts=parts,
    )


def _takes(
    qkv_TW: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    slots_T: Tensor,
    heads: int,
    interleaved: bool,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    *_: float,
) -> bool:
    tokens, channels = cos_TC.shape
    key_heads, head_dim = k_NPKE.shape[2:]
    weights = [weight for weight in (q_weight_E, k_weight_E) if weight is not None]
    return (
        qkv_TW.shape == (tokens, (heads + 2 * key_heads) * head_dim)
        and slots_T.shape == (tokens,)
        and slots_T.stride(0) == 1
        and 0 < 2 * channels <= head_dim <= MOST_HEAD_DIM
        and same_kernel_dtype(qkv_TW)
        and {x.dtype for x in (cos_TC, sin_TC, *weights)} <= KERNEL_DTYPES
        and k_NPKE.shape == v_NPKE.shape
        and all(cache.dtype in CACHE_DTYPES and cache.is_contiguous() for cache in (k_NPKE, v_NPKE))
        and slots_T.dtype in _INDICES
    )


rotate_and_cache = Op(
    "rotate_and_cache",
    _rotate_and_cache,
    cost=_rotate_and_cache_cost,
    shape=_rotate_and_cache_shape,
    kernel=lazy("rooflight.ops.kernels.qk_norm_rope", "rotate_and_cache"),
    kernel_takes=_takes,
    mutates=("k_NPKE", "v_NPKE"),
)
