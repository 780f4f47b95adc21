"""Packed documents on NVIDIA GPUs by FlashAttention-2's variable-length kernels, as torch carries them.

cuDNN's, tried on an H200 with torch 2.11, took 100 times as long and gave wrong gradients (docs/performance-log.md).

They read no length on the host, and want as many value channels as key channels: fewer are filled up with zeros.
Sinks need no kernel of their own: out and log-sum-exp of plain attention are rescaled, and with the rescaled ones the
plain backward yields the right gradients, for P = exp(s − lse) and δ = Σ grad·out are then those with sinks.
Legend: T tokens  N documents  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rooflight.ops.attention.chunked import sink_grad

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def takes_forward(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> bool:
    """Whether `forward` computes this call."""
    head_dim, value_dim = q_THE.shape[-1], v_TKU.shape[-1]
    fits = head_dim % 8 == 0 and head_dim <= 256 and value_dim <= head_dim
    return fits and not softcap and q_THE.dtype in _HALF


def _left(max_length: int, window: int) -> int | None:
    return window - 1 if window and window < max_length else None


def forward(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T,H,U] and log-sum-exp [H,T]."""
    missing = q_THE.shape[-1] - v_TKU.shape[-1]
    v_TKE = pad(v_TKU, (0, missing)) if missing else v_TKU
    lengths = (starts_N1, starts_N1, max_length, max_length)
    out, lse_HT, *_ = _aten._flash_attention_forward(
        q_THE,
        k_TKE,
        v_TKE,
        *lengths,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=_left(max_length, window),
        window_size_right=0,
    )
    out_THU = out[..., : v_TKU.shape[-1]]
    if sinks_H is not None:
        plain_HT, lse_HT = lse_HT, torch.logaddexp(lse_HT, sinks_H.float().unsqueeze(-1))
        out_THU = (out_THU * torch.exp(plain_HT - lse_HT).t().unsqueeze(-1)).to(out.dtype)
    return out_THU.contiguous(), lse_HT.contiguous()


def takes_backward(
    grad_THU: Tensor, q_THE: Tensor, k_TKE: Tensor, v_TKU: Tensor, out_THU: Tensor, lse_HT: Tensor, *rest: Any
) -> bool:
    """Whether `backward` computes this call: exactly when `forward` did."""
    return takes_forward(q_THE, k_TKE, v_TKU, *rest)


def backward(
    grad_THU: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    out_THU: Tensor,
    lse_HT: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks (empty without them)."""
    missing = q_THE.shape[-1] - v_TKU.shape[-1]
    grad, v, out = (pad(x, (0, missing)) if missing else x for x in (grad_THU, v_TKU, out_THU))
    lengths = (starts_N1, starts_N1, max_length, max_length)
    # Dropout is off, so the random state that the kernels ask for is never read.
    seed = torch.zeros((2,), dtype=torch.int64, device=q_THE.device)
    none = q_THE.new_empty((0,))
    dq, dk, dv = _aten._flash_attention_backward(
        grad.contiguous(),
        q_THE,
        k_TKE,
        v,
        out,
        lse_HT,
        *lengths,
        0.0,
        True,
        seed,
        none,
        scale=scale,
        window_size_left=_left(max_length, window),
        window_size_right=0,
    )
    if sinks_H is not None:
        delta_HT = (grad_THU.float() * out_THU.float()).sum(-1).t()
        none = sink_grad(lse_HT.unsqueeze(0), delta_HT.unsqueeze(0), sinks_H)
    return dq, dk, dv[..., : v_TKU.shape[-1]].contiguous(), none
