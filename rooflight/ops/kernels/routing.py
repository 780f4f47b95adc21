"""Routing kernels: a token's scores, its best experts and their weights in one launch, and the gradient in another.

One warp serves one token. The best of what is left is the greatest of 64-bit keys, a score above and a number below, so
that one reduction finds both; of equal scores the first expert wins.
Legend: T tokens  X experts  K experts a token  G groups  P experts of a group
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import power_of_2

LEAST = tl.constexpr(-(2**63))
LOW = tl.constexpr(0x7FFFFFFF)
TINY = tl.constexpr(1e-20)  # DeepSeek-V3's guard: sigmoids may all vanish


@triton.jit
def _keys(value, number):
    """Whole numbers in the order of the values (NaN the greatest) and, among equals, against that of the numbers."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & LOW)
    return (ordered.to(tl.int64) << 32) | (number ^ LOW).to(tl.int64)


@triton.jit
def _scores(logits_X, SCORING: tl.constexpr):
    """fp32; logits that are no expert's are −∞."""
    if SCORING == "softmax":
        power_X = tl.exp(logits_X - tl.max(logits_X, 0))
        score_X = power_X / tl.sum(power_X, 0)
    elif SCORING == "sigmoid":
        score_X = 1.0 / (1.0 + tl.exp(-logits_X))
    else:
        tl.static_assert(SCORING == "softmax_topk")
        score_X = logits_X
    return score_X


@triton.jit
def _best_groups(
    choice_GP, number_GP, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SCORE: tl.constexpr, G: tl.constexpr
):
    """Whether each group is among the token's best: by its best expert, or by the sum of its best two."""
    group_G = tl.max(choice_GP, 1)
    if GROUP_SCORE == "top2":
        key_GP = _keys(choice_GP, number_GP)
        first = key_GP == tl.max(key_GP, 1)[:, None]
        group_G += tl.max(tl.where(first, float("-inf"), choice_GP), 1)
    number_G = tl.arange(0, G)
    key_G = tl.where(number_G < GROUPS, _keys(group_G, number_G), LEAST)
    kept_G = number_G < 0
    for _ in tl.static_range(TOP_GROUPS):
        best = key_G == tl.max(key_G, 0)
        kept_G |= best
        key_G = tl.where(best, LEAST, key_G)
    return kept_G


