"""Cross-entropy over logits, with its backward.

loss = mean over tokens that are not ignored of (logsumexp(z_t) − z_t[target_t]), arithmetic in fp32;
z = softcap·tanh(logits/softcap) with a softcap (Gemma 2).
Legend: T tokens  V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Cost, Count, Movement, Primitive, elementwise_cost
from rooflight.ops.op import Op, lazy, same_kernel_dtype

IGNORE = -100
_KERNELS = "rooflight.ops.kernels.cross_entropy"


def capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """fp32 logits after the softcap, and the tanh that the softcap's derivative needs."""
    z = logits.float()
    if not softcap:
        return z, None
    tanh = torch.tanh(z / softcap)
    return softcap * tanh, tanh


def row_losses(z_TV: Tensor, targets_T: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Loss of every token, zero where ignored, and logsumexp."""
    lse_T = torch.logsumexp(z_TV, dim=-1)
    kept_T = targets_T != ignore_index
    picked_T = z_TV.gather(-1, torch.where(kept_T, targets_T, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept_T, lse_T - picked_T, 0.0), lse_T


def logits_grad(
    z_TV: Tensor, tanh_TV: Tensor | None, lse_T: Tensor, targets_T: Tensor, ignore_index: int, factor: Tensor
) -> Tensor:
    """(softmax − one-hot)·factor, through the softcap's derivative 1 − tanh²; zero rows where ignored."""
    grad_TV = torch.exp(z_TV - lse_T.unsqueeze(-1))
    kept_T = targets_T != ignore_index
    rows = torch.arange(z_TV.shape[0], device=z_TV.device)
    grad_TV[rows, torch.where(kept_T, targets_T, 0)] -= 1.0
    grad_TV = torch.where(kept_T.unsqueeze(-1), grad_TV * factor, 0.0)
    return grad_TV if tanh_TV is None else grad_TV * (1 - tanh_TV * tanh_TV)


def forward_flops(tokens: Count, vocabulary: Count, softcap: float, counted: bool = True) -> Count:
    """Maximum, subtract, exp, sum an element (softcap: divide, tanh, multiply); log, add the maximum, subtract the
    target's logit, sum a row, and count the token if `counted`; one division. Every token is taken as kept: only the
    data knows."""
    return tokens * vocabulary * (7 if softcap else 4) + (5 if counted else 4) * tokens + 1


def gradient_flops(tokens: Count, vocabulary: Count, softcap: float) -> Count:
    """Subtract, exp, scale an element (softcap: square, 1 −, multiply); subtract the one of one-hot a row."""
    return tokens * vocabulary * (6 if softcap else 3) + tokens


def _cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, ignore_index: int = IGNORE, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    z_TV, _ = capped(logits_TV, softcap)
    losses_T, lse_T = row_losses(z_TV, targets_T, ignore_index)
    return losses_T.sum() / (targets_T != ignore_index).sum(), lse_T


def _takes(logits_TV: Tensor, targets_T: Tensor, ignore_index: int, softcap: float) -> bool:
    return same_kernel_dtype(logits_TV) and logits_TV.numel() > 0


def _cross_entropy_shape(
    logits_TV: Tensor, targets_T: Tensor, ignore_index: int = IGNORE, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    return (
        logits_TV.new_empty((), dtype=torch.float32),
        logits_TV.new_empty((logits_TV.shape[0],), dtype=torch.float32),
    )


def _loss_cost(flops: Count, logits_TV: Tensor, reads: tuple[Tensor, ...], writes: Any) -> Cost:
    return elementwise_cost(
        flops,
        reads,
        writes,
        size=(logits_TV.shape[0], logits_TV.shape[1]),
        primitive=Primitive.REDUCTION,
        movement=(Movement.GATHER, Movement.REDUCTION),
    )


def _cross_entropy_cost(
    out: tuple[Tensor, Tensor], logits_TV: Tensor, targets_T: Tensor, ignore_index: int, softcap: float
) -> Cost:
    flops = forward_flops(logits_TV.shape[0], logits_TV.shape[1], softcap)
    return _loss_cost(flops, logits_TV, (logits_TV, targets_T), out)


def _cross_entropy_backward(
    grad: Tensor, logits_TV: Tensor, targets_T: Tensor, lse_T: Tensor, ignore_index: int, softcap: float
) -> Tensor:
    z_TV, tanh_TV = capped(logits_TV, softcap)
    factor = grad.float() / (targets_T != ignore_index).sum()
    return logits_grad(z_TV, tanh_TV, lse_T, targets_T, ignore_index, factor).to(logits_TV.dtype)


def _backward_takes(
    grad: Tensor, logits_TV: Tensor, targets_T: Tensor, lse_T: Tensor, ignore_index: int, softcap: float
) -> bool:
    return _takes(logits_TV, targets_T, ignore_index, softcap) and lse_T.dtype == torch.float32


def _cross_entropy_backward_shape(
    grad: Tensor, logits_TV: Tensor, targets_T: Tensor, lse_T: Tensor, ignore_index: int, softcap: float
) -> Tensor:
    return logits_TV.new_empty(logits_TV.shape)


def _cross_entropy_backward_cost(
    out_TV: Tensor,
    grad: Tensor,
    logits_TV: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    ignore_index: int,
    softcap: float,
) -> Cost:
    tokens, vocabulary = logits_TV.shape
    # The gradient; the softcap's own three again; counting the tokens and one division.
    flops = gradient_flops(tokens, vocabulary, softcap) + (3 * tokens * vocabulary if softcap else 0) + tokens + 1
    return _loss_cost(flops, logits_TV, (grad, logits_TV, targets_T, lse_T), (out_TV,))


cross_entropy_backward = Op(
    "cross_entropy_backward",
    _cross_entropy_backward,
    cost=_cross_entropy_backward_cost,
    shape=_cross_entropy_backward_shape,
    kernel=lazy(_KERNELS, "cross_entropy_backward"),
    kernel_takes=_backward_takes,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TV, targets_T, ctx.ignore_index, ctx.softcap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits_TV, targets_T, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return cross_entropy_backward(grad, *ctx.saved_tensors, ctx.ignore_index, ctx.softcap), None, None, None


cross_entropy = Op(
    "cross_entropy",
    _cross_entropy,
    cost=_cross_entropy_cost,
    shape=_cross_entropy_shape,
    kernel=lazy(_KERNELS, "cross_entropy"),
    kernel_takes=_takes,
    backward=_backward,
    setup=_setup,
)
