"""Mixture-of-experts routing: which experts a token visits, and with what weights.

Covers Mixtral (softmax, normalise), Qwen3-MoE (softmax, normalise or not), gpt-oss (softmax over the chosen),
DeepSeek-V2 (softmax, groups by their maximum, scale) and V3 (sigmoid, correction bias, groups by their top two).
Legend: T tokens  X experts  K experts a token  G groups  D width  R = T·K rows, sorted by expert
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops.cost import Cost, Count, Movement, Primitive, elementwise_cost
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy

SCORINGS = ("softmax", "sigmoid", "softmax_topk")
GROUP_SCORES = ("max", "top2")
_KERNELS = "rooflight.ops.kernels.routing"
_MOST_EXPERTS, _MOST_CHOSEN = 512, 16  # of a token's scores that one warp sorts in registers
_TINY = 1e-20  # DeepSeek-V3's guard: sigmoids may all vanish


def _scores(logits_TX: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return logits_TX.float().softmax(-1)
    if scoring == "sigmoid":
        return logits_TX.float().sigmoid()
    if scoring == "softmax_topk":
        return logits_TX.float()
    raise InvalidValue(f"scoring {scoring!r} is unknown; use one of {', '.join(SCORINGS)}")


def _within_groups(choice_TX: Tensor, groups: int, top_groups: int, group_score: str) -> Tensor:
    """Scores with those outside a token's `top_groups` best groups at −inf."""
    choice_TGX = choice_TX.unflatten(-1, (groups, -1))
    if group_score == "max":
        group_TG = choice_TGX.amax(-1)
    elif group_score == "top2":
        group_TG = choice_TGX.topk(2, dim=-1).values.sum(-1)
    else:
        raise InvalidValue(f"group_score {group_score!r} is unknown; use one of {', '.join(GROUP_SCORES)}")
    best = group_TG.topk(top_groups, dim=-1).indices
    hidden_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(-1, best, False)
    return choice_TGX.masked_fill(hidden_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def _route(
    logits_TX: Tensor,
    bias_X: Tensor | None,
    top_k: int,
    scoring: str = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """Weights (fp32) and numbers of each token's experts, the best first; bias_X sways the choice and not the weight.

    normalize divides by the sum of the chosen (softmax_topk is normalised by what it is, and ignores it).
    """
    scores_TX = _scores(logits_TX, scoring)
    choice_TX = scores_TX if bias_X is None else scores_TX + bias_X.float()
    if groups > 1:
        choice_TX = _within_groups(choice_TX, groups, top_groups, group_score)
    experts_TK = choice_TX.topk(top_k, dim=-1).indices
    weights_TK = scores_TX.gather(-1, experts_TK)
    if scoring == "softmax_topk":
        weights_TK = weights_TK.softmax(-1)
    elif normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + (_TINY if scoring == "sigmoid" else 0.0))
    return (weights_TK if scale == 1.0 else weights_TK * scale), experts_TK


def _kernel_takes(logits_TX: Tensor, top_k: int, scoring: str) -> bool:
    experts = logits_TX.shape[1]
    sizes = logits_TX.numel() > 0 and experts <= _MOST_EXPERTS and 1 <= top_k <= min(experts, _MOST_CHOSEN)
    return sizes and logits_TX.dtype in KERNEL_DTYPES and scoring in SCORINGS


def _route_takes(
    logits_TX: Tensor,
    bias_X: Tensor | None,
    top_k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> bool:
    """What the reference refuses is left to it."""
    experts = logits_TX.shape[1]
    grouped = groups == 1 or (
        experts % groups == 0 and experts // groups >= 2 and top_groups <= groups and group_score in GROUP_SCORES
    )
    return grouped and (bias_X is None or bias_X.is_contiguous()) and _kernel_takes(logits_TX, top_k, scoring)


def _route_shape(
    logits_TX: Tensor,
    bias_X: Tensor | None,
    top_k: int,
    scoring: str = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    size = (logits_TX.shape[0], top_k)
    return logits_TX.new_empty(size, dtype=torch.float32), logits_TX.new_empty(size, dtype=torch.int64)


def _routing_cost(flops: Count, logits_TX: Tensor, reads: Any, writes: Any) -> Cost:
    return elementwise_cost(
        flops,
        reads,
        writes,
        size=(logits_TX.shape[0], logits_TX.shape[1]),
        primitive=Primitive.DYNAMIC,
        movement=(Movement.REDUCTION, Movement.GATHER),
    )


def _score_flops(tokens: Count, experts: Count, top_k: int, scoring: str) -> Count:
    """Softmax: maximum, subtract, exp, sum, divide; sigmoid: negate, exp, add, divide."""
    return tokens * {"softmax": 5 * experts, "sigmoid": 4 * experts, "softmax_topk": 5 * top_k}[scoring]


def _normalize_flops(tokens: Count, top_k: int, scoring: str, normalize: bool) -> Count:
    """Sum and divide; one addition of the guard with sigmoids."""
    if not normalize or scoring == "softmax_topk":
        return 0
    return tokens * (2 * top_k + (1 if scoring == "sigmoid" else 0))


def _route_cost(
    out: tuple[Tensor, Tensor],
    logits_TX: Tensor,
    bias_X: Tensor | None,
    top_k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> Cost:
    tokens, experts = logits_TX.shape
    # The k greatest of n are k passes of a maximum: k·n comparisons.
    flops = _score_flops(tokens, experts, top_k, scoring) + tokens * top_k * experts
    flops = flops + _normalize_flops(tokens, top_k, scoring, normalize)
    if bias_X is not None:
        flops = flops + tokens * experts
    if groups > 1:
        inside = experts if group_score == "max" else 2 * experts + groups
        flops = flops + tokens * (inside + top_groups * groups)
    if scale != 1.0:
        flops = flops + tokens * top_k
    return _routing_cost(flops, logits_TX, (logits_TX, bias_X), out)


def _route_backward(
    grad_TK: Tensor, logits_TX: Tensor, experts_TK: Tensor, scoring: str, normalize: bool, scale: float
) -> Tensor:
    scores_TX = _scores(logits_TX, scoring)
    picked_TK = scores_TX.gather(-1, experts_TK)
    grad = grad_TK.float() if scale == 1.0 else grad_TK.float() * scale
    if scoring == "softmax_topk":
        probs = picked_TK.softmax(-1)
        grad = probs * (grad - (grad * probs).sum(-1, keepdim=True))
        return torch.zeros_like(scores_TX).scatter_(-1, experts_TK, grad).to(logits_TX.dtype)
    if normalize:
        total = picked_TK.sum(-1, keepdim=True) + (_TINY if scoring == "sigmoid" else 0.0)
        grad = (grad - (grad * (picked_TK / total)).sum(-1, keepdim=True)) / total
    if scoring == "sigmoid":
        grad = grad * picked_TK * (1 - picked_TK)
        return torch.zeros_like(scores_TX).scatter_(-1, experts_TK, grad).to(logits_TX.dtype)
    inner = (grad * picked_TK).sum(-1, keepdim=True)
    grad_TX = torch.zeros_like(scores_TX).scatter_(-1, experts_TK, grad)
    return (scores_TX * (grad_TX - inner)).to(logits_TX.dtype)


def _route_backward_shape(
    grad_TK: Tensor, logits_TX: Tensor, experts_TK: Tensor, scoring: str, normalize: bool, scale: float
) -> Tensor:
    return logits_TX.new_empty(logits_TX.shape)


def _route_backward_cost(
    out_TX: Tensor,
    grad_TK: Tensor,
    logits_TX: Tensor,
    experts_TK: Tensor,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Cost:
    tokens, experts = logits_TX.shape
    top_k = experts_TK.shape[1]
    # Scores again, only of the chosen where each stands alone (sigmoid). Then, of a chosen one: scale; product, sum,
    # subtract, divide twice for the normalisation and the sum of the chosen.
    flops = 0 if scale == 1.0 else tokens * top_k
    flops = flops + _score_flops(tokens, top_k if scoring == "sigmoid" else experts, top_k, scoring)
    if normalize and scoring != "softmax_topk":
        flops = flops + tokens * (6 * top_k + (1 if scoring == "sigmoid" else 0))
    # Sigmoid: s(1 − s)·g; softmax: product, sum of the chosen, then subtract, multiply everywhere, or among the chosen.
    if scoring == "sigmoid":
        flops = flops + 3 * tokens * top_k
    else:
        flops = flops + 2 * tokens * top_k + 2 * tokens * (top_k if scoring == "softmax_topk" else experts)
    return _routing_cost(flops, logits_TX, (grad_TK, logits_TX, experts_TK), (out_TX,))


route_backward = Op(
    "route_backward",
    _route_backward,
    cost=_route_backward_cost,
    shape=_route_backward_shape,
    kernel=lazy(_KERNELS, "route_backward"),
    kernel_takes=lambda grad_TK, logits_TX, experts_TK, scoring, *_: _kernel_takes(
        logits_TX, experts_TK.shape[1], scoring
    ),
)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TX, _, _, ctx.scoring, ctx.normalize, ctx.scale, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits_TX, output[1])


def _route_op_backward(ctx: Any, grad_TK: Tensor, _: Any) -> tuple[Any, ...]:
    grad_TX = route_backward(grad_TK, *ctx.saved_tensors, ctx.scoring, ctx.normalize, ctx.scale)
    return grad_TX, None, None, None, None, None, None, None, None


route = Op(
    "route",
    _route,
    cost=_route_cost,
    shape=_route_shape,
    kernel=lazy(_KERNELS, "route"),
    kernel_takes=_route_takes,
    backward=_route_op_backward,
    setup=_route_setup,
)
