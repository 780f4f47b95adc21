"""The kernels of gradient clipping: the norm over many tensors, the scale that follows from it, and scaling in place.

The norm is deterministic: each program leaves the sum of squares of its chunk, and one program adds these up in order.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - what Triton functions take are blocks and scalars of its language
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels.optimizer import load_fp32, pointer_to, store
from rooflight.ops.kernels.tensor_list import TYPES, tables

BLOCK = 2048  # elements that a program's 256 threads load at once: 16 bytes of bf16 each
WARPS = 8
ROUNDS = 4
CHUNK = BLOCK * ROUNDS


@triton.jit
def _squares(pointer, start, end, MASKED: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(ROUNDS):
        offset = start + i * BLOCK + tl.arange(0, BLOCK)
        x = load_fp32(pointer, offset, offset < end, MASKED)
        total += x * x
    return tl.sum(total)


@triton.jit
def squares_kernel(
    table,
    chunks,
    partials,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    chunk = chunks + program * 3
    pointer = pointer_to(tl.load(table + tl.load(chunk)), TYPE, ALIGNED)
    start, end = tl.multiple_of(tl.load(chunk + 1), 16), tl.load(chunk + 2)
    if start + BLOCK * ROUNDS <= end:
        tl.store(partials + program, _squares(pointer, start, end, False, BLOCK, ROUNDS))
    else:
        tl.store(partials + program, _squares(pointer, start, end, True, BLOCK, ROUNDS))


@triton.jit
def root_of_sum_kernel(partials, count, out, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        total += tl.load(partials + offset, mask=offset < count, other=0.0)
    tl.store(out, tl.sqrt(tl.sum(total)))


@triton.jit
def clip_scale_kernel(norm_ptr, out, max_norm):
    norm = tl.load(norm_ptr)
    # An infinite max_norm over a finite norm is infinite, and so limited to 1.
    scale = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    tl.store(out, tl.where(norm < float("inf"), scale, float("nan")))


@triton.jit
def _scale_chunk(
    pointer, start, end, factor, TYPE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
):
    for i in tl.static_range(ROUNDS):
        offset = start + i * BLOCK + tl.arange(0, BLOCK)
        x = load_fp32(pointer, offset, offset < end, MASKED)
        store(pointer, offset, (x * factor).to(TYPE), offset < end, MASKED)


@triton.jit
def scale_kernel(
    table,
    chunks,
    factor_ptr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    chunk = chunks + tl.program_id(0).to(tl.int64) * 3
    pointer = pointer_to(tl.load(table + tl.load(chunk)), TYPE, ALIGNED)
    start, end = tl.multiple_of(tl.load(chunk + 1), 16), tl.load(chunk + 2)
    if start + BLOCK * ROUNDS <= end:
        _scale_chunk(pointer, start, end, factor, TYPE, False, BLOCK, ROUNDS)
    else:
        _scale_chunk(pointer, start, end, factor, TYPE, True, BLOCK, ROUNDS)


def _by_type(tensors: list[Tensor]) -> list[tuple[torch.dtype, Tensor, Tensor, bool]]:
    """(type, pointers, chunks, aligned) of the tensors of each type."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault(tensor.dtype, []).append(tensor)
    return [(dtype, *tables([members], CHUNK)) for dtype, members in groups.items()]


def grad_norm(grads: list[Tensor]) -> Tensor:
    """`ops.clipping.grad_norm`: a launch for each storage type and one that finishes."""
    groups = _by_type(grads)
    counts = [len(chunks) for _, _, chunks, _ in groups]
    partials = grads[0].new_empty(sum(counts), dtype=torch.float32)
    out = grads[0].new_empty((), dtype=torch.float32)
    parts = partials.split(counts) if counts else ()
    for (dtype, table, chunks, aligned), part in zip(groups, parts, strict=True):
        squares_kernel[(len(chunks),)](
            table, chunks, part, TYPES[dtype], ALIGNED=aligned, BLOCK=BLOCK, ROUNDS=ROUNDS, num_warps=WARPS
        )
    root_of_sum_kernel[(1,)](partials, sum(counts), out, BLOCK=4096, num_warps=WARPS)
    return out


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """`ops.clipping.clip_scale`; an infinite `max_norm` for no clipping."""
    out = torch.empty_like(norm)
    clip_scale_kernel[(1,)](norm, out, max_norm, num_warps=1)
    return out


def scale(tensors: list[Tensor], factor: Tensor) -> None:
    """`ops.clipping.scale_`: every tensor times a scalar on the device; a factor of 1 moves nothing."""
    for dtype, table, chunks, aligned in _by_type(tensors):
        scale_kernel[(len(chunks),)](
            table, chunks, factor, TYPES[dtype], ALIGNED=aligned, BLOCK=BLOCK, ROUNDS=ROUNDS, num_warps=WARPS
        )
