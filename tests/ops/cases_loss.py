"""Rows of the loss operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops import loss

from . import formulas as f
from . import scalar_rest as sr
from .case import Case, Draw
from .formulas import gradients

T, V, D = 5, 11, 6
CAP, IGNORE = 3.0, loss.IGNORE


def _targets(r: Draw, ignore: bool) -> Tensor:
    targets = r.below(V, T)
    if ignore:
        targets[2] = IGNORE
    return targets


def _loss_backward_args(r: Draw, cap: float, ignore: bool) -> tuple[Any, ...]:
    logits, targets = r(T, V), _targets(r, ignore)
    return r.fp32(), logits, targets, loss.cross_entropy(logits, targets, IGNORE, cap)[1], IGNORE, cap


def _fused_loss(x: Tensor, w: Tensor, t: Tensor, cap: float, ignore: int, count: int) -> Tensor:
    mean = f.linear_cross_entropy(x, w, t, cap, ignore)
    return mean * int((t != ignore).sum()) / count if count else mean


def _with_grad(x: Tensor, w: Tensor, t: Tensor, cap: float, ignore: int, count: int) -> Any:
    one = torch.ones((), dtype=x.dtype)
    value = _fused_loss(x, w, t, cap, ignore, count)
    return value, *gradients(lambda a, b: _fused_loss(a, b, t, cap, ignore, count), (x, w), one)


def _scale_both(g: Tensor, x: Tensor, w: Tensor) -> None:
    x.mul_(g)
    w.mul_(g)


def cases() -> list[Case]:
    rows = []
    for cap, ignore in ((0.0, False), (CAP, False), (CAP, True)):
        # A row with ignored tokens has no scalar count: the price takes every token as kept.
        why = "prices take every token as kept" if ignore else ""
        label = f"{'softcap' * bool(cap)}{'-ignored' * ignore}"

        def scalar(program: Any, ignore: bool = ignore) -> Any:
            return None if ignore else program

        rows += [
            Case(
                "cross_entropy",
                lambda r, c=cap, i=ignore: (r(T, V), _targets(r, i), IGNORE, c),
                f.cross_entropy,
                scalar(sr.cross_entropy),
                (0,),
                label=label,
                why=why,
            ),
            Case(
                "cross_entropy_backward",
                lambda r, c=cap, i=ignore: _loss_backward_args(r, c, i),
                lambda g, z, t, lse, i, c: gradients(lambda y: f.cross_entropy(y, t, i, c)[0], (z,), g)[0],
                scalar(sr.cross_entropy_backward),
                label=label,
                why=why,
            ),
        ]
        # The mean over the tokens here, and over those of a larger batch.
        for count in (0, 9):
            more = label + "-count" * bool(count)
            rows += [
                Case(
                    "linear_cross_entropy",
                    lambda r, c=cap, i=ignore, n=count: (r(T, D), r(V, D), _targets(r, i), c, IGNORE, n),
                    _fused_loss,
                    scalar(sr.linear_cross_entropy),
                    label=more,
                    why=why,
                ),
                Case(
                    "linear_cross_entropy_with_grad",
                    lambda r, c=cap, i=ignore, n=count: (r(T, D), r(V, D), _targets(r, i), c, IGNORE, n),
                    _with_grad,
                    scalar(sr.linear_cross_entropy_with_grad),
                    (0, 1),
                    label=more,
                    why=why,
                ),
            ]
    rows.append(
        Case(
            "linear_cross_entropy_backward",
            lambda r: (r.fp32(), r(T, D), r(V, D)),
            _scale_both,
            sr.linear_cross_entropy_backward,
            mutates=(1, 2),
        )
    )
    return rows
