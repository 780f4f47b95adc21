"""Softmax of attention scores that lie in memory, masked, capped and with sinks, and its backward.

A row lies in registers where they hold it, else it is read twice; keys that a row does not see are not read at all.
Legend: R rows (sequences, heads and queries together)  S keys  H heads
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div
from rooflight.ops.kernels.loss import _tanh
from rooflight.ops.kernels.norm_rows import WIDEST, forward_tile

CHUNK = 8192  # columns that a program takes at once of a row that registers do not hold


@triton.jit
def _scores(
    row_ptr,
    row,
    column,
    queries,
    softcap,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Scores of the columns that each row sees, −inf elsewhere; a negative row is none."""
    inside = (row >= 0)[:, None] & (column < WIDTH)[None, :]
    last = (row % queries + (WIDTH - queries))[:, None]
    near = inside
    # What is loaded ends with a group of eight, so that a thread's 16 bytes are loaded whole or not at all.
    if CAUSAL:
        near &= (column // 8 * 8)[None, :] <= last
    if WINDOW > 0:
        near &= (column // 8 * 8 + 7)[None, :] > last - WINDOW
    x = tl.load(row_ptr + column[None, :], near, 0.0).to(tl.float32)
    if SOFTCAP:
        x = softcap * _tanh(x / softcap)
    seen = inside
    if CAUSAL:
        seen &= column[None, :] <= last
    if WINDOW > 0:
        seen &= column[None, :] > last - WINDOW
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _softmax_kernel(
    x_ptr,
    sinks_ptr,
    out_ptr,
    rows,
    queries,
    heads,
    softcap,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.where(row < rows, row, -1)
    column = tl.arange(0, BLOCK)
    start = tl.maximum(row, 0).to(tl.int64)[:, None] * WIDTH
    sink = tl.full((ROWS,), float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + tl.maximum(row, 0) // queries % heads).to(tl.float32)
    if BLOCK >= WIDTH:
        x = _scores(x_ptr + start, row, column, queries, softcap, WIDTH, CAUSAL, WINDOW, SOFTCAP)
        peak = tl.maximum(tl.max(x, 1), sink)
        power = tl.exp(x - peak[:, None])
        total = tl.sum(power, 1) + tl.exp(sink - peak)
        inside = (row >= 0)[:, None] & (column < WIDTH)[None, :]
        tl.store(out_ptr + start + column[None, :], power / total[:, None], inside)
    else:
        peaks = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
        totals = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, WIDTH, BLOCK):
            x = _scores(x_ptr + start, row, first + column, queries, softcap, WIDTH, CAUSAL, WINDOW, SOFTCAP)
            higher = tl.maximum(peaks, x)
            # Where nothing was seen yet there is nothing to rescale, and −inf less −inf is no number.
            totals = tl.where(higher > float("-inf"), totals * tl.exp(peaks - higher) + tl.exp(x - higher), 0.0)
            peaks = higher
        peak = tl.maximum(tl.max(peaks, 1), sink)
        scaled = tl.where(totals > 0.0, totals * tl.exp(peaks - peak[:, None]), 0.0)
        total = tl.sum(scaled, 1) + tl.exp(sink - peak)
        for first in range(0, WIDTH, BLOCK):
            x = _scores(x_ptr + start, row, first + column, queries, softcap, WIDTH, CAUSAL, WINDOW, SOFTCAP)
            inside = (row >= 0)[:, None] & (first + column < WIDTH)[None, :]
            tl.store(out_ptr + start + first + column[None, :], tl.exp(x - peak[:, None]) / total[:, None], inside)


@triton.jit
def _softmax_backward_kernel(
    grad_ptr,
    probs_ptr,
    scores_ptr,
    out_ptr,
    sinks_ptr,
    rows,
    softcap,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    start = row.to(tl.int64)[:, None] * WIDTH
    inner = tl.zeros((ROWS,), tl.float32)
    kept = tl.zeros((ROWS,), tl.float32)
    # One round where the row fits: its second loads then find it in L1.
    for first in range(0, WIDTH, BLOCK):
        at = start + first + column[None, :]
        mask = (row < rows)[:, None] & (first + column < WIDTH)[None, :]
        probs = tl.load(probs_ptr + at, mask, 0.0).to(tl.float32)
        inner += tl.sum(probs * tl.load(grad_ptr + at, mask, 0.0).to(tl.float32), 1)
        if sinks_ptr is not None:
            kept += tl.sum(probs, 1)
    for first in range(0, WIDTH, BLOCK):
        at = start + first + column[None, :]
        mask = (row < rows)[:, None] & (first + column < WIDTH)[None, :]
        probs = tl.load(probs_ptr + at, mask, 0.0).to(tl.float32)
        out = probs * (tl.load(grad_ptr + at, mask, 0.0).to(tl.float32) - inner[:, None])
        if scores_ptr is not None:
            capped = _tanh(tl.load(scores_ptr + at, mask, 0.0).to(tl.float32) / softcap)
            out *= 1.0 - capped * capped
        tl.store(out_ptr + at, out, mask)
    if sinks_ptr is not None:
        # A sink takes what probability the row's keys leave over.
        tl.store(sinks_ptr + row, (kept - 1.0) * inner, row < rows)


def _tile(width: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program."""
    return forward_tile(width if width <= WIDEST else CHUNK)


def attention_softmax(scores_BHQS: Tensor, causal: bool, window: int, softcap: float, sinks_H: Tensor | None) -> Tensor:
    """softmax over the keys that each query sees, and over its head's sink."""
    x, width = scores_BHQS.contiguous(), scores_BHQS.shape[-1]
    out_BHQS, rows = x.new_empty(x.shape), x.numel() // width
    block, tile_rows, warps = _tile(width)
    _softmax_kernel[(ceil_div(rows, tile_rows),)](
        x,
        None if sinks_H is None else sinks_H.contiguous(),
        out_BHQS,
        rows,
        x.shape[2],
        x.shape[1],
        softcap,
        WIDTH=width,
        CAUSAL=causal,
        # Without a causal mask there is no window either.
        WINDOW=window if causal else 0,
        SOFTCAP=softcap != 0.0,
        BLOCK=block,
        ROWS=tile_rows,
        num_warps=warps,
    )
    return out_BHQS


def attention_softmax_backward(
    grad_BHQS: Tensor, probs_BHQS: Tensor, scores_BHQS: Tensor | None, softcap: float, sinks: bool
) -> tuple[Tensor, Tensor]:
    """(gradient of the scores, fp32 gradient of the sinks or an empty tensor); the sums have one order."""
    width = grad_BHQS.shape[-1]
    rows = grad_BHQS.numel() // width
    out_BHQS = grad_BHQS.new_empty(grad_BHQS.shape)
    of_sinks_BHQ = grad_BHQS.new_empty(grad_BHQS.shape[:3], dtype=torch.float32) if sinks else None
    block, tile_rows, warps = _tile(width)
    _softmax_backward_kernel[(ceil_div(rows, tile_rows),)](
        grad_BHQS.contiguous(),
        probs_BHQS.contiguous(),
        None if scores_BHQS is None else scores_BHQS.contiguous(),
        out_BHQS,
        of_sinks_BHQ,
        rows,
        softcap,
        WIDTH=width,
        BLOCK=block,
        ROWS=tile_rows,
        num_warps=warps,
    )
    if of_sinks_BHQ is None:
        return out_BHQS, grad_BHQS.new_empty((0,), dtype=torch.float32)
    return out_BHQS, of_sinks_BHQ.sum((0, 2))
