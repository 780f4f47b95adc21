"""Embedding backward: a deterministic sum of the gradients of each token's positions; every row is written once.

Four launches, each of which begins while the one before it ends. Three bring positions into the order of their tokens
(token_order.py). `_write_kernel` writes zeros for tokens that do not occur, which need only the first of these three,
and sums the others' gradients: a program takes a piece of 32 positions in order. A run of one token within two pieces
is summed by the program of the first. The parts of a longer run are kept in fp32, one that fills or enters a piece from
the left ("head") and one that leaves it to the right ("tail"); the last of a run's programs in a group of 32 pieces
adds up their parts in order, and the last of its groups theirs. Some zeros are written last, and hide that.
Legend: T tokens  V vocabulary  D width  R rows at once  E entries of a piece  U units (pieces or groups)  C counters
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# ruff: noqa: RUF005 - Triton joins tuples by a sum alone
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from rooflight.ops.kernels import ceil_div, early_launch, power_of_2, rows_of
from rooflight.ops.kernels.token_order import order

PIECE = 32
ROWS = 8  # of a piece, on their way at once
BLOCK, LEAST_BLOCK = 1024, 256
COLUMNS_PER_THREAD = 8
ZEROS = 32768  # elements, about, that a program writes
# Of zeros, what is written last: so much, but not more than a share.
LAST_BYTES, LAST_SHARE = 2**25, 4
GROUP = tl.constexpr(32)  # pieces
PART_ROWS = tl.constexpr(8)  # parts of a run, added up at once
SEARCHED = tl.constexpr(128)  # groups in which a run's end is looked for at once
LOW = tl.constexpr(0xFFFFFFFF)
BEYOND = tl.constexpr(2**62)


@triton.jit
def _token_at(entry_ptr, position, tokens):
    """-1 before the first position and after the last."""
    return (tl.load(entry_ptr + position, (position >= 0) & (position < tokens), -1) >> 32).to(tl.int32)


@triton.jit
def _extent(entry_ptr, token, tokens, first, end, unit, SEARCHED: tl.constexpr):
    """Of units from first to end: the first that holds the token, the one after the last, and if its run begins there.

    unit: a unit's positions.
    """
    below, through = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for at in range(first, end, SEARCHED):
        unit_U = at + tl.arange(0, SEARCHED)
        token_U = tl.load(entry_ptr + unit_U * unit, (unit_U < end) & (unit_U * unit < tokens), BEYOND) >> 32
        below += tl.sum((token_U < token).to(tl.int32), 0)
        through += tl.sum((token_U <= token).to(tl.int32), 0)
    begin = first + below
    midway = (below > 0) & (_token_at(entry_ptr, tl.minimum(begin * unit, tokens) - 1, tokens) == token)
    begin -= midway.to(tl.int32)
    return begin, first + through, _token_at(entry_ptr, begin * unit - 1, tokens) != token


@triton.jit
def _is_last(counter_ptr, programs):
    """Whether all others that add to the same sum are done, whose stores this program may read."""
    # Every warp's stores come before the count, which publishes them.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1


@triton.jit
def _sum_of_parts(partial_ptr, begin, end, begun, column_D, inside_D, WIDTH, ROWS: tl.constexpr):
    """From unit begin, where the run's part is a tail if it begins there, to end: all others are heads."""
    begin_ptr = partial_ptr + begin.to(tl.int64) * 2 * WIDTH + column_D
    total_D = tl.load(begin_ptr + begun.to(tl.int32) * WIDTH, inside_D, 0.0, cache_modifier=".cg")
    for first in range(begin.to(tl.int64) + 1, end.to(tl.int64), ROWS):
        parts = ()
        for i in tl.static_range(ROWS):
            part_ptr = partial_ptr + (first + i) * 2 * WIDTH + column_D
            parts = parts + (tl.load(part_ptr, inside_D & (first + i < end), 0.0, cache_modifier=".cg"),)
        for i in tl.static_range(ROWS):
            total_D += parts[i]
    return total_D


