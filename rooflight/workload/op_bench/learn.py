"""The loss, the optimizer and the gradient norm of a training step, for `bench ops`.

Legend: T tokens  D width  V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rooflight.ops.adamw import adamw
from rooflight.ops.clipping import grad_norm
from rooflight.ops.fused_loss import linear_cross_entropy
from rooflight.ops.loss import cross_entropy
from rooflight.workload.op_bench import installed
from rooflight.workload.op_bench.case import Absent, Args, Draw, Operation, Peer
from rooflight.workload.op_bench.dense import at_least_fp32

STEP, LR, BETA1, BETA2, ADAM_EPS, DECAY = 10, 1e-4, 0.9, 0.95, 1e-8, 0.1
BF16, FP32 = torch.bfloat16, torch.float32
# Types of parameters, gradients and moments, and whether fp32 copies of the parameters are kept.
STORED: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype, bool]] = {
    "fp32": (FP32, FP32, FP32, False),
    "bf16": (BF16, BF16, BF16, False),
    "bf16, fp32 states": (BF16, BF16, FP32, False),
    "bf16, fp32 masters": (BF16, FP32, FP32, True),
}


def _shapes(layers: int, width: int) -> list[tuple[int, ...]]:
    """The tensors of decoder layers with a feed-forward four times as wide and four query heads on a key head."""
    w = width
    return [(3 * w // 2, w), (w, w), (8 * w, w), (w, 4 * w), (w,), (w,)] * layers


def _parameters(layers: int, width: int) -> str:
    return f"{sum(torch.Size(shape).numel() for shape in _shapes(layers, width)) / 1e6:.3g} M"


def _update_inputs(draw: Draw, stored: str, layers: int, width: int) -> Args:
    param, grad, moment, masters = STORED[stored]
    shapes = _shapes(layers, width)
    params, grads, means, squares = (
        [draw(*shape, dtype=dtype) for shape in shapes] for dtype in (param, grad, moment, moment)
    )
    return params, grads, means, [v.abs_() for v in squares], [p.float() for p in params] if masters else []


def _ours_update(params: Any, grads: Any, means: Any, squares: Any, masters: Any) -> Args:
    adamw(params, grads, means, squares, masters, None, STEP, LR, BETA1, BETA2, ADAM_EPS, DECAY, 0)
    return params, means, squares, masters


def _plain_update(params: Any, grads: Any, means: Any, squares: Any, masters: Any) -> Args:
    """The formula of Loshchilov & Hutter 2019 (1711.05101), tensor by tensor."""
    for i, grad in enumerate(grads):
        stored = masters[i] if masters else params[i]
        value, g, m, v = (at_least_fp32(x) for x in (stored, grad, means[i], squares[i]))
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        root = (v / (1 - BETA2**STEP)).sqrt() + ADAM_EPS
        value = value - LR * DECAY * value - LR * (m / (1 - BETA1**STEP)) / root
        for target, made in ((params[i], value), (stored, value), (means[i], m), (squares[i], v)):
            target.copy_(made)
    return params, means, squares, masters


def _torch_fused(device: torch.device) -> list[Peer]:
    """torch.optim.AdamW(fused=True)'s kernel, where everything has one type."""

    def prepare(params: Any, grads: Any, means: Any, squares: Any, masters: Any) -> Args:
        if masters or len({x[0].dtype for x in (params, grads, means, squares)}) > 1:
            raise Absent
        return params, grads, means, squares, masters, [torch.full((), float(STEP), device=device) for _ in params]

    def call(params: Any, grads: Any, means: Any, squares: Any, masters: Any, steps: Any) -> Args:
        torch.ops.aten._fused_adamw_(
            *(params, grads, means, squares, [], steps),
            **{"lr": LR, "beta1": BETA1, "beta2": BETA2, "weight_decay": DECAY, "eps": ADAM_EPS},
            amsgrad=False,
            maximize=False,
        )
        return params, means, squares, masters

    return [Peer("fused", call, prepare)]


def _logits_loss(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(at_least_fp32(logits_TV), targets_T)


def _loss_inputs(draw: Draw, tokens: int, width: int, vocabulary: int) -> Args:
    return draw(tokens, width), draw(vocabulary, width) * 0.02, draw.tokens(tokens, vocabulary)


OPERATIONS = [
    Operation(
        "linear_cross_entropy",
        "the last linear layer and cross-entropy without the logits in memory; eager: full logits",
        make=_loss_inputs,
        ours=linear_cross_entropy,
        plain=lambda x, weight, targets: _logits_loss(F.linear(x, weight), targets),
        label="{}×{}→{}".format,
        peers=lambda device: installed.liger(
            "liger_fused_linear_cross_entropy", device, lambda function, *args: function(*args)
        ),
        wrt=(0, 1),
        whole=True,
    ),
    Operation(
        "cross_entropy",
        "cross-entropy of logits",
        make=lambda draw, tokens, vocabulary: (draw(tokens, vocabulary), draw.tokens(tokens, vocabulary)),
        ours=lambda logits, targets: cross_entropy(logits, targets)[0],
        plain=_logits_loss,
        label="{}×{}".format,
        wrt=(0,),
    ),
    Operation(
        "adamw",
        "AdamW's update of all tensors",
        make=_update_inputs,
        ours=_ours_update,
        plain=_plain_update,
        label=lambda stored, layers, width: f"{stored}, {_parameters(layers, width)}",
        peers=_torch_fused,
        compiles=False,
        wide=torch.float64,
    ),
    Operation(
        "grad_norm",
        "norm of all gradients",
        make=lambda draw, layers, width: ([draw(*shape) for shape in _shapes(layers, width)],),
        ours=grad_norm,
        plain=torch.nn.utils.get_total_norm,
        label=_parameters,
        compiles=False,
    ),
]
