"""Attention on NVIDIA GPUs by torch's own fused kernels, cuDNN's and FlashAttention-2's; `choice` says which and when.

Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def _takes(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softcap: float, sinks: Tensor | None, most_channels: int
) -> bool:
    """Cases that either computes; their causal mask starts at the first query, so Q and S must agree."""
    plain = not softcap and sinks is None and q.dtype in _HALF and q.shape[-1] == v.shape[-1]
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= most_channels
    return plain and fits and (not causal or q.shape[1] == k.shape[1])


def _left(k: Tensor, causal: bool, window: int) -> int | None:
    """Keys that a query sees before itself, where that is fewer than all; only a causal mask has a window."""
    return window - 1 if causal and window and window < k.shape[1] else None


def is_windowed(k_BSKE: Tensor, causal: bool, window: int) -> bool:
    """Whether some query sees fewer keys than a causal mask would show it."""
    return _left(k_BSKE, causal, window) is not None


def takes_cudnn(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> bool:
    """Whether `cudnn_forward` and `cudnn_backward` compute this call."""
    plain = _takes(q_BQHE, k_BSKE, v_BSKU, causal, softcap, sinks_H, most_channels=128)
    return plain and not is_windowed(k_BSKE, causal, window)


def takes_fa2(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> bool:
    """Whether `fa2_forward` and `fa2_backward` compute this call."""
    return _takes(q_BQHE, k_BSKE, v_BSKU, causal, softcap, sinks_H, most_channels=256)


def cudnn_forward(
    q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, scale: float, causal: bool = True, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Output [B,Q,H,U] and log-sum-exp [B,H,Q]."""
    batch, queries, heads, _ = q_BQHE.shape
    q, k, v = (x.transpose(1, 2) for x in (q_BQHE, k_BSKE, v_BSKU))
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.reshape(batch, heads, queries)


def fa2_forward(
    q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, scale: float, causal: bool = True, window: int = 0, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Output [B,Q,H,U] and log-sum-exp [B,H,Q]."""
    out, lse, *_ = _aten._flash_attention_forward(
        q_BQHE,
        k_BSKE,
        v_BSKU,
        None,
        None,
        q_BQHE.shape[1],
        k_BSKE.shape[1],
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=_left(k_BSKE, causal, window),
        window_size_right=0 if causal else None,
    )
    return out.contiguous(), lse.contiguous()


def _no_dropout(q: Tensor) -> Tensor:
    """The random state that the backward kernels ask for, and never read without dropout."""
    return torch.zeros((2,), dtype=torch.int64, device=q.device)


def cudnn_backward(
    grad_BQHU: Tensor,
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    out_BQHU: Tensor,
    lse_BHQ: Tensor,
    scale: float,
    causal: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and an empty one for sinks that are not there."""
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BQHU, q_BQHE, k_BSKE, v_BSKU, out_BQHU))
    seed = _no_dropout(q_BQHE)
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
        q_BQHE.shape[1],
        k_BSKE.shape[1],
        0.0,
        causal,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, q_BQHE.new_empty((0,))


def fa2_backward(
    grad_BQHU: Tensor,
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    out_BQHU: Tensor,
    lse_BHQ: Tensor,
    scale: float,
    causal: bool,
    window: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and an empty one for sinks that are not there."""
    none = q_BQHE.new_empty((0,))
    dq, dk, dv = _aten._flash_attention_backward(
        grad_BQHU.contiguous(),
        q_BQHE,
        k_BSKE,
        v_BSKU,
        out_BQHU,
        lse_BHQ,
        None,
        None,
        q_BQHE.shape[1],
        k_BSKE.shape[1],
        0.0,
        causal,
        _no_dropout(q_BQHE),
        none,
        scale=scale,
        window_size_left=_left(k_BSKE, causal, window),
        window_size_right=0 if causal else None,
    )
    return dq, dk, dv, none