@triton.jit
def _write_kernel(
    out_ptr,
    partial_ptr,
    group_partial_ptr,
    counter_ptr,
    grad_ptr,
    entry_ptr,
    mark_ptr,
    token_ptr,
    tokens,
    vocabulary,
    pieces,
    first_zero_programs,
    grad_stride,
    scale,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    program = tl.program_id(0)
    sum_program = program - first_zero_programs
    if (sum_program < 0) | (sum_program >= pieces * BLOCKS):
        zero_program = tl.where(sum_program < 0, program, program - pieces * BLOCKS)
        row_R = zero_program * ZERO_ROWS + tl.arange(0, ZERO_ROWS)
        mark_R = tl.load(mark_ptr + row_R, row_R < vocabulary, 0)
        token_R = tl.load(token_ptr + mark_R, (mark_R >= 0) & (mark_R < tokens), -1)
        empty_R1 = ((token_R != row_R) & (row_R < vocabulary))[:, None]
        start_R1 = row_R.to(tl.int64)[:, None] * WIDTH
        for block in range(BLOCKS):
            column_1D = block * BLOCK + tl.arange(0, BLOCK)[None, :]
            zero_RD = tl.zeros((ZERO_ROWS, BLOCK), out_ptr.dtype.element_ty)
            tl.store(out_ptr + start_R1 + column_1D, zero_RD, empty_R1 & (column_1D < WIDTH))
    else:
        if EARLY:
            gdc_wait()
        piece, block = sum_program // BLOCKS, sum_program % BLOCKS
        column_D = block * BLOCK + tl.arange(0, BLOCK)
        inside_D = column_D < WIDTH
        start = piece * PIECE
        before = _token_at(entry_ptr, start - 1, tokens)
        first_token = _token_at(entry_ptr, start, tokens)
        last_token = _token_at(entry_ptr, start + PIECE - 1, tokens)
        after_E = _token_at(entry_ptr, start + PIECE + tl.arange(0, PIECE), tokens)
        following = _token_at(entry_ptr, start + PIECE, tokens)
        leaves = (last_token == following) & (last_token >= 0)
        long_head = (first_token == before) & (
            (following == first_token) | (_token_at(entry_ptr, start - PIECE - 1, tokens) == first_token)
        )
        long_tail = leaves & (last_token != before) & (_token_at(entry_ptr, start + 2 * PIECE, tokens) == last_token)
        more = tl.sum((after_E == last_token).to(tl.int32), 0)
        end = tl.minimum(start + PIECE, tokens)
        end += tl.where(leaves & (last_token != before) & ~long_tail, more, 0)

        nothing = tl.full((), vocabulary, tl.int64) << 32
        token = before
        begun = start < 0  # whether the current run began in this piece: not yet
        total_D = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, end, ROWS):
            # One more, to know whether the last row's run ends with it.
            entries = ()
            for i in tl.static_range(ROWS + 1):
                entries = entries + (tl.load(entry_ptr + first + i, first + i < end, nothing),)
            grads = ()
            for i in tl.static_range(ROWS):
                row_token = (entries[i] >> 32).to(tl.int32)
                kept = (row_token < vocabulary) & ((row_token != before) | long_head)
                row = entries[i] & LOW
                grads = grads + (tl.load(grad_ptr + row * grad_stride + column_D, inside_D & kept, 0.0),)
            for i in tl.static_range(ROWS):
                earlier = token
                token = (entries[i] >> 32).to(tl.int32)
                begun |= token != earlier
                total_D = tl.where(token != earlier, 0.0, total_D) + grads[i].to(tl.float32)
                if ((entries[i + 1] >> 32) != token) & (token < vocabulary) & (begun | long_head):
                    if begun & ((token != last_token) | ~long_tail):
                        tl.store(out_ptr + token.to(tl.int64) * WIDTH + column_D, total_D * scale, inside_D)
                    else:
                        slot = piece.to(tl.int64) * 2 + begun.to(tl.int64)
                        tl.store(partial_ptr + slot * WIDTH + column_D, total_D * scale, inside_D)

        group, groups = piece // GROUP, tl.cdiv(pieces, GROUP)
        group_end = tl.minimum((group + 1) * GROUP, pieces)
        for side in range(2):
            token = tl.where(side == 0, first_token, last_token)
            if tl.where(side == 0, long_head, long_tail) & (token < vocabulary):
                begin, end, whole = _extent(entry_ptr, token, tokens, group * GROUP, group_end, PIECE, GROUP)
                counter = (begin * 2 + whole.to(tl.int32)) * BLOCKS + block
                if _is_last(counter_ptr + counter, end - begin):
                    total_D = _sum_of_parts(partial_ptr, begin, end, whole, column_D, inside_D, WIDTH, PART_ROWS)
                    within = whole & (_token_at(entry_ptr, group_end * PIECE, tokens) != token)
                    if within:
                        tl.store(out_ptr + token.to(tl.int64) * WIDTH + column_D, total_D, inside_D)
                    else:
                        slot = group.to(tl.int64) * 2 + whole.to(tl.int64)
                        tl.store(group_partial_ptr + slot * WIDTH + column_D, total_D, inside_D)
                        begin, end, whole = _extent(entry_ptr, token, tokens, 0, groups, PIECE * GROUP, SEARCHED)
                        counter = ((pieces + begin) * 2 + whole.to(tl.int32)) * BLOCKS + block
                        if _is_last(counter_ptr + counter, end - begin):
                            total_D = _sum_of_parts(
                                group_partial_ptr, begin, end, whole, column_D, inside_D, WIDTH, PART_ROWS
                            )
                            tl.store(out_ptr + token.to(tl.int64) * WIDTH + column_D, total_D, inside_D)


