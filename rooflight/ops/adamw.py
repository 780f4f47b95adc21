"""AdamW's update as one operation over all tensors of a step.

g ← scale·g; m ← m + (1−β₁)(g − m); v ← β₂v + (1−β₂)g²;
p ← p(1 − lr·λ) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε) (Loshchilov & Hutter 2019, 1711.05101), arithmetic in fp32
whatever the storage types are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Cost, Count, elementwise_cost
from rooflight.ops.op import KERNEL_DTYPES, Op, lazy

# Bits of an fp32 number's significand that a storage type drops.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
BLOCK = 2**18  # elements that are worked on together where a CPU has to make fp32 copies
SEED_STRIDE = 1_000_003  # sets the random streams of neighbouring seeds' tensors apart


def elements_of(tensors: list[Tensor]) -> Count:
    """Number of elements of all the tensors together."""
    total: Count = 0
    for tensor in tensors:
        total = total + tensor.numel()
    return total


def stochastically_rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 values rounded to bf16 or fp16, up or down with the chance that makes the mean exact (1710.03740).

    What the type holds exactly stays; what is not finite or outside its range rounds to nearest, as always.
    """
    words = torch.empty(-(-value.numel() // 4), dtype=torch.int64, device=value.device)
    random = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: value.numel()].view(value.shape)
    mask = (1 << DROPPED_BITS[dtype]) - 1
    info = torch.finfo(dtype)
    # fp16's subnormals are evenly spaced; shifted into the first normal binade, they are so in fp32 too.
    shift = torch.where(value.abs() < info.smallest_normal, info.smallest_normal, 0.0).copysign(value)
    if dtype == torch.bfloat16:
        shift = torch.zeros_like(shift)
    bits = (value + shift).view(torch.int32) + (random.to(torch.int32) & mask)
    rounded = (bits & ~mask).view(torch.float32) - shift
    return torch.where(value.abs() <= info.max, rounded, value).to(dtype)


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    scale: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    if scale is not None and not bool(torch.isfinite(scale)):
        return
    hyper = (step, lr, beta1, beta2, eps, weight_decay)
    factor = None if scale is None or scale == 1 else scale
    for i, param in enumerate(params):
        stored = (masters[i] if masters else param, exp_avgs[i], exp_avg_sqs[i])
        rounds_by_chance = seed and any(tensor.dtype in DROPPED_BITS for tensor in stored)
        if not masters and not rounds_by_chance and _torch_takes(*stored, grads[i]):
            _torch_update_(*stored, grads[i], *hyper, factor)
            continue
        generator = None
        if seed:
            generator = torch.Generator(param.device).manual_seed((seed * SEED_STRIDE + i) % 2**63)
        for param_block, grad_block, *stored_blocks in _blocks(param, grads[i], *stored):
            # Of a block that already is fp32, float() is the block itself and is updated in place.
            value, mean, square = (block.float() for block in stored_blocks)
            grad = grad_block.float() if factor is None else grad_block.float() * factor
            update = _torch_update_ if _torch_takes(value, mean, square, grad) else _update_
            update(value, mean, square, grad, *hyper)
            # The mean moves by a tenth of itself; the weights and the mean square by less than half of bf16's spacing.
            made = zip(stored_blocks, (value, mean, square), (generator, None, generator), strict=True)
            for block, updated, random in made:
                if block is updated:
                    continue
                if random is not None and block.dtype in DROPPED_BITS:
                    updated = stochastically_rounded(updated, block.dtype, random)
                block.copy_(updated)
            if masters:
                param_block.copy_(value)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors in blocks whose fp32 copies stay in cache; whole where they are not in memory order."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)


def _update_(
    value: Tensor,
    mean: Tensor,
    square: Tensor,
    grad: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    value.mul_(1 - lr * weight_decay)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    value.addcdiv_(mean, (square.sqrt() / root).add_(eps), value=-step_size)


def _torch_takes(*tensors: Tensor) -> bool:
    """Tensors on a CPU, of one type and in memory order: the kernel runs over their memory and looks at no strides."""
    one = len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype in KERNEL_DTYPES
    return one and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


def _torch_update_(
    value: Tensor,
    mean: Tensor,
    square: Tensor,
    grad: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factor: Tensor | None = None,
) -> None:
    """`_update_` by PyTorch's fused kernel: one pass over memory, arithmetic in fp32 for bf16 and fp16 too."""
    steps = [torch.full((), float(step), dtype=torch.float32)]
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    fused = partial(torch.ops.aten._fused_adamw_, **hyper, amsgrad=False, maximize=False)
    if factor is None:
        fused([value], [grad], [mean], [square], [], steps)
        return
    # The kernel writes the scaled gradient back.
    fused([value], [grad], [mean], [square], [], steps, grad_scale=factor.float().reciprocal())


def _adamw_shape(*_: Any) -> None:
    return None


def _adamw_cost(
    out: None,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    scale: Tensor | None,
    *_: Any,
) -> Cost:
    # Decay; m: subtract, scale, add; v: scale, square, scale, add; root, divide, add ε; scale m, divide, add: 14; and
    # the gradient's scale. Stochastic rounding is integer arithmetic.
    # In fp32 p, g, m, v are read and p, m, v written: 28 bytes a parameter. With masters, p is only written.
    elements = elements_of(params)
    moments = (*exp_avgs, *exp_avg_sqs)
    return elementwise_cost(
        (14 if scale is None else 15) * elements,
        (*(masters or params), *grads, *moments, scale),
        (*params, *masters, *moments),
        size=(elements,),
    )


def _kernel_takes(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    *_: Any,
) -> bool:
    """Everything in memory order, in types that kernels load and store."""
    tensors = (*params, *exp_avgs, *exp_avg_sqs, *masters, *grads)
    return all(tensor.is_contiguous() and tensor.dtype in KERNEL_DTYPES for tensor in tensors)


# adamw(params, grads, exp_avgs, exp_avg_sqs, masters, scale, step, lr, beta1, beta2, eps, weight_decay, seed)
# masters: fp32 copies that are updated and rounded into the parameters; an empty list for none.
# grads: may be left scaled, as torch.nn.utils.clip_grad_norm_ leaves them; a pass over memory less than keeping them.
# scale: fp32 scalar on the device that multiplies every gradient. Where it is not finite, nothing changes: a step can
#   be called off without the host waiting for the device.
# step: number of this update, from 1. seed: 0 rounds to nearest; else weights and mean squares that are stored in bf16
#   or fp16 round stochastically, with random bits of (seed, place in the list, element) alone.
adamw = Op(
    "adamw",
    _adamw,
    cost=_adamw_cost,
    shape=_adamw_shape,
    kernel=lazy("rooflight.ops.kernels.optimizer", "adamw"),
    kernel_takes=_kernel_takes,
    mutates=("params", "grads", "exp_avgs", "exp_avg_sqs", "masters"),
)
