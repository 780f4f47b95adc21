"""Which kernel computes which attention call on an NVIDIA GPU: of each table the first that takes it.

`takes` says what a kernel can do, the order says what is faster where several can, and `reason` where that was seen.
What no kernel takes goes to the chunked reference. Forward and backward may be another kernel's each: all agree on what
lies between them, the output and the natural log-sum-exp in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.attention import cuda, cuda_packed
from rooflight.ops.op import lazy, same_kernel_dtype

MOST_CHANNELS = 256  # of a head, for the Triton kernels
HOPPER_CHANNELS = 128  # of a head, at which the Hopper kernel is ahead; and at half of them from so many keys on
HOPPER_NARROW_KEYS = 4096
LONG_DOCUMENT = 512  # tokens on average, from which the Triton kernels are ahead over packed documents


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute attention; takes, forward and backward have the arguments of the operation.

    A kernel without a backward leaves it to the first below it that takes the call and has one. repeatable: the
    backward gives the same bits every time; under `torch.use_deterministic_algorithms` no other is called.
    """

    name: str
    reason: str
    takes: Callable[..., bool]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None
    repeatable: bool = False


_hopper_takes = lazy("rooflight.ops.kernels.flash_hopper_plan", "takes")
_hopper_forward = lazy("rooflight.ops.kernels.flash_hopper", "forward")


