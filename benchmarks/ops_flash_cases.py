"""The calls that `ops_flash_general` times, and who computes them.

E and U are the head dims of keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.attention import attention, attention_backward, choice, packed_attention, packed_attention_backward
from rooflight.ops.attention.choice import Kernel
from rooflight.ops.attention.pairs import visible_pairs
from rooflight.ops.kernels import flash_backward, flash_forward
from rooflight.ops.kernels.flash_tile import Plan

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True, slots=True)
class Case:
    """A call; `documents` of equal length fill a packed row of batch × length tokens, 0: dense."""

    batch: int = 4
    length: int = 4096
    heads: int = 32
    key_heads: int = 32
    head_dim: int = 128
    value_dim: int = 128
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    documents: int = 0
    dtype: torch.dtype = BF16


CASES = {
    "causal": Case(),
    "not causal": Case(batch=2, causal=False),
    "16k": Case(1, 16384),
    "gqa": Case(key_heads=8),
    "d64": Case(8, 4096, 16, 16, 64, 64),
    "d64, 1k": Case(16, 1024, 32, 32, 64, 64),
    "window 1k": Case(key_heads=8, window=1024),
    "gpt-oss": Case(4, 4096, 64, 8, 64, 64, window=128, sinks=True),
    "softcap": Case(key_heads=8, softcap=50.0),
    "gemma-2": Case(2, 4096, 16, 8, 256, 256, softcap=50.0),
    "d256": Case(2, 4096, 16, 16, 256, 256),
    "deepseek": Case(1, 4096, 64, 64, 192, 128),
    "d96": Case(2, 4096, 32, 32, 96, 96),
    "packed 1k": Case(key_heads=8, documents=16),
    "packed 100": Case(key_heads=8, documents=160),
    "fp32": Case(1, 4096, 16, 16, 64, 64, dtype=FP32),
    "fp32 128": Case(1, 4096, 16, 8, 128, 128, dtype=FP32),
}


def flops(case: Case) -> tuple[float, float]:
    """Of forward and backward."""
    count, length = case.batch, case.length
    if case.documents:
        count, length = case.documents, case.batch * case.length // case.documents
    pairs = count * case.heads * visible_pairs(length, length, case.causal, case.window)
    return 2.0 * pairs * (case.head_dim + case.value_dim), 2.0 * pairs * (3 * case.head_dim + 2 * case.value_dim)


@dataclass(frozen=True, slots=True)
class Inputs:
    qkv: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    options: tuple[Any, ...]


def inputs(case: Case) -> Inputs:
    tokens = (case.batch * case.length,) if case.documents else (case.batch, case.length)

    def draw(heads: int, channels: int) -> Tensor:
        return torch.randn(*tokens, heads, channels, device="cuda", dtype=case.dtype)

    qkv = (
        draw(case.heads, case.head_dim),
        draw(case.key_heads, case.head_dim),
        draw(case.key_heads, case.value_dim),
    )
    sinks = torch.randn(case.heads, device="cuda", dtype=case.dtype) if case.sinks else None
    tail = (case.window, case.softcap, sinks)
    scale = case.head_dim**-0.5
    if not case.documents:
        return Inputs(qkv, draw(case.heads, case.value_dim), (scale, case.causal, *tail))
    length, rest = divmod(tokens[0], case.documents)
    lengths = [length + (i < rest) for i in range(case.documents)]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    return Inputs(qkv, draw(case.heads, case.value_dim), (starts, max(lengths), scale, *tail))


def reference(case: Case) -> Kernel:
    ops = (packed_attention, packed_attention_backward) if case.documents else (attention, attention_backward)
    return Kernel("chunked", "", lambda *_: True, ops[0].reference, ops[1].reference)


def triton(case: Case, forward: Plan | None = None, backward: tuple[Plan, Plan] | None = None) -> Kernel:
    name = "packed_attention" if case.documents else "attention"
    run, back = getattr(flash_forward, name), getattr(flash_backward, f"{name}_backward")
    return Kernel("Triton", "", lambda *_: True, lambda *a: run(*a, forward), lambda *a: back(*a, backward))


def backward_of(kernel: Kernel, x: Inputs) -> Callable[..., Any]:
    """Its own; the operation's, where it leaves that to others."""
    packed = x.qkv[0].dim() == 3
    return kernel.backward or (choice.packed_backward if packed else choice.backward)


def all_of(kernel: Kernel, x: Inputs) -> tuple[Tensor, ...]:
    out, lse = kernel.forward(*x.qkv, *x.options)
    return out, *backward_of(kernel, x)(x.grad, *x.qkv, out, lse, *x.options)


def error_of(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(found, wanted) if b.numel()]
    return float(torch.stack(errors).max())


def flex(case: Case) -> Kernel | None:
    """torch's FlexAttention, compiled; without sinks, of a dense batch."""
    if case.sinks or case.documents:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return (q >= s) & (q - s < case.window) if case.window else q >= s

    def cap(score: Tensor, *_: Any) -> Tensor:
        return case.softcap * torch.tanh(score / case.softcap)

    mask = create_block_mask(visible, None, None, case.length, case.length) if case.causal else None
    compiled = torch.compile(flex_attention)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score = cap if case.softcap else None
        options = {"score_mod": score, "block_mask": mask, "enable_gqa": case.heads != case.key_heads}
        out: Any = compiled(q, k, v, **options)
        return out.transpose(1, 2)

    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return both(q, k, v), None

    # Its backward is autograd's: timed with the forward in it, and that taken off again.
    def with_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(both(*leaves), leaves, grad)

    return Kernel("FlexAttention", "", lambda *_: True, forward, with_backward)