@triton.jit
def _route_kernel(
    weights_ptr,
    experts_ptr,
    logits_ptr,
    bias_ptr,
    stride,
    scale,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    within_P = tl.arange(0, P)[None, :]
    number_GP = tl.arange(0, G)[:, None] * (EXPERTS // GROUPS) + within_P
    is_expert_GP = (within_P < EXPERTS // GROUPS) & (number_GP < EXPERTS)
    number_X, is_expert_X = tl.reshape(number_GP, (G * P,)), tl.reshape(is_expert_GP, (G * P,))
    logits_X = tl.load(logits_ptr + token * stride + number_X, is_expert_X, float("-inf")).to(tl.float32)
    score_X = _scores(logits_X, SCORING)
    choice_X = score_X
    if bias_ptr is not None:
        choice_X += tl.load(bias_ptr + number_X, is_expert_X, 0.0).to(tl.float32)
    if GROUPS > 1:
        choice_GP = tl.where(is_expert_GP, tl.reshape(choice_X, (G, P)), float("-inf"))
        kept_G = _best_groups(choice_GP, number_GP, GROUPS, TOP_GROUPS, GROUP_SCORE, G)
        choice_X = tl.reshape(tl.where(kept_G[:, None], choice_GP, float("-inf")), (G * P,))
    key_X = tl.where(is_expert_X, _keys(choice_X, number_X), LEAST)
    number_K = tl.arange(0, K)
    weight_K = tl.full((K,), float("-inf") if SCORING == "softmax_topk" else 0.0, tl.float32)
    expert_K = tl.zeros((K,), tl.int64)
    for k in tl.static_range(TOP_K):
        best = tl.max(key_X, 0)
        is_best_X = key_X == best
        weight_K = tl.where(number_K == k, tl.sum(tl.where(is_best_X, score_X, 0.0), 0), weight_K)
        expert_K = tl.where(number_K == k, (best & LOW) ^ LOW, expert_K)
        key_X = tl.where(is_best_X, LEAST, key_X)
    if SCORING == "softmax_topk":
        power_K = tl.exp(weight_K - tl.max(weight_K, 0))
        weight_K = power_K / tl.sum(power_K, 0)
    elif NORMALIZE:
        weight_K = weight_K / (tl.sum(weight_K, 0) + (TINY if SCORING == "sigmoid" else 0.0))
    at_K = token * TOP_K + number_K
    tl.store(weights_ptr + at_K, weight_K * scale, number_K < TOP_K)
    tl.store(experts_ptr + at_K, expert_K, number_K < TOP_K)


@triton.jit
def _route_backward_kernel(
    out_ptr,
    grad_ptr,
    logits_ptr,
    experts_ptr,
    stride,
    scale,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    number_X, number_K = tl.arange(0, X), tl.arange(0, K)
    chosen_K, at_K = number_K < TOP_K, token * TOP_K + number_K
    row_ptr = logits_ptr + token * stride
    expert_K = tl.load(experts_ptr + at_K, chosen_K, EXPERTS)
    grad_K = tl.load(grad_ptr + at_K, chosen_K, 0.0).to(tl.float32) * scale
    picked_K = tl.load(row_ptr + expert_K, chosen_K, float("-inf")).to(tl.float32)
    score_X = tl.zeros((X,), tl.float32)
    if SCORING == "softmax":
        logits_X = tl.load(row_ptr + number_X, number_X < EXPERTS, float("-inf")).to(tl.float32)
        greatest = tl.max(logits_X, 0)
        power_X = tl.exp(logits_X - greatest)
        total = tl.sum(power_X, 0)
        score_X, picked_K = power_X / total, tl.exp(picked_K - greatest) / total
    else:
        # The chosen among themselves (softmax_topk), or each alone (sigmoid).
        picked_K = _scores(picked_K, "sigmoid" if SCORING == "sigmoid" else "softmax")
    if NORMALIZE and SCORING != "softmax_topk":
        total = tl.sum(picked_K, 0) + (TINY if SCORING == "sigmoid" else 0.0)
        grad_K = tl.where(chosen_K, (grad_K - tl.sum(grad_K * (picked_K / total), 0)) / total, 0.0)
    grad_X = tl.zeros((X,), tl.float32)
    if SCORING == "softmax":
        grad_X -= tl.sum(grad_K * picked_K, 0)
    elif SCORING == "sigmoid":
        grad_K = grad_K * picked_K * (1.0 - picked_K)
    else:
        grad_K = picked_K * (grad_K - tl.sum(grad_K * picked_K, 0))
    for k in tl.static_range(TOP_K):
        here = number_K == k
        expert = tl.sum(tl.where(here, expert_K, 0), 0)
        grad_X += tl.where(number_X == expert, tl.sum(tl.where(here, grad_K, 0.0), 0), 0.0)
    if SCORING == "softmax":
        grad_X *= score_X
    tl.store(out_ptr + token * EXPERTS + number_X, grad_X, number_X < EXPERTS)


def _rows(logits_TX: Tensor) -> Tensor:
    return logits_TX if logits_TX.stride(1) == 1 else logits_TX.contiguous()


def route(
    logits_TX: Tensor,
    bias_X: Tensor | None,
    top_k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """Weights (fp32) and numbers of each token's experts, the best first, of equals the first."""
    tokens, experts = logits_TX.shape
    logits_TX = _rows(logits_TX)
    weights_TK = logits_TX.new_empty((tokens, top_k), dtype=torch.float32)
    experts_TK = logits_TX.new_empty((tokens, top_k), dtype=torch.int64)
    _route_kernel[(tokens,)](
        weights_TK,
        experts_TK,
        logits_TX,
        bias_X,
        logits_TX.stride(0),
        float(scale),
        TOP_K=top_k,
        SCORING=scoring,
        NORMALIZE=normalize,
        EXPERTS=experts,
        GROUPS=groups,
        TOP_GROUPS=top_groups,
        GROUP_SCORE=group_score,
        K=power_of_2(top_k),
        G=power_of_2(groups),
        P=power_of_2(experts // groups),
        num_warps=1,
    )
    return weights_TK, experts_TK


def route_backward(
    grad_TK: Tensor, logits_TX: Tensor, experts_TK: Tensor, scoring: str, normalize: bool, scale: float
) -> Tensor:
    """Gradient of the logits, given that of the weights; that of the choice is zero."""
    tokens, experts = logits_TX.shape
    logits_TX = _rows(logits_TX)
    out_TX, top_k = logits_TX.new_empty((tokens, experts)), experts_TK.shape[1]
    _route_backward_kernel[(tokens,)](
        out_TX,
        grad_TK.contiguous(),
        logits_TX,
        experts_TK.contiguous(),
        logits_TX.stride(0),
        float(scale),
        TOP_K=top_k,
        SCORING=scoring,
        NORMALIZE=normalize,
        EXPERTS=experts,
        K=power_of_2(top_k),
        X=power_of_2(experts),
        num_warps=1,
    )
    return out_TX