def hopper_takes(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> bool:
    """Whether `kernels.flash_hopper` computes this call, and sooner than cuDNN; a window's time was not measured."""
    channels, keys = q_BQHE.shape[-1], k_BSKE.shape[1]
    ahead = channels == HOPPER_CHANNELS or (2 * channels == HOPPER_CHANNELS and keys >= HOPPER_NARROW_KEYS)
    return (
        ahead
        and not cuda.is_windowed(k_BSKE, causal, window)
        and _hopper_takes(q_BQHE, k_BSKE, v_BSKU, scale, causal, window, softcap, sinks_H)
    )


def hopper_forward(
    q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, scale: float, causal: bool = True, window: int = 0, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Output [B,Q,H,U] and log-sum-exp [B,H,Q]."""
    return _hopper_forward(q_BQHE, k_BSKE, v_BSKU, scale, causal, window)


def _triton_takes(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> bool:
    channels = max(q.shape[-1], v.shape[-1])
    return same_kernel_dtype(q, k, v) and channels <= MOST_CHANNELS and scale > 0 and softcap >= 0


def triton_takes(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKU: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> bool:
    """Whether `kernels.flash_forward` and `flash_backward` compute this call."""
    return _triton_takes(q_BQHE, k_BSKE, v_BSKU, scale, softcap)


def triton_takes_windows(
    q_BQHE: Tensor, k_BSKE: Tensor, v_BSKU: Tensor, scale: float, causal: bool = True, window: int = 0, *rest: Any
) -> bool:
    """Whether they compute this call, and sooner than FlashAttention-2: windows over the heads that were measured."""
    measured = q_BQHE.shape[-1] == v_BSKU.shape[-1] == HOPPER_CHANNELS and cuda.is_windowed(k_BSKE, causal, window)
    return measured and triton_takes(q_BQHE, k_BSKE, v_BSKU, scale, causal, window, *rest)


def triton_takes_packed(
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
    """Whether they compute this call over packed documents."""
    return _triton_takes(q_THE, k_TKE, v_TKU, scale, softcap)


def triton_takes_long(q_THE: Tensor, k_TKE: Tensor, v_TKU: Tensor, starts_N1: Tensor, *rest: Any) -> bool:
    """Whether they compute this call over packed documents, and sooner than FlashAttention-2."""
    long = q_THE.shape[0] >= LONG_DOCUMENT * (starts_N1.shape[0] - 1)
    measured = q_THE.shape[-1] == v_TKU.shape[-1] == HOPPER_CHANNELS
    return long and measured and triton_takes_packed(q_THE, k_TKE, v_TKU, starts_N1, *rest)


_FORWARD, _BACKWARD = "rooflight.ops.kernels.flash_forward", "rooflight.ops.kernels.flash_backward"

DENSE = (
    Kernel(
        "Hopper",
        "causal, H200: 585 TFLOP/s at 4×32×4096×128 beside cuDNN's 501, 634 beside 543 at 1×32×16384×128, 411 beside "
        "392 at 8×16×4096×64",
        hopper_takes,
        hopper_forward,
        None,
    ),
    Kernel(
        "cuDNN",
        "causal, H200: 318 TFLOP/s at 16×32×1024×64, Hopper 316; 465 backward at head dim 128, FlashAttention-2 265",
        cuda.takes_cudnn,
        cuda.cudnn_forward,
        cuda.cudnn_backward,
    ),
    Kernel(
        "Triton, windows",
        "a window of 1024 over 4096 tokens, 32:8 heads of 128: 325 and 249 TFLOP/s, FlashAttention-2 247 and 232",
        triton_takes_windows,
        lazy(_FORWARD, "attention"),
        lazy(_BACKWARD, "attention_backward"),
        repeatable=True,
    ),
    Kernel(
        "FlashAttention-2",
        "other windows, of which cuDNN has none in torch; heads of 256: 287 and 232 TFLOP/s, Triton 296 and 122",
        cuda.takes_fa2,
        cuda.fa2_forward,
        cuda.fa2_backward,
    ),
    Kernel(
        "Triton",
        "softcaps (285 and 221 TFLOP/s), sinks, fp32, value dims of their own (329 and 105)",
        triton_takes,
        lazy(_FORWARD, "attention"),
        lazy(_BACKWARD, "attention_backward"),
        repeatable=True,
    ),
)

PACKED = (
    Kernel(
        "Triton, long documents",
        "16 documents of 1024 tokens, 32:8 heads of 128: 271 and 231 TFLOP/s, FlashAttention-2 229 and 193",
        triton_takes_long,
        lazy(_FORWARD, "packed_attention"),
        lazy(_BACKWARD, "packed_attention_backward"),
        repeatable=True,
    ),
    Kernel(
        "FlashAttention-2",
        "cuDNN's variable lengths took 69 ms for its 0.32 and gave wrong gradients (torch 2.11, H200)",
        cuda_packed.takes_forward,
        cuda_packed.forward,
        cuda_packed.backward,
    ),
    Kernel(
        "Triton",
        "softcaps, fp32, values wider than keys",
        triton_takes_packed,
        lazy(_FORWARD, "packed_attention"),
        lazy(_BACKWARD, "packed_attention_backward"),
        repeatable=True,
    ),
)


def chosen(table: tuple[Kernel, ...], *args: Any) -> Kernel | None:
    """The first kernel of the table that takes the forward's arguments."""
    return next((kernel for kernel in table if kernel.takes(*args)), None)


def _entries(table: tuple[Kernel, ...]) -> tuple[Callable[..., Any], ...]:
    """What an Op wants to know: takes_forward, forward, takes_backward, backward."""

    backwards = tuple(kernel for kernel in table if kernel.backward is not None)
    repeatable = tuple(kernel for kernel in backwards if kernel.repeatable)

    def of_backward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Kernel | None:
        usable = repeatable if torch.are_deterministic_algorithms_enabled() else backwards
        return chosen(usable, q, k, v, *options)

    def takes(*args: Any) -> bool:
        return chosen(table, *args) is not None

    def forward(*args: Any) -> Any:
        kernel = chosen(table, *args)
        return None if kernel is None else kernel.forward(*args)

    # The backward's arguments are grad, q, k, v, out, lse and then the forward's options.
    def takes_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any) -> bool:
        return of_backward(q, k, v, *options) is not None

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any) -> Any:
        kernel = of_backward(q, k, v, *options)
        if kernel is None or kernel.backward is None:
            return None
        return kernel.backward(grad, q, k, v, out, lse, *options)

    return takes, forward, takes_backward, backward


takes_forward, forward, takes_backward, backward = _entries(DENSE)
takes_packed_forward, packed_forward, takes_packed_backward, packed_backward = _entries(PACKED)
