"""Kernels that bring rows of tokens to their experts and back, by a counting sort that keeps the order of tokens.

Of few rows each program counts by itself how many come before its own, so that one launch does all. Many rows are
counted in chunks first, and the chunks' counts summed up.
Legend: T tokens  X experts  K experts a token  D width  R = T·K rows, sorted by expert  C rows of a chunk  N chunks
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rooflight.ops.kernels import ceil_div, power_of_2

FEW_ROWS = 1024  # that every program may look through
CHUNK = 128
BLOCK, WARPS = 1024, 4  # elements of a program that takes one row
TILE = 4096  # elements of a program that takes a token's K rows
LOOKING_WARPS = 8  # where a program looks through all rows


@triton.jit
def _permute_few_kernel(
    out_ptr,
    source_ptr,
    counts_ptr,
    x_ptr,
    experts_ptr,
    rows,
    tokens,
    experts,
    x_stride,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs are tokens, and as many of them experts too, whose rows they count."""
    token, number_R, number_K = tl.program_id(0), tl.arange(0, R), tl.arange(0, K)
    first = tl.program_id(1) == 0
    expert_R = tl.load(experts_ptr + number_R, number_R < rows, experts).to(tl.int32)
    if first & (token < experts):
        tl.store(counts_ptr + token, tl.sum((expert_R == token).to(tl.int32), 0).to(tl.int64))
    if token < tokens:
        column_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x_D = tl.load(x_ptr + token.to(tl.int64) * x_stride + column_D, column_D < WIDTH, 0.0)
        row_K = token * TOP_K + number_K
        expert_K = tl.load(experts_ptr + row_K, number_K < TOP_K, 0).to(tl.int32)
        earlier_KR = (expert_R[None, :] == expert_K[:, None]) & (number_R[None, :] < row_K[:, None])
        at_K = tl.sum((earlier_KR | (expert_R[None, :] < expert_K[:, None])).to(tl.int32), 1)
        tl.store(source_ptr + at_K, row_K.to(tl.int64), first & (number_K < TOP_K))
        mask = (number_K < TOP_K)[:, None] & (column_D < WIDTH)[None, :]
        x_KD = tl.broadcast_to(x_D[None, :], (K, BLOCK))
        tl.store(out_ptr + at_K.to(tl.int64)[:, None] * WIDTH + column_D[None, :], x_KD, mask)


@triton.jit
def _count_kernel(chunk_counts_ptr, experts_ptr, rows, chunks, experts, X: tl.constexpr, C: tl.constexpr):
    chunk, number_X = tl.program_id(0), tl.arange(0, X)
    row_C = chunk * C + tl.arange(0, C)
    expert_C = tl.load(experts_ptr + row_C, row_C < rows, 0).to(tl.int32)
    count_X = tl.histogram(expert_C, X, row_C < rows)
    tl.store(chunk_counts_ptr + number_X * chunks + chunk, count_X, number_X < experts)


@triton.jit
def _scan_kernel(counts_ptr, chunk_counts_ptr, chunks, N: tl.constexpr):
    """An expert's counts of all chunks become those of the chunks before; and their sum."""
    expert, chunk_N = tl.program_id(0), tl.arange(0, N)
    at_N = expert * chunks + chunk_N
    count_N = tl.load(chunk_counts_ptr + at_N, chunk_N < chunks, 0)
    tl.store(chunk_counts_ptr + at_N, tl.cumsum(count_N, 0) - count_N, chunk_N < chunks)
    tl.store(counts_ptr + expert, tl.sum(count_N, 0).to(tl.int64))