def _block_of(width: int) -> int:
    """Columns of a program: as many as leave an eighth of its threads idle at most."""
    block = min(BLOCK, power_of_2(width))
    while block > LEAST_BLOCK and ceil_div(width, block) * block * 8 > width * 9:
        block //= 2
    return block


def embedding_backward(grad_TD: Tensor, tokens_T: Tensor, vocabulary: int, scale: float) -> Tensor:
    """dW[v] = scale · Σ over positions of token v of grad; rows of tokens that do not occur are zero."""
    width = grad_TD.shape[-1]
    tokens_T = tokens_T.flatten()
    tokens = tokens_T.numel()
    if tokens == 0:
        return grad_TD.new_zeros((vocabulary, width))
    grad, _, inner, grad_stride, _ = rows_of(grad_TD)
    if inner != 1:
        grad, grad_stride = grad.contiguous(), width
    # Only the first of the four waits for what others launched, and nothing begins before the last has ended.
    early = early_launch(1)
    pieces = ceil_div(tokens, PIECE)
    units = pieces + ceil_div(pieces, GROUP.value)
    block = _block_of(width)
    blocks = ceil_div(width, block)
    # Zeros may be written while the sort goes on: not into memory that it gives back.
    out_VD = grad_TD.new_empty((vocabulary, width))
    counter_C = tokens_T.new_empty((units * 2 * blocks,), dtype=torch.int32)
    entry_T, mark_V = order(tokens_T, vocabulary, counter_C, early)
    partial_U2D = grad_TD.new_empty((units, 2, width), dtype=torch.float32)
    zero_rows = max(1, min(32, ZEROS // power_of_2(width)))
    zero_programs = ceil_div(vocabulary, zero_rows)
    last = min(zero_programs // LAST_SHARE, LAST_BYTES // (zero_rows * width * out_VD.element_size()))
    _write_kernel[(zero_programs + pieces * blocks,)](
        *(out_VD, partial_U2D, partial_U2D[pieces:], counter_C, grad, entry_T, mark_V, tokens_T),
        *(tokens, vocabulary, pieces, zero_programs - last, grad_stride, scale),
        WIDTH=width,
        BLOCKS=blocks,
        BLOCK=block,
        PIECE=PIECE,
        ROWS=ROWS,
        ZERO_ROWS=zero_rows,
        EARLY=early,
        num_warps=max(1, block // (32 * COLUMNS_PER_THREAD)),
        launch_pdl=early,
    )
    return out_VD
