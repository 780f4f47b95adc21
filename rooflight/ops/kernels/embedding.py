"""Embedding backward: a deterministic scatter-add of token gradients, without atomics.

Positions are sorted by token. A segment is a run of one token that ends, at the latest, where the next chunk of 32
positions begins; one program sums one segment. A token that stays within a chunk is then done. The pieces of a longer
run are kept in fp32, one that fills or enters a chunk from the left ("head") and one that leaves it to the right
("tail"), and a second kernel adds tail and heads in order.
Legend: T tokens  V vocabulary  D width  N chunks
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2, rows_of

CHUNK = 32
ROWS = 4  # of one token that are loaded at once
BLOCK = 1024
COLUMNS_PER_THREAD = 8
JOIN_BLOCK, JOIN_ROWS = 128, 32


@triton.jit
def _segment_kernel(
    grad_ptr,
    token_ptr,
    order_ptr,
    out_ptr,
    partial_ptr,
    tokens,
    vocabulary,
    grad_stride,
    scale,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    start = tl.program_id(0) // BLOCKS
    token = tl.load(token_ptr + start)
    before = tl.load(token_ptr + start - 1, start > 0, -1)
    begins = token != before
    # The embedding's forward refuses tokens outside the vocabulary; here they must at least not be written.
    if (begins | (start % CHUNK == 0)) & (token >= 0) & (token < vocabulary):
        chunk = start // CHUNK
        position = start + tl.arange(0, CHUNK)
        here = (position < tl.minimum((chunk + 1) * CHUNK, tokens)) & (position >= start)
        length = tl.sum((tl.load(token_ptr + position, here, -1) == token).to(tl.int32), 0)
        end = start + length
        column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, length, ROWS):
            row = start + first + tl.arange(0, ROWS)
            source = tl.load(order_ptr + row, row < end, 0).to(tl.int64)
            mask = (row < end)[:, None] & inside[None, :]
            grad = tl.load(grad_ptr + source[:, None] * grad_stride + column[None, :], mask, 0.0)
            total += tl.sum(grad.to(tl.float32), 0)
        total *= scale
        after = tl.load(token_ptr + end, end < tokens, -1)
        if begins & (after != token):
            tl.store(out_ptr + token.to(tl.int64) * WIDTH + column, total, inside)
        else:
            slot = chunk.to(tl.int64) * 2 + begins.to(tl.int64)
            tl.store(partial_ptr + slot * WIDTH + column, total, inside)


@triton.jit
def _join_kernel(
    token_ptr,
    out_ptr,
    partial_ptr,
    tokens,
    chunks,
    vocabulary,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = tl.program_id(0) // BLOCKS
    following = (chunk + 1) * CHUNK
    token = tl.load(token_ptr + following - 1, following < tokens, -1)
    # The run began in an earlier chunk if it fills this one from its first position and the one before ends with it.
    enters = tl.load(token_ptr + chunk * CHUNK - 1, (chunk > 0) & (following < tokens), -1) == token
    leaves = tl.load(token_ptr + following, following < tokens, -2) == token
    if leaves & (enters == 0) & (token >= 0) & (token < vocabulary):
        column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        total = tl.load(partial_ptr + (chunk.to(tl.int64) * 2 + 1) * WIDTH + column, inside, 0.0)
        first = chunk + 1
        heads = tl.full((), ROWS, tl.int32)
        while heads == ROWS:
            row = first + tl.arange(0, ROWS)
            same = tl.load(token_ptr + row * CHUNK, row < chunks, -1) == token
            mask = same[:, None] & inside[None, :]
            head = tl.load(partial_ptr + row.to(tl.int64)[:, None] * (2 * WIDTH) + column[None, :], mask, 0.0)
            total += tl.sum(head, 0)
            heads = tl.sum(same.to(tl.int32), 0)
            first += ROWS
        tl.store(out_ptr + token.to(tl.int64) * WIDTH + column, total, inside)


def embedding_backward(grad_TD: Tensor, tokens_T: Tensor, vocabulary: int, scale: float) -> Tensor:
    """dW[v] = scale · Σ over positions of token v of grad; rows of tokens that do not occur are zero."""
    grad, _, inner, grad_stride, _ = rows_of(grad_TD)
    width = grad_TD.shape[-1]
    if inner != 1:
        grad, grad_stride = grad.contiguous(), width
    # int32 keys: half the passes of a radix sort.
    sorted_T, order_T = torch.sort(tokens_T.flatten().to(torch.int32), stable=True)
    out_VD = grad_TD.new_zeros((vocabulary, width))
    tokens = sorted_T.numel()
    chunks = ceil_div(tokens, CHUNK)
    partial_N2D = grad_TD.new_empty((chunks, 2, width), dtype=torch.float32)
    block = min(BLOCK, power_of_2(width))
    blocks = ceil_div(width, block)
    _segment_kernel[(tokens * blocks,)](
        grad,
        sorted_T,
        order_T,
        out_VD,
        partial_N2D,
        tokens,
        vocabulary,
        grad_stride,
        scale,
        WIDTH=width,
        BLOCKS=blocks,
        BLOCK=block,
        CHUNK=CHUNK,
        ROWS=ROWS,
        num_warps=max(1, block // (32 * COLUMNS_PER_THREAD)),
    )
    join_block = min(JOIN_BLOCK, block)
    join_blocks = ceil_div(width, join_block)
    _join_kernel[(max(chunks - 1, 0) * join_blocks,)](
        sorted_T,
        out_VD,
        partial_N2D,
        tokens,
        chunks,
        vocabulary,
        WIDTH=width,
        BLOCKS=join_blocks,
        BLOCK=join_block,
        CHUNK=CHUNK,
        ROWS=JOIN_ROWS,
        num_warps=4,
    )
    return out_VD
