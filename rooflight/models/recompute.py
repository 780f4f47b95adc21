"""Activation recomputation: what a layer's backward computes again instead of having kept it.

Legend: T tokens  N output width  K input width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, noop_context_fn

from rooflight.errors import RooflightError
from rooflight.ops.op import Op, find

# A frozenset names what selective recomputation throws away, as `recomputed_key` calls it; "selective" is RECOMPUTED.
Recompute = Literal["none", "selective", "full"] | frozenset[str]

# Cheap to compute and large to keep: what selective recomputation throws away (Korthikanti et al. 2205.05198, §5,
# with flash attention's scores already gone): below ten FLOPs a byte. Everything else is kept.
RECOMPUTED = frozenset(
    {
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
        "add_layer_norm",
        "rotary",
        "rotary_qkv",
        "activation",
        "gated_activation",
        "fp8_amax",
        "fp8_quantize",
        "fp8_quantize_both",
        "attention_scores",
        "attention_softmax",
        "attention_context",
    }
)


def recomputed_key(name: str, shapes: Sequence[Sequence[Any]]) -> str:
    """An operation as selective recomputation tells it from others: products also by the shape of their weight."""
    if name not in ("linear", "fp8_linear"):
        return name
    return f"{name} {shapes[1][0]}x{shapes[1][1]}"


def _selective_contexts(dropped: frozenset[str]) -> Any:
    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        op: Op | None = find(operator)
        if op is None:
            return CheckpointPolicy.PREFER_RECOMPUTE
        key = recomputed_key(op.name, [x.shape for x in args if isinstance(x, Tensor)])
        return CheckpointPolicy.PREFER_RECOMPUTE if key in dropped else CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


_recomputing: ContextVar[bool] = ContextVar("rooflight_recomputing", default=False)


def recomputing() -> bool:
    """Whether a layer runs for its backward alone, under full recomputation."""
    return _recomputing.get()


class _Recomputation:
    """Entered anew for each backward through a graph that is kept."""

    def __enter__(self) -> None:
        self._token = _recomputing.set(True)

    def __exit__(self, *exc: Any) -> None:
        _recomputing.reset(self._token)


def _full_contexts() -> Any:
    return nullcontext(), _Recomputation()


def contexts_of(recompute: Recompute) -> Callable[[], Any]:
    """The contexts that torch.utils.checkpoint runs a layer in, forward and again."""
    if recompute == "full":
        return _full_contexts
    dropped = RECOMPUTED if recompute == "selective" else recompute
    return partial(_selective_contexts, dropped) if isinstance(dropped, frozenset) else noop_context_fn


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK if ctx.needs_input_grad[1] else None, weight_NK if ctx.needs_input_grad[0] else None)
        return x_TK.new_empty((*x_TK.shape[:-1], weight_NK.shape[0]))

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RooflightError("a product left out in recomputation has no backward; please report this")


def saved_for_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Save what `ops.linear` saves, and leave out the product: an uninitialised [T, N] that nothing may read.

    For the last product of a recomputed layer, whose result only the forward needed: a quarter of a gated block's
    recomputed FLOPs. torch stops recomputing once all is saved, but a custom operator saves after it has computed.
    """
    return _Saved.apply(x_TK, weight_NK)
