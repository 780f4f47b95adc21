"""The AdamW kernel: every tensor of a step in one launch for each combination of storage types.

A program updates one chunk of one tensor, which it finds in the tables of `tensor_list`. Nothing that changes from step
to step is compiled in. A gradient scale that is not finite ends every program before it has written.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - what Triton functions take are blocks and scalars of its language
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels.tensor_list import TYPES, tables

BLOCK = 1024  # elements that a program's 128 threads load at once: 16 bytes of bf16 each
WARPS = 4
DRAWS = 4  # words of one Philox call, for as many blocks
ROUNDS = 2  # of DRAWS blocks in a chunk
CHUNK = BLOCK * DRAWS * ROUNDS
PHILOX_ROUNDS = 7  # the fewest that pass every test of BigCrush (Salmon et al. 2011)
ROLES = tl.constexpr(6)  # number in the list, parameter, gradient, moments, master


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A typed pointer to an address out of a table."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_fp32(pointer, offset, mask, MASKED: tl.constexpr):
    x = tl.load(pointer + offset, mask=mask, other=0.0) if MASKED else tl.load(pointer + offset)
    return x.to(tl.float32)


@triton.jit
def store(pointer, offset, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offset, value, mask=mask)
    else:
        tl.store(pointer + offset, value)


@triton.jit
def stochastically_rounded(value, random, TYPE: tl.constexpr):
    """As `ops.adamw.stochastically_rounded`, with random bits from the low end of `random`."""
    if tl.bfloat16 == TYPE:
        bits = value.to(tl.int32, bitcast=True) + (random & 0xFFFF)
        rounded = (bits & -0x10000).to(tl.float32, bitcast=True)
        largest = 3.3895313892515355e38
    else:
        smallest_normal = 6.103515625e-05
        shift = tl.where(value < 0, -smallest_normal, smallest_normal)
        shift = tl.where(tl.abs(value) < smallest_normal, shift, 0.0)
        bits = (value + shift).to(tl.int32, bitcast=True) + (random & 0x1FFF)
        rounded = (bits & -0x2000).to(tl.float32, bitcast=True) - shift
        largest = 65504.0
    return tl.where(tl.abs(value) <= largest, rounded, value).to(TYPE)


@triton.jit
def _update_block(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    master,
    offset,
    mask,
    random,
    scale,
    keep,
    rest1,
    beta2,
    rest2,
    step_size,
    inverse_root,
    eps,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    SQUARE: tl.constexpr,
    MASTERS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
):
    g = load_fp32(grad, offset, mask, MASKED) * scale
    m = load_fp32(exp_avg, offset, mask, MASKED)
    v = load_fp32(exp_avg_sq, offset, mask, MASKED)
    p = load_fp32(master if MASTERS else param, offset, mask, MASKED)
    m += (g - m) * rest1
    v = v * beta2 + g * g * rest2
    p = p * keep - step_size * m / (tl.sqrt(v) * inverse_root + eps)
    store(exp_avg, offset, m.to(MOMENT), mask, MASKED)
    if STOCHASTIC and tl.float32 != SQUARE:
        store(exp_avg_sq, offset, stochastically_rounded(v, (random >> 16) & 0xFFFF, SQUARE), mask, MASKED)
    else:
        store(exp_avg_sq, offset, v.to(SQUARE), mask, MASKED)
    if MASTERS:
        store(master, offset, p, mask, MASKED)
    if STOCHASTIC and not MASTERS and tl.float32 != PARAM:
        store(param, offset, stochastically_rounded(p, random, PARAM), mask, MASKED)
    else:
        store(param, offset, p.to(PARAM), mask, MASKED)


@triton.jit
def _update_chunk(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    master,
    number,
    start,
    end,
    scale,
    keep,
    rest1,
    beta2,
    rest2,
    step_size,
    inverse_root,
    eps,
    seed,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    SQUARE: tl.constexpr,
    MASTERS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    DRAWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PHILOX_ROUNDS: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    for i in range(ROUNDS):
        first = start + i * DRAWS * BLOCK
        words = (lane, lane, lane, lane)
        if STOCHASTIC:
            none = lane * 0
            low, high = (first & 0x7FFFFFFF).to(tl.int32), (first >> 31).to(tl.int32)
            words = tl.philox(seed, lane + low, none + high, none + number.to(tl.int32), none, PHILOX_ROUNDS)
        for j in tl.static_range(DRAWS):
            offset = first + j * BLOCK + lane
            _update_block(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                master,
                offset,
                offset < end,
                words[j].to(tl.int32, bitcast=True),
                scale,
                keep,
                rest1,
                beta2,
                rest2,
                step_size,
                inverse_root,
                eps,
                PARAM,
                MOMENT,
                SQUARE,
                MASTERS,
                STOCHASTIC,
                MASKED,
            )


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def adamw_kernel(
    table,
    chunks,
    scale_ptr,
    keep,
    rest1,
    beta2,
    rest2,
    step_size,
    inverse_root,
    eps,
    seed_low,
    seed_high,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    SQUARE: tl.constexpr,
    MASTERS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    DRAWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PHILOX_ROUNDS: tl.constexpr,
):
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        # NaN compares false.
        if not (tl.abs(scale) < float("inf")):
            return
    chunk = chunks + tl.program_id(0).to(tl.int64) * 3
    row = table + tl.load(chunk) * ROLES
    start = tl.multiple_of(tl.load(chunk + 1), 16)
    end = tl.load(chunk + 2)
    number = tl.load(row)
    param = pointer_to(tl.load(row + 1), PARAM, ALIGNED)
    grad = pointer_to(tl.load(row + 2), GRAD, ALIGNED)
    exp_avg = pointer_to(tl.load(row + 3), MOMENT, ALIGNED)
    exp_avg_sq = pointer_to(tl.load(row + 4), SQUARE, ALIGNED)
    master = pointer_to(tl.load(row + 5), tl.float32, ALIGNED)
    seed = (seed_high.to(tl.int64) << 32) | seed_low.to(tl.int64)
    # Two bodies, so that whole chunks load without a mask, which would forbid vector loads where sizes are odd.
    if start + BLOCK * DRAWS * ROUNDS <= end:
        _update_chunk(
            param, grad, exp_avg, exp_avg_sq, master, number, start, end, scale, keep, rest1, beta2, rest2, step_size,
            inverse_root, eps, seed, PARAM, MOMENT, SQUARE, MASTERS, STOCHASTIC, False, BLOCK, DRAWS, ROUNDS,
            PHILOX_ROUNDS,
        )  # fmt: skip
    else:
        _update_chunk(
            param, grad, exp_avg, exp_avg_sq, master, number, start, end, scale, keep, rest1, beta2, rest2, step_size,
            inverse_root, eps, seed, PARAM, MOMENT, SQUARE, MASTERS, STOCHASTIC, True, BLOCK, DRAWS, ROUNDS,
            PHILOX_ROUNDS,
        )  # fmt: skip


def adamw(
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
    """`ops.adamw`, in place; arguments as there."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, param in enumerate(params):
        if param.numel():
            types = (param.dtype, grads[i].dtype, exp_avgs[i].dtype, exp_avg_sqs[i].dtype)
            groups.setdefault(types, []).append(i)
    for types, members in groups.items():
        lists = (params, grads, exp_avgs, exp_avg_sqs, masters or params)
        roles = [[tensors[i] for i in members] for tensors in lists]
        table, chunks, aligned = tables(roles, CHUNK, members)
        adamw_kernel[(len(chunks),)](
            table,
            chunks,
            scale,
            1 - lr * weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step),
            eps,
            seed & 0x7FFFFFFF,
            (seed >> 31) & 0x7FFFFFFF,
            *(TYPES[dtype] for dtype in types),
            MASTERS=bool(masters),
            STOCHASTIC=seed != 0,
            ALIGNED=aligned,
            BLOCK=BLOCK,
            DRAWS=DRAWS,
            ROUNDS=ROUNDS,
            PHILOX_ROUNDS=PHILOX_ROUNDS,
            num_warps=WARPS,
        )
