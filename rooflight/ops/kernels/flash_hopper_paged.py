"""Attention of many new tokens a sequence over a paged cache, for Hopper GPUs: the tiles of `flash_hopper`, by pages.

One warp finds the tiles and two copy their pages (`flash_hopper_pages`) while warpgroups of 64 queries multiply
(`flash_hopper_consumer`).
Legend: B sequences  T rows of tokens  N blocks  P tokens a block  M blocks a sequence at most
        H query heads  K key heads  E head dim
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rooflight.ops.kernels import counters_of, processors
from rooflight.ops.kernels.flash_hopper_consumer import SWIZZLED, attend
from rooflight.ops.kernels.flash_hopper_pages import (
    CHUNK,
    CHUNKS,
    FIELDS,
    copy_pages,
    count_tiles,
    last_tile,
    lead,
    read,
)
from rooflight.ops.kernels.flash_hopper_plan import Plan, is_hopper, reachable
from rooflight.ops.kernels.flash_hopper_tiles import ROWS

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# A group's rows of this many fill one tile of the other kernel, which lays the heads of a group side by side.
_PACKED_ROWS = 128
# Registers of a thread: three warpgroups share 3·168, and the warps that lead lie in one.
CONSUMING, LEADING = gl.constexpr(224), gl.constexpr(56)


@gluon.jit
def _consume(shared, WHICH: gl.constexpr, plan: gl.constexpr):
    """A warpgroup: 64 queries of each tile, from their scores to the output."""
    buffers, barriers, board, out_ptr, o_smem, heads, scale_log2 = shared
    q_smem, k_smem, v_smem = buffers
    BLOCK_N: gl.constexpr = plan[0]
    BLOCK_M: gl.constexpr = plan[2] * ROWS
    HEAD_DIM: gl.constexpr = plan[3]
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    query = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
    channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, STORED))
    mine = o_smem.index(WHICH)
    count = 0
    turn = 0
    head, _, row, rows, keys = read(board, turn, 4)
    while head >= 0:
        # One register through the loops over keys, instead of two.
        line = row * heads + head
        first = keys - rows + WHICH * ROWS
        position = first + gl.arange(0, ROWS, layout=ROW)
        seen = (first, position, 0, last_tile(rows, keys, BLOCK_M, BLOCK_N), keys)
        mbarrier.wait(barriers[0].index(WHICH), turn & 1)
        # Their products are not put in turns: no barriers for that.
        out, _, count, _ = attend(
            q_smem.index(WHICH), (k_smem, v_smem), barriers, barriers[0], count, 0, seen, 0, scale_log2, WHICH, plan
        )
        # Through shared memory to whole lines; the rows behind a sequence's last are another's.
        mine.store(out)
        tile_ptr = out_ptr + line.to(gl.int64) * HEAD_DIM
        at = gl.expand_dims(query * heads * HEAD_DIM, 1) + gl.expand_dims(channel, 0)
        gl.store(tile_ptr + at, mine.load(STORED), gl.expand_dims(query < rows, 1))
        turn += 1
        head, _, row, rows, keys = read(board, turn, 4)


@gluon.jit(do_not_specialize=["chunks", "tokens", "sequences", "least", "heads", "group", "table_stride", "scale_log2"])
def _prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    table_ptr,
    contexts_ptr,
    starts_ptr,
    counter_ptr,
    chunks,
    tokens,
    sequences,
    least,
    heads,
    group,
    table_stride,
    scale_log2,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    PLACES: gl.constexpr = STAGES * (HEAD_DIM // SWIZZLED) * (BLOCK_N // PAGE)
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, 1, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], TILE)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], TILE)
    o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], TILE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    slot_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    slot_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    slots = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ends = gl.allocate_shared_memory(gl.int32, [CHUNKS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for slot in gl.static_range(2):
        mbarrier.init(slot_ready.index(slot), count=1)
        mbarrier.init(slot_empty.index(slot), count=CONSUMERS + 2)
    for part in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(part), count=1)
        mbarrier.init(q_empty.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    tiles = count_tiles(starts_ptr, ends, chunks, sequences, tokens, least, CONSUMERS * ROWS, 4) * heads
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    board = (slots, slot_ready, slot_empty)
    plan: gl.constexpr = (BLOCK_N, STAGES, CONSUMERS, HEAD_DIM, True, False, False, PAGE)
    q_rows = q_smem._reinterpret(dtype, [CONSUMERS, ROWS, HEAD_DIM], TILE)
    k_pages = k_smem._reinterpret(dtype, [PLACES, 1, PAGE, 1, SWIZZLED], k_desc.layout)
    v_pages = v_smem._reinterpret(dtype, [PLACES, 1, PAGE, 1, SWIZZLED], v_desc.layout)
    shared = ((q_rows, k_smem, v_smem), barriers, board, out_ptr, o_smem, heads, scale_log2)
    cache = (table_ptr, table_stride, group)
    queries = (q_desc, q_smem, q_ready, q_empty)
    keys_copied = (k_desc, cache, (k_pages, k_ready, k_empty), board, queries)
    values_copied = (v_desc, cache, (v_pages, v_ready, v_empty), board)
    found = (board, ends, counter_ptr, starts_ptr, contexts_ptr, (tiles, heads, chunks, sequences, tokens))
    gl.warp_specialize(
        [
            (_consume, (shared, 0, plan)),
            (_consume, (shared, 1, plan)),
            (copy_pages, (keys_copied, True, plan)),
            (copy_pages, (values_copied, False, plan)),
            (lead, (found, plan)),
        ],
        [4, 1, 1, 1],
        [CONSUMING, LEADING, LEADING, LEADING],
    )


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """How the copy engine reads boxes of a tensor; what lies outside of it reads as zeros."""
    # A dimension of one element has no stride that matters, but the engine wants 16 bytes of each.
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def plan_for(head_dim: int) -> Plan:
    """How a call is cut."""
    return Plan(128, 2 if head_dim == 128 else 4, 2, False)


def takes(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    block_table_BM: Tensor,
    max_query: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> bool:
    """Whether `prefill` computes this call, and there are enough new tokens for its tiles."""
    _, heads, head_dim = q_THE.shape
    page, key_heads = k_NPKE.shape[1:3]
    if q_THE.dtype not in _DTYPES or head_dim not in (64, 128) or page not in (16, 32, 64, 128):
        return False
    if window or softcap or sinks_H is not None or not scale > 0:
        return False
    if v_NPKE.shape != k_NPKE.shape or k_NPKE.dtype != q_THE.dtype or v_NPKE.dtype != q_THE.dtype:
        return False
    if max_query * (heads // key_heads) <= _PACKED_ROWS or block_table_BM.shape[0] > CHUNK.value * (CHUNKS.value - 1):
        return False
    return is_hopper(q_THE.device) and all(reachable(x) for x in (q_THE, k_NPKE, v_NPKE))


def prefill(
    out_THE: Tensor,
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKE: Tensor,
    block_table_BM: Tensor,
    context_lengths_B: Tensor,
    query_starts_B1: Tensor,
    scale: float,
    least: int,
    plan: Plan | None = None,
) -> None:
    """Write the rows of sequences with `least` new tokens or more into `out_THE`, and zeros beyond the last sequence.

    Of what `takes` takes. plan: instead of the rule's, of two warpgroups without turns.
    """
    tokens, heads, head_dim = q_THE.shape
    sequences, page = block_table_BM.shape[0], k_NPKE.shape[1]
    plan = plan or plan_for(head_dim)
    # A sequence's last tile is cut short, and so is that of the rows beyond.
    most = (tokens // plan.queries + sequences + 1) * heads
    _prefill_kernel[(min(most, processors(q_THE.device)),)](
        _descriptor(q_THE, [ROWS.value, 1, head_dim]),
        _descriptor(k_NPKE, [1, page, 1, SWIZZLED.value]),
        _descriptor(v_NPKE, [1, page, 1, SWIZZLED.value]),
        out_THE,
        block_table_BM,
        context_lengths_B,
        query_starts_B1,
        counters_of(q_THE.device, "prefill", 2),
        sequences // CHUNK.value + 1,
        tokens,
        sequences,
        least,
        heads,
        heads // k_NPKE.shape[2],
        block_table_BM.stride(0),
        scale * math.log2(math.e),
        BLOCK_N=plan.keys,
        STAGES=plan.stages,
        CONSUMERS=plan.consumers,
        HEAD_DIM=head_dim,
        PAGE=page,
        num_warps=4,
    )
