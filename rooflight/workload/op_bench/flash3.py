"""FlashAttention-3 out of xformers' wheel, for machines without the package `flash_attn_interface`.

    pip install --no-deps xformers==0.0.34 nvidia-cuda-runtime-cu12

That wheel, unlike its successors, holds the library (torch's stable ABI, sm_90a), which names CUDA 12's runtime. The
functions are those of `flash_attn_interface`, as far as they are called here.
Legend: B sequences  S positions  H query heads  K key heads  E head dim  N pages  P tokens a page  M pages of a row
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _within(package: str, *path: str) -> Path:
    """A file of an installed package; raises ImportError where it is not there."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (file := Path(folder, *path)).exists():
            return file
    raise ImportError(
        f"no {'/'.join(path)} in {package}; pip install --no-deps xformers==0.0.34 nvidia-cuda-runtime-cu12"
    )


@functools.cache
def operators() -> Any:
    """torch.ops.flash_attn_3: fwd, bwd and get_scheduler_metadata; raises ImportError or OSError where it cannot be."""
    # Beside torch's own of CUDA 13: both use the primary context.
    ctypes.CDLL(str(_within("nvidia.cuda_runtime", "lib", "libcudart.so.12")))
    torch.ops.load_library(_within("xformers", "flash_attn_3", "_C.so"))
    return torch.ops.flash_attn_3


def forward(
    q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B,S,H,E] and natural log-sum-exp [B,H,S]; causality from the bottom right."""
    return operators().fwd(q_BSHE, k_BSKE, v_BSKE, softmax_scale=scale, is_causal=causal, num_splits=1)[:2]


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        out, lse = forward(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = {"softmax_scale": scale, "is_causal": causal}
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dq, dk, dv = (torch.empty_like(x) for x in ctx.saved_tensors[:3])
        operators().bwd(grads[0], *ctx.saved_tensors, dq=dq, dk=dk, dv=dv, **ctx.options)
        return dq, dk, dv, None, None


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Any:
    """Attention of whole sequences, with its backward."""
    return _Dense.apply(q, k, v, softmax_scale, causal)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """The last S tokens q [B,S,H,E] of each sequence over pages [N,P,K,E]; splits go by the width of the table."""
    options = {"softmax_scale": softmax_scale, "is_causal": causal, "num_splits": 0}
    return operators().fwd(q, k_cache, v_cache, seqused_k=cache_seqlens, page_table=page_table, **options)[0]


# Whoever asks for a function here asks whether it can be used.
operators()
