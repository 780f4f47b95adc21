"""Cross-entropy of logits in memory: `loss`'s kernel over its rows, the mean over kept tokens, and the gradient.

The backward is one pass in which every program owns a piece of a row: logits are read once, gradients written once.
Legend: T tokens  V vocabulary
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2
from rooflight.ops.kernels.loss import gradient, row_losses

BLOCK = 2048  # logits of a backward's program, 16 a thread
MEAN_BLOCK, MEAN_WARPS = 8192, 32


@triton.jit
def _mean_kernel(values, targets, out, rows, ignore_index, SUMMED: tl.constexpr, BLOCK: tl.constexpr):
    """(Σ of the rows' values, or the one value) / number of targets that are kept; one program, so one order."""
    row = tl.arange(0, BLOCK)
    kept = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, BLOCK):
        inside = first + row < rows
        kept += (inside & (tl.load(targets + first + row, inside, 0) != ignore_index)).to(tl.int32)
        if SUMMED:
            total += tl.load(values + first + row, inside, 0.0)
    value = tl.sum(total) if SUMMED else tl.load(values).to(tl.float32)
    tl.store(out, value / tl.sum(kept).to(tl.float32))


@triton.jit
def _backward_kernel(
    logits,
    row_stride,
    targets,
    lse_ptr,
    factor_ptr,
    out,
    vocabulary,
    pieces,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    # Loaded whether or not the row is ignored: to wait for the target first would leave memory idle.
    z = tl.load(logits + row * row_stride + column, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
    target = tl.load(targets + row)
    hot = tl.where(column == target.to(tl.int32), 1.0, 0.0)
    grad = gradient(z, hot, tl.load(lse_ptr + row), tl.load(factor_ptr), softcap, SOFTCAP)
    # What an ignored row holds may be no number.
    grad = tl.where(target == ignore_index, 0.0, grad)
    tl.store(out + row * vocabulary + column, grad.to(out.dtype.element_ty), inside)


def _mean(values: Tensor, targets_T: Tensor, ignore_index: int, summed: bool) -> Tensor:
    out = targets_T.new_empty((), dtype=torch.float32)
    rows = targets_T.shape[0]
    block = min(MEAN_BLOCK, power_of_2(rows))
    warps = max(1, min(MEAN_WARPS, block // 32))
    _mean_kernel[(1,)](values, targets_T, out, rows, ignore_index, SUMMED=summed, BLOCK=block, num_warps=warps)
    return out


def _rows(logits_TV: Tensor) -> Tensor:
    return logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, ignore_index: int, softcap: float) -> tuple[Tensor, Tensor]:
    """(mean loss, logsumexp of every row), as `ops.loss.cross_entropy`."""
    losses_T, lse_T = (logits_TV.new_empty((logits_TV.shape[0],), dtype=torch.float32) for _ in range(2))
    targets_T = targets_T.contiguous()
    row_losses(_rows(logits_TV), targets_T, losses_T, None, softcap, ignore_index, lse_T)
    return _mean(losses_T, targets_T, ignore_index, True), lse_T


def cross_entropy_backward(
    grad: Tensor, logits_TV: Tensor, targets_T: Tensor, lse_T: Tensor, ignore_index: int, softcap: float
) -> Tensor:
    """Gradient of the logits, as `ops.loss.cross_entropy_backward`; zero rows where ignored."""
    tokens, vocabulary = logits_TV.shape
    rows, targets_T, out_TV = _rows(logits_TV), targets_T.contiguous(), logits_TV.new_empty(logits_TV.shape)
    block = min(BLOCK, power_of_2(vocabulary))
    pieces = ceil_div(vocabulary, block)
    _backward_kernel[(tokens * pieces,)](
        rows,
        rows.stride(0),
        targets_T,
        lse_T.contiguous(),
        _mean(grad, targets_T, ignore_index, False),
        out_TV,
        vocabulary,
        pieces,
        softcap,
        ignore_index,
        SOFTCAP=softcap != 0.0,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )
    return out_TV
