"""Attention on NVIDIA GPUs by torch's own fused kernels: cuDNN's where it applies, FlashAttention-2 for windows.

Which is faster was measured (shared/ANCHORS.md, H200: cuDNN 591 against FA2 316 TFLOP/s forward), so cuDNN comes first.
Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, softcap: float, sinks: Tensor | None) -> bool:
    """Cases that either kernel computes; their causal mask starts at the first query, so Q and S must agree."""
    plain = not softcap and sinks is None and q.dtype in _HALF and q.shape[-1] == v.shape[-1]
    return plain and (not causal or q.shape[1] == k.shape[1]) and q.shape[-1] % 8 == 0


def _windowed(k: Tensor, window: int) -> bool:
    return bool(window) and window < k.shape[1]


def takes_forward(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> bool:
    """Whether `forward` computes this call."""
    limit = 256 if _windowed(k_BSKE, window) else 128
    return _fused(q_BQHE, k_BSKE, v_BSKU, causal, softcap, sinks_H) and q_BQHE.shape[-1] <= limit


def forward(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B,Q,H,U] and log-sum-exp [B,H,Q]."""
    batch, queries, heads, _ = q_BQHE.shape
    if _windowed(k_BSKE, window):
        out, lse, *_ = _aten._flash_attention_forward(
            q_BQHE,
            k_BSKE,
            v_BSKU,
            None,
            None,
            queries,
            k_BSKE.shape[1],
            0.0,
            causal,
            False,
            scale=scale,
            window_size_left=window - 1,
            window_size_right=0,
        )
        return out.contiguous(), lse.contiguous()
    q, k, v = (x.transpose(1, 2) for x in (q_BQHE, k_BSKE, v_BSKU))
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.reshape(batch, heads, queries)


def takes_backward(
    grad_BQHU: Tensor, q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, out_BQHU: Tensor, lse_BHQ: Tensor, *mask: Any
) -> bool:
    """Whether `backward` computes this call: exactly when `forward` did."""
    return takes_forward(q_BQHE, k_BSKE, v_BSKU, *mask)


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
    softcap: float,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and an empty one for sinks that are not there."""
    queries, keys = q_BQHE.shape[1], k_BSKE.shape[1]
    none = q_BQHE.new_empty((0,))
    # Dropout is off, so the random state that the kernels ask for is never read.
    seed = torch.zeros((2,), dtype=torch.int64, device=q_BQHE.device)
    if _windowed(k_BSKE, window):
        dq, dk, dv = _aten._flash_attention_backward(
            grad_BQHU.contiguous(),
            q_BQHE,
            k_BSKE,
            v_BSKU,
            out_BQHU,
            lse_BHQ,
            None,
            None,
            queries,
            keys,
            0.0,
            causal,
            seed,
            none,
            scale=scale,
            window_size_left=window - 1,
            window_size_right=0,
        )
        return dq, dk, dv, none
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BQHU, q_BQHE, k_BSKE, v_BSKU, out_BQHU))
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse_BHQ.unsqueeze(-1),
        seed[0],
        seed[1],
        None,
        None,
        None,
        queries,
        keys,
        0.0,
        causal,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, none
