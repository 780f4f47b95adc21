"""What goes into the paged cache, for `bench ops`: new keys and values, alone and with head norms and rotation before.

Legend: T tokens  W = (H + 2K)·E  H query heads  K key heads  E head dim  C channel pairs
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflight.ops.attention.paged import write_kv
from rooflight.ops.rotary_cache import rotate_and_cache
from rooflight.workload.op_bench.attend import PAGE, blocks
from rooflight.workload.op_bench.case import Args, Draw, Operation
from rooflight.workload.op_bench.dense import EPS, at_least_fp32, fused_qkv, turned


def _new_kv(draw: Draw, tokens: int, heads: int, key_heads: int, head_dim: int) -> Args:
    _, k, v = fused_qkv(draw, tokens, heads, key_heads, head_dim)
    caches = (draw(blocks(tokens) + 1, PAGE, key_heads, head_dim) for _ in range(2))
    return k, v, *caches, draw.order(tokens)


def _ours_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Args:
    write_kv(k, v, k_cache, v_cache, slots)
    return k_cache, v_cache


def _plain_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Args:
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *cache.shape[2:])[slots] = new
    return k_cache, v_cache


def _step_inputs(draw: Draw, tokens: int, heads: int, key_heads: int, head_dim: int, normed: bool) -> Args:
    qkv_TW = draw(tokens, (heads + 2 * key_heads) * head_dim)
    angles_TC = draw(tokens, head_dim // 2, dtype=torch.float32)
    caches = (draw(blocks(tokens) + 1, PAGE, key_heads, head_dim) for _ in range(2))
    weights = (draw(head_dim), draw(head_dim)) if normed else (None, None)
    return qkv_TW, angles_TC.cos(), angles_TC.sin(), *caches, draw.order(tokens), heads, *weights


def _ours_step(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, heads: int, *weights: Tensor
) -> Args:
    q = rotate_and_cache(qkv, cos, sin, k_cache, v_cache, slots, heads, False, *weights, EPS)
    return q, k_cache, v_cache


def _plain_step(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, heads: int, *weights: Tensor
) -> Args:
    head_dim = k_cache.shape[-1]
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([heads, k_cache.shape[2], k_cache.shape[2]], 1)
    if weights[0] is not None:
        q, k = (
            torch.nn.functional.rms_norm(at_least_fp32(x), (head_dim,), at_least_fp32(weight), EPS).to(x.dtype)
            for x, weight in zip((q, k), weights)
        )
    return turned(q, cos, sin), *_plain_write(turned(k, cos, sin), v, k_cache, v_cache, slots)


OPERATIONS = [
    Operation(
        "rotate_and_cache",
        "head norms, rotary positions of q and k, and the cache's new keys and values, of one projection",
        make=_step_inputs,
        ours=_ours_step,
        plain=_plain_step,
        label=lambda tokens, heads, key_heads, head_dim, normed: (
            f"{tokens}×({heads}+2·{key_heads})×{head_dim}{', normed' if normed else ''}"
        ),
    ),
    Operation(
        "write_kv",
        "new keys and values, slices of one projection, into the paged cache",
        make=_new_kv,
        ours=_ours_write,
        plain=_plain_write,
        label=lambda tokens, heads, key_heads, head_dim: f"{tokens}×{key_heads}×{head_dim}",
    ),
]