@triton.jit
def _place_kernel(
    place_ptr,
    source_ptr,
    counts_ptr,
    before_ptr,
    experts_ptr,
    rows,
    chunks,
    experts,
    X: tl.constexpr,
    C: tl.constexpr,
):
    chunk, number_X, number_C = tl.program_id(0), tl.arange(0, X), tl.arange(0, C)
    row_C = chunk * C + number_C
    expert_C = tl.load(experts_ptr + row_C, row_C < rows, 0).to(tl.int32)
    count_X = tl.load(counts_ptr + number_X, number_X < experts, 0).to(tl.int32)
    begin_C = tl.gather(tl.cumsum(count_X, 0) - count_X, expert_C, 0)
    before_C = tl.load(before_ptr + expert_C * chunks + chunk, row_C < rows, 0)
    same_CC = (expert_C[:, None] == expert_C[None, :]) & (number_C[:, None] > number_C[None, :])
    place_C = begin_C + before_C + tl.sum(same_CC.to(tl.int32), 1)
    tl.store(place_ptr + row_C, place_C, row_C < rows)
    tl.store(source_ptr + place_C, row_C.to(tl.int64), row_C < rows)


@triton.jit
def _copy_kernel(
    out_ptr, x_ptr, place_ptr, x_stride, TOP_K: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token, number_K = tl.program_id(0), tl.arange(0, K)
    column_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_D = tl.load(x_ptr + token.to(tl.int64) * x_stride + column_D, column_D < WIDTH, 0.0)
    at_K = tl.load(place_ptr + token * TOP_K + number_K, number_K < TOP_K, 0).to(tl.int64)
    mask = (number_K < TOP_K)[:, None] & (column_D < WIDTH)[None, :]
    x_KD = tl.broadcast_to(x_D[None, :], (K, BLOCK))
    tl.store(out_ptr + at_K[:, None] * WIDTH + column_D[None, :], x_KD, mask)


@triton.jit
def _invert_kernel(place_ptr, source_ptr, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(place_ptr + tl.load(source_ptr + row, row < rows, 0), row, row < rows)


@triton.jit
def _combine_kernel(
    out_ptr,
    y_ptr,
    weights_ptr,
    order_ptr,
    rows,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """order: where each sorted row comes from, to be looked through (R > 0), or where each row is to be found."""
    token, number_K = tl.program_id(0), tl.arange(0, K)
    column_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_K = token * TOP_K + number_K
    if R:
        number_R = tl.arange(0, R)
        source_R = tl.load(order_ptr + number_R, number_R < rows, -1).to(tl.int32)
        at_K = tl.sum(tl.where(source_R[None, :] == row_K[:, None], number_R[None, :], 0), 1)
    else:
        at_K = tl.load(order_ptr + row_K, number_K < TOP_K, 0)
    mask = (number_K < TOP_K)[:, None] & (column_D < WIDTH)[None, :]
    y_KD = tl.load(y_ptr + at_K.to(tl.int64)[:, None] * WIDTH + column_D[None, :], mask, 0.0).to(tl.float32)
    if weights_ptr is not None:
        y_KD *= tl.load(weights_ptr + row_K, number_K < TOP_K, 0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + token.to(tl.int64) * WIDTH + column_D, tl.sum(y_KD, 0), column_D < WIDTH)


@triton.jit
def _unpermute_backward_kernel(
    grad_y_ptr,
    grad_weights_ptr,
    grad_ptr,
    y_ptr,
    weights_ptr,
    source_ptr,
    grad_stride,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(source_ptr + row)
    weight = tl.load(weights_ptr + source).to(tl.float32)
    product_D = tl.zeros((BLOCK,), tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK):
        column_D = first + tl.arange(0, BLOCK)
        grad_D = tl.load(grad_ptr + source // TOP_K * grad_stride + column_D, column_D < WIDTH, 0.0).to(tl.float32)
        y_D = tl.load(y_ptr + row * WIDTH + column_D, column_D < WIDTH, 0.0).to(tl.float32)
        tl.store(grad_y_ptr + row * WIDTH + column_D, grad_D * weight, column_D < WIDTH)
        product_D += grad_D * y_D
    tl.store(grad_weights_ptr + source, tl.sum(product_D, 0))


def _columns(width: int, k: int) -> int:
    """Columns of a program that holds K rows of them."""
    return min(BLOCK, TILE // k, power_of_2(width))


def permute(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, where each comes from, and each expert's count."""
    tokens, top_k = experts_TK.shape
    rows, width = tokens * top_k, x_TD.shape[1]
    experts_TK = experts_TK.contiguous()
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    out_RD, source_R = x_TD.new_empty((rows, width)), experts_TK.new_empty((rows,))
    counts_X = experts_TK.new_empty((num_experts,))
    k = power_of_2(top_k)
    block, x_stride = _columns(width, k), x_TD.stride(0)
    blocks = ceil_div(width, block)
    if rows <= FEW_ROWS:
        _permute_few_kernel[(max(tokens, num_experts), blocks)](
            *(out_RD, source_R, counts_X, x_TD, experts_TK, rows, tokens, num_experts, x_stride),
            TOP_K=top_k,
            K=k,
            R=power_of_2(rows),
            WIDTH=width,
            BLOCK=block,
            num_warps=LOOKING_WARPS if rows > FEW_ROWS // 4 else WARPS,
        )
        return out_RD, source_R, counts_X
    chunks, x = ceil_div(rows, CHUNK), power_of_2(num_experts)
    chunk_counts_XN = experts_TK.new_empty((num_experts, chunks), dtype=torch.int32)
    place_R = experts_TK.new_empty((rows,), dtype=torch.int32)
    _count_kernel[(chunks,)](chunk_counts_XN, experts_TK, rows, chunks, num_experts, X=x, C=CHUNK, num_warps=WARPS)
    _scan_kernel[(num_experts,)](counts_X, chunk_counts_XN, chunks, N=power_of_2(chunks), num_warps=WARPS)
    _place_kernel[(chunks,)](
        *(place_R, source_R, counts_X, chunk_counts_XN, experts_TK, rows, chunks, num_experts),
        X=x,
        C=CHUNK,
        num_warps=LOOKING_WARPS,
    )
    _copy_kernel[(tokens, blocks)](
        out_RD, x_TD, place_R, x_stride, TOP_K=top_k, K=k, WIDTH=width, BLOCK=block, num_warps=WARPS
    )
    return out_RD, source_R, counts_X


def _combine(y_RD: Tensor, weights_TK: Tensor | None, source_R: Tensor, top_k: int) -> Tensor:
    rows, width = y_RD.shape
    out_TD, order_R, looked_through = y_RD.new_empty((rows // top_k, width)), source_R.contiguous(), power_of_2(rows)
    if rows > FEW_ROWS:
        place_R = source_R.new_empty((rows,), dtype=torch.int32)
        _invert_kernel[(ceil_div(rows, BLOCK),)](place_R, order_R, rows, BLOCK=BLOCK, num_warps=WARPS)
        order_R, looked_through = place_R, 0
    k = power_of_2(top_k)
    block = _columns(width, k)
    _combine_kernel[(rows // top_k, ceil_div(width, block))](
        *(out_TD, y_RD.contiguous(), weights_TK, order_R, rows),
        TOP_K=top_k,
        K=k,
        R=looked_through,
        WIDTH=width,
        BLOCK=block,
        num_warps=LOOKING_WARPS if looked_through > FEW_ROWS // 4 else WARPS,
    )
    return out_TD


def permute_backward(grad_RD: Tensor, source_R: Tensor, top_k: int) -> Tensor:
    """Σ_k of a token's rows, in fp32."""
    return _combine(grad_RD, None, source_R, top_k)


def unpermute(y_RD: Tensor, weights_TK: Tensor, source_R: Tensor) -> Tensor:
    """Σ_k w_k · row k of a token, in fp32."""
    return _combine(y_RD, weights_TK.contiguous(), source_R, weights_TK.shape[1])


def unpermute_backward(grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, source_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows, w·grad, and of weights, grad·row."""
    rows, width = y_RD.shape
    grad_TD = grad_TD if grad_TD.stride(1) == 1 else grad_TD.contiguous()
    grad_y_RD, grad_weights_TK = y_RD.new_empty((rows, width)), weights_TK.new_empty(weights_TK.shape)
    _unpermute_backward_kernel[(rows,)](
        *(grad_y_RD, grad_weights_TK, grad_TD, y_RD.contiguous(), weights_TK.contiguous(), source_R.contiguous()),
        grad_TD.stride(0),
        TOP_K=weights_TK.shape[1],
        WIDTH=width,
        BLOCK=_columns(width, 1),
        num_warps=WARPS,
    )
    return grad_y_RD, grad_weights_TK
