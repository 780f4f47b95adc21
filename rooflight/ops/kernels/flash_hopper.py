"""Flash attention's forward for Hopper GPUs: one warp copies, warpgroups multiply while others exponentiate.

A producer warp brings tiles of q, k and v by TMA (`flash_hopper_tiles`); each consumer warpgroup owns 64 queries
(`flash_hopper_consumer`).
Programs are persistent and take tiles from `flash_hopper_tiles`.
Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim  T tokens  N documents
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

from rooflight.ops.kernels import ceil_div, processors
from rooflight.ops.kernels.flash_hopper_consumer import consume
from rooflight.ops.kernels.flash_hopper_plan import Plan, plan_for, section_of
from rooflight.ops.kernels.flash_hopper_tiles import ROWS, produce


@gluon.jit(
    do_not_specialize=[
        *("queries", "keys", "heads", "group", "tiles", "section", "blocks", "window", "all_heads", "scale_log2")
    ]
)
def _forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    lse_ptr,
    counter_ptr,
    queries,
    keys,
    heads,
    group,
    tiles,
    section,
    blocks,
    window,
    all_heads,
    scale_log2,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    PINGPONG: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, ROWS, 1, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], v_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, ROWS, 1, HEAD_DIM], o_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slot_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    slot_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for slot in gl.static_range(2):
        mbarrier.init(slot_ready.index(slot), count=1)
        mbarrier.init(slot_empty.index(slot), count=CONSUMERS)
    for part in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(part), count=1)
        mbarrier.init(q_empty.index(part), count=1)
        mbarrier.init(turns.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    buffers = (q_smem, k_smem, v_smem)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    board = (slots, slot_ready, slot_empty)
    sizes = (queries, keys, heads, group, tiles, section, blocks, window, all_heads)
    plan: gl.constexpr = (BLOCK_N, STAGES, CONSUMERS, HEAD_DIM, CAUSAL, WINDOWED, PINGPONG, 0)
    shared = (buffers, barriers, board, turns, o_desc, o_smem, lse_ptr, sizes, scale_log2)
    copied = ((q_desc, k_desc, v_desc), counter_ptr, buffers, barriers, board, sizes)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (shared, 0, plan)),
                (consume, (shared, 1, plan)),
                (produce, (copied, plan)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (shared, 0, plan)),
                (consume, (shared, 1, plan)),
                (consume, (shared, 2, plan)),
                (produce, (copied, plan)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


def _descriptor(x_BSHE: Tensor, rows: int) -> TensorDescriptor:
    """How the copy engine reads or writes tiles of one head; rows beyond a sequence are zeros, or not written."""
    shape = [1, rows, 1, x_BSHE.shape[-1]]
    # A dimension of one element has no stride that matters, but the engine wants 16 bytes of each.
    strides = [stride if size > 1 else 8 for size, stride in zip(x_BSHE.shape[:-1], x_BSHE.stride()[:-1], strict=True)]
    dtype = gl.bfloat16 if x_BSHE.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    return TensorDescriptor(x_BSHE, list(x_BSHE.shape), [*strides, 1], shape, layout)


def forward(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B,Q,H,E] = softmax(q·kᵀ·scale)·v and its log-sum-exp [B,H,Q], for what `flash_hopper_plan.takes` takes.

    causal: query t sees keys up to t; window: only the last so many of them (0: all). plan: instead of the rule's.
    """
    batch, queries, heads, head_dim = q_BQHE.shape
    keys, key_heads = k_BSKE.shape[1:3]
    plan = plan or plan_for(head_dim, keys)
    window = window if window < keys else 0
    out = q_BQHE.new_empty(q_BQHE.shape)
    lse = q_BQHE.new_empty((batch, heads, queries), dtype=torch.float32)
    # Programs take their tiles from a counter; the first of each is its own number.
    counter = q_BQHE.new_zeros((1,), dtype=torch.int32)
    blocks = ceil_div(queries, plan.queries)
    tiles = blocks * batch * heads
    _forward_kernel[(min(tiles, processors(q_BQHE.device)),)](
        _descriptor(q_BQHE, ROWS.value),
        _descriptor(k_BSKE, plan.keys),
        _descriptor(v_BSKE, plan.keys),
        _descriptor(out, ROWS.value),
        lse,
        counter,
        queries,
        keys,
        heads,
        heads // key_heads,
        tiles,
        section_of(batch * heads, heads // key_heads, keys, head_dim),
        blocks,
        window,
        batch * heads,
        scale * math.log2(math.e),
        BLOCK_N=plan.keys,
        STAGES=plan.stages,
        CONSUMERS=plan.consumers,
        HEAD_DIM=head_dim,
        CAUSAL=causal,
        WINDOWED=window > 0,
        PINGPONG=plan.turns,
        REGISTERS=plan.registers,
        num_warps=4,
    )
    return out, lse
