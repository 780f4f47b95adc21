"""The fused linear and cross-entropy on a GPU: cuBLAS products, and one kernel that turns logits into their gradient.

A program owns a row of a chunk's logits: it reads the row once for maximum and sum, reads it again, mostly out of L2,
and writes (softmax − one-hot)·factor over it. The weight's gradient adds up over chunks in fp32 inside the products.
Legend: T tokens  V vocabulary  D width  N tokens of a chunk
"""

# ruff: noqa: ANN001, ANN201, ANN202 - what Triton functions take are blocks and scalars of its language
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.fused_loss import ROW_ALIGNMENT
from rooflight.ops.kernels import power_of_2

# Logits that a program loads at once, where they are only read and where their gradient replaces them. The latter has a
# multiprocessor to itself: fewer rows are then between their two reads, and L2 holds more of each.
READ_BLOCK, GRAD_BLOCK = 4096, 32768
MAX_WARPS = 32


@triton.jit
def _tanh(x):
    # The quotient cancels near zero, where four terms of the series are exact in fp32.
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.04, series, tl.where(x < 0.0, -ratio, ratio))


@triton.jit
def _capped(z, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _online(peaks, totals, z):
    """Running maximum and Σexp(z − maximum) of each lane, after its next elements: a row of z."""
    higher = tl.maximum(peaks, tl.max(z, 1))
    return higher, totals * tl.exp(peaks - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)


@triton.jit
def gradient(z, hot, lse, factor, softcap, SOFTCAP: tl.constexpr):
    """(softmax − one-hot)·factor of raw logits, through the softcap's derivative."""
    if SOFTCAP:
        tanh = _tanh(z / softcap)
        grad = (tl.exp(softcap * tanh - lse) - hot) * factor * (1.0 - tanh * tanh)
    else:
        grad = (tl.exp(z - lse) - hot) * factor
    return grad


@triton.jit
def row_loss_kernel(
    logits,
    row_stride,
    row_width,
    targets,
    losses,
    lse_ptr,
    factor_ptr,
    vocabulary,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    start = logits + row * row_stride
    # A thread's 16 bytes are a row of the tile, so that it keeps one maximum and one sum for them.
    lane = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    # Whether the logsumexp of ignored rows is wanted, is decided when this is compiled.
    if lse_ptr is None:  # noqa: SIM102
        if target == ignore_index:
            tl.store(losses + row, 0.0)
            if GRAD:
                for first in range(0, vocabulary, BLOCK):
                    column = first + lane
                    tl.store(start + column, tl.zeros_like(lane).to(start.dtype.element_ty), mask=column < row_width)
            return
    whole = vocabulary // BLOCK * BLOCK
    # −3e38 stands for −∞, whose difference with itself is NaN.
    peaks = tl.full((BLOCK // LANE,), -3e38, tl.float32)
    totals = tl.zeros((BLOCK // LANE,), tl.float32)
    # What is read again is to stay in L2.
    policy: tl.constexpr = "evict_last" if GRAD else "evict_first"
    for first in range(0, whole, BLOCK):
        z = tl.load(start + first + lane, eviction_policy=policy).to(tl.float32)
        peaks, totals = _online(peaks, totals, _capped(z, softcap, SOFTCAP))
    if whole < vocabulary:
        column = whole + lane
        # What lies between the vocabulary and the row's width, which vector loads divide, is not a logit.
        z = tl.load(start + column, mask=column < row_width, other=0.0, eviction_policy=policy).to(tl.float32)
        z = tl.where(column < vocabulary, _capped(z, softcap, SOFTCAP), float("-inf"))
        peaks, totals = _online(peaks, totals, z)
    highest = tl.max(peaks)
    lse = tl.log(tl.sum(totals * tl.exp(peaks - highest))) + highest
    inside = (target >= 0) & (target < vocabulary)
    picked = tl.load(start + target, mask=inside, other=float("nan")).to(tl.float32)
    loss = lse - _capped(picked, softcap, SOFTCAP)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse)
        loss = tl.where(target == ignore_index, 0.0, loss)
    tl.store(losses + row, loss)
    if GRAD:
        factor = tl.load(factor_ptr)
        # Every thread has read before any writes, and every one has written before the target's own element is.
        tl.debug_barrier()
        for first in range(0, whole, BLOCK):
            z = tl.load(start + first + lane, eviction_policy="evict_first").to(tl.float32)
            grad = gradient(z, 0.0, lse, factor, softcap, SOFTCAP)
            tl.store(start + first + lane, grad.to(start.dtype.element_ty))
        if whole < vocabulary:
            column = whole + lane
            z = tl.load(start + column, mask=column < row_width, other=0.0).to(tl.float32)
            grad = gradient(z, 0.0, lse, factor, softcap, SOFTCAP)
            tl.store(start + column, grad.to(start.dtype.element_ty), mask=column < row_width)
        tl.debug_barrier()
        own = gradient(picked, 1.0, lse, factor, softcap, SOFTCAP)
        tl.store(start + target, own.to(start.dtype.element_ty), mask=inside)


def _lane(logits_NV: Tensor) -> int:
    """Elements that a thread loads at once: 16 bytes, where all rows begin at a multiple of what Triton looks for."""
    aligned = logits_NV.stride(0) % 16 == 0 and logits_NV.data_ptr() % 16 == 0
    return 16 // logits_NV.element_size() if aligned else 1


def row_losses(
    logits_NV: Tensor,
    targets_N: Tensor,
    losses_N: Tensor,
    factor: Tensor | None,
    softcap: float,
    ignore_index: int,
    lse_N: Tensor | None = None,
) -> None:
    """Losses of a chunk's rows; with a factor (fp32, on the device) the logits become their gradient times it.

    A target outside the vocabulary that is not `ignore_index` gives NaN. Rows are padded to their stride, and all of
    that may be read and written; not where `lse_N`, every row's logsumexp, is wanted.
    """
    vocabulary, targets_N = logits_NV.shape[1], targets_N.contiguous()
    block = min(READ_BLOCK if factor is None else GRAD_BLOCK, power_of_2(vocabulary))
    row_loss_kernel[(logits_NV.shape[0],)](
        logits_NV,
        logits_NV.stride(0),
        logits_NV.stride(0) if lse_N is None else vocabulary,
        targets_N,
        losses_N,
        lse_N,
        factor,
        vocabulary,
        softcap,
        ignore_index,
        SOFTCAP=softcap != 0.0,
        GRAD=factor is not None,
        BLOCK=block,
        LANE=min(_lane(logits_NV), block),
        num_warps=max(1, min(MAX_WARPS, block // 512)),
    )


def logits_buffer(x_TD: Tensor, vocabulary: int, chunk: int) -> Tensor:
    """Room for a chunk's logits, rows padded."""
    stride = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return x_TD.new_empty(min(chunk, x_TD.shape[0]), stride)[:, :vocabulary]


def _divisor(targets_T: Tensor, ignore_index: int, count: int) -> Tensor:
    """Number of target tokens that the mean divides by, as an fp32 scalar on the device."""
    if count:
        return torch.full((), float(count), dtype=torch.float32, device=targets_T.device)
    return (targets_T != ignore_index).sum(dtype=torch.float32)


def accumulate(total_VD: Tensor, grad_NV: Tensor, x_ND: Tensor, first: bool) -> None:
    """total ← (total, unless this is the first) + gradᵀ·x, in the type of total."""
    a_VN = grad_NV.t()
    if total_VD.dtype == x_ND.dtype:
        torch.mm(a_VN, x_ND, out=total_VD) if first else total_VD.addmm_(a_VN, x_ND)
    elif not total_VD.is_cuda:
        # Only the interpreter comes here: the CPU has no product of bf16 into fp32.
        total_VD.copy_(a_VN.float() @ x_ND.float() + (0.0 if first else total_VD))
    elif first:
        torch.ops.aten.mm.dtype_out(a_VN, x_ND, total_VD.dtype, out=total_VD)
    else:
        torch.ops.aten.addmm.dtype_out(total_VD, a_VN, x_ND, total_VD.dtype, out=total_VD)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, ignore_index: int, count: int, chunk: int
) -> Tensor:
    """`ops.fused_loss.linear_cross_entropy_loss` by chunks of `chunk` tokens."""
    losses_T = x_TD.new_empty(x_TD.shape[0], dtype=torch.float32)
    logits_NV = logits_buffer(x_TD, weight_VD.shape[0], chunk)
    for x, targets, losses in zip(x_TD.split(chunk), targets_T.split(chunk), losses_T.split(chunk), strict=True):
        z = torch.mm(x, weight_VD.t(), out=logits_NV[: x.shape[0]])
        row_losses(z, targets, losses, None, softcap, ignore_index)
    return losses_T.sum() / _divisor(targets_T, ignore_index, count)


def linear_cross_entropy_with_grad(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, ignore_index: int, count: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.fused_loss.linear_cross_entropy_with_grad` by chunks of `chunk` tokens."""
    tokens = x_TD.shape[0]
    divisor = _divisor(targets_T, ignore_index, count)
    factor = divisor.reciprocal()
    losses_T = x_TD.new_empty(tokens, dtype=torch.float32)
    logits_NV = logits_buffer(x_TD, weight_VD.shape[0], chunk)
    grad_x_TD = x_TD.new_empty(x_TD.shape)
    # Chunks add up in fp32: a bf16 sum would lose the small gradients of rare tokens. One chunk needs no sum.
    total_VD = weight_VD.new_empty(weight_VD.shape, dtype=None if tokens <= chunk else torch.float32)
    for start in range(0, tokens, chunk):
        x = x_TD[start : start + chunk]
        rows = slice(start, start + x.shape[0])
        z = torch.mm(x, weight_VD.t(), out=logits_NV[: x.shape[0]])
        row_losses(z, targets_T[rows], losses_T[rows], factor, softcap, ignore_index)
        torch.mm(z, weight_VD, out=grad_x_TD[rows])
        accumulate(total_VD, z, x, start == 0)
    # Gone before the sum is rounded, so that the two do not add up at the peak.
    del logits_NV, z
    return losses_T.sum() / divisor, grad_x_TD, total_VD.to(weight_VD.dtype)
