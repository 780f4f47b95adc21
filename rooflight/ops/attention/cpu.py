"""Attention on a CPU by torch's own fused kernel, where it applies.

The kernel works on blocks of 512 keys and skips only whole ones, so that below a thousand tokens it computes what a
causal mask hides, and it knows no window. Queries are therefore handed to it a tile at a time, with the keys that the
tile sees: measured at 512 tokens (12 heads of 64, one core, fp32), 23% less time forward and 34% less backward.
Key heads shared by a group of query heads go in as they are (pytorch/pytorch#157893), but for the backward in half
precision: there the kernel would add a group's gradients up in bf16 (8 heads on one: 0.8% off where 0.4% can be had).
Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rooflight.ops.attention import pairs
from rooflight.ops.attention.chunked import expand_heads, sum_groups

_TILE = 128
# Beyond these many queries enough whole blocks are skipped without tiles.
_TILED = 1024
# In half precision the backward kernel packs its operands anew in each call: up to these many queries fp32 is faster
# (8 sequences of 200 tokens: 31 against 45 ms; 200 of 20: 33 against 148), beyond them one whole call.
_FP32_BACKWARD = 512

_aten = torch.ops.aten


def takes(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> bool:
    """Whether the fused kernel computes this call; its causal mask is aligned to the first query."""
    aligned = not causal or q_BQHE.shape[1] == k_BSKE.shape[1]
    plain = not softcap and sinks_H is None and q_BQHE.shape[-1] == v_BSKU.shape[-1]
    return q_BQHE.device.type == "cpu" and plain and aligned


def _statistics(q: Tensor) -> torch.dtype:
    """The kernel's own precision of the log-sum-exp."""
    return torch.promote_types(q.dtype, torch.float32)


def _tiles(q_BQHE: Tensor, causal: bool, window: int, most: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of a tile, the keys that it sees, and which of them each row does not; nothing where one call serves."""
    queries = q_BQHE.shape[1]
    window = window if window < queries else 0
    if not causal or not (window or _TILE < queries <= most):
        return
    width = min(queries, _TILE + window - 1) if window else queries
    # Aligned to its lower right corner, one mask serves every tile.
    mask = torch.zeros((_TILE, width), dtype=q_BQHE.dtype)
    hidden = pairs.hidden_mask(torch.arange(width - _TILE, width).unsqueeze(-1), torch.arange(width), causal, window)
    if hidden is not None:
        mask.masked_fill_(hidden, float("-inf"))
    for start in range(0, queries, _TILE):
        stop = min(start + _TILE, queries)
        first = max(0, start - window + 1) if window else 0
        yield slice(start, stop), slice(first, stop), mask[_TILE - (stop - start) :, width - (stop - first) :]


def forward(
    q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Output [B,Q,H,U] and log-sum-exp [B,H,Q]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BQHE, k_BSKE, v_BSKU))
    fused = _aten._scaled_dot_product_flash_attention_for_cpu
    tiles = list(_tiles(q_BQHE, causal, window, _TILED))
    if not tiles:
        out, lse = fused(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    out_BQHU, lse_BHQ = q_BQHE.new_empty(q_BQHE.shape), q_BQHE.new_empty(q.shape[:3], dtype=_statistics(q))
    for rows, seen, mask in tiles:
        out, lse = fused(q[:, :, rows], k[:, :, seen], v[:, :, seen], 0.0, False, attn_mask=mask, scale=scale)
        out_BQHU[:, rows], lse_BHQ[:, :, rows] = out.transpose(1, 2), lse
    return out_BQHU, lse_BHQ


def backward(
    grad_BQHU: Tensor,
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    out_BQHU: Tensor,
    lse_BHQ: Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    queries = q_BQHE.shape[1]
    tensors = (grad_BQHU, q_BQHE, k_BSKE, v_BSKU, out_BQHU)
    half = q_BQHE.dtype in (torch.bfloat16, torch.float16)
    if half and (queries <= _FP32_BACKWARD or window):
        grad, q, k, v, out = (x.float() for x in tensors)
        dq, dk, dv = (x.to(q_BQHE.dtype) for x in backward(grad, q, k, v, out, lse_BHQ, scale, causal, window))
        return dq, dk, dv
    grad, q, k, v, out = (x.transpose(1, 2) for x in tensors)
    lse_BHQ = lse_BHQ.to(_statistics(q))
    fused = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    tiles = [] if half else list(_tiles(q_BQHE, causal, window, _TILED))
    if not tiles:
        if half:
            k, v = (expand_heads(x, q_BQHE.shape[2]) for x in (k_BSKE, v_BSKU))
        dq, dk, dv = fused(grad, q, k, v, out, lse_BHQ, 0.0, causal, scale=scale)
        key_heads = k_BSKE.shape[2]
        return dq.transpose(1, 2).contiguous(), sum_groups(dk, key_heads), sum_groups(dv, key_heads)
    dq_BQHE, dk_BSKE, dv_BSKU = q_BQHE.new_empty(q_BQHE.shape), k.new_zeros(k_BSKE.shape), v.new_zeros(v_BSKU.shape)
    for rows, seen, mask in tiles:
        of_rows = (x[:, :, rows] for x in (grad, q))
        of_keys = (x[:, :, seen] for x in (k, v))
        made = (out[:, :, rows], lse_BHQ[:, :, rows])
        dq, dk_seen, dv_seen = fused(*of_rows, *of_keys, *made, 0.0, False, attn_mask=mask, scale=scale)
        dq_BQHE[:, rows] = dq.transpose(1, 2)
        dk_BSKE[:, seen] += dk_seen.transpose(1, 2)
        dv_BSKU[:, seen] += dv_seen.transpose(1, 2)
    return dq_BQHE, dk_BSKE, dv_BSKU
