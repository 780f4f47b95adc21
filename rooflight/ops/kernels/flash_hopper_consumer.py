"""The multiplying warpgroups of Hopper attention: scores, online softmax and values of 64 queries each.

The next scores are issued before the values of the last ones are weighed, so that tensor cores run during a softmax
(FlashAttention-3, 2407.08608); with turns, one warpgroup's products also run during another's softmax.
Legend: Q queries  S keys  E head dim
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, unannotated
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from rooflight.ops.kernels.flash_hopper_tiles import ROWS, key_tiles, receive, tile_of

LN2 = gl.constexpr(0.6931471805599453)
# Finite, so that a row that has seen no key yet subtracts no infinities.
NO_MAXIMUM = gl.constexpr(-1e30)
SWIZZLED = gl.constexpr(64)  # channels of a row in 128 bytes, which the tensor cores want to lie together


@gluon.jit
def _soften(s, m, scale_log2):
    """Online softmax: weights of these scores, the maximum so far, and by how much earlier sums shrink."""
    highest = gl.maximum(m, gl.max(s, 1))
    shrink = gl.exp2((m - highest) * scale_log2)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(highest * scale_log2, 1))
    return p, highest, shrink


@gluon.jit
def _sums(p):
    """Sums of a row's weights, one for each of the four threads that hold it: a tile needs no exchange between them.

    A thread holds two neighbours of every eight columns.
    """
    return gl.sum(gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _shrunk(sums, shrink):
    """Sums of earlier tiles, relative to the maximum so far."""
    ROW: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    return sums * gl.expand_dims(gl.convert_layout(shrink, ROW, assert_trivial=True), 1)


@gluon.jit
def _pack(p, dtype: gl.constexpr):
    """Weights rounded to 16 bits, two in a word: as halves, a loop that carries them takes them apart and back."""
    low, high = gl.reshape(p, [p.shape[0], p.shape[1] // 2, 2]).split()
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpack(words, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """The operand of tensor cores that such words hold."""
    low = words.to(gl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(gl.int16).to(dtype, bitcast=True)
    p = gl.reshape(gl.join(low, high), [words.shape[0], words.shape[1] * 2])
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)


@gluon.jit
def _where_not_above(low, high, s):
    """Scores where low ≤ high, −∞ elsewhere.

    Compared and chosen at once, for the predicates of a whole tile are more than a thread has.
    """
    low, s = gl.broadcast(low, s)
    high, s = gl.broadcast(high, s)
    return gl.inline_asm_elementwise(
        "{.reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p;}",
        "=r,r,r,r",
        [s, low, high],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _hide(s, row, col, keys, window, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr):
    """Scores, −∞ where a query must not look."""
    final = gl.expand_dims(row if CAUSAL else gl.full_like(row, keys - 1), 1)
    col = gl.expand_dims(col, 0)
    if WINDOWED:
        s = _where_not_above(final - window + 1, col, s)
    return _where_not_above(col, final, s)


@gluon.jit
def _clear(v_smem, stage, keys, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Zero what a page of values holds behind the last key: a NaN there would survive its weight of zero.

    Every warpgroup does, writing the same, so that none waits for another.
    """
    PAGES: gl.constexpr = BLOCK_N // PAGE
    PARTS: gl.constexpr = HEAD_DIM // SWIZZLED
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    pages = v_smem._reinterpret(v_smem.dtype, [v_smem.shape[0] * PARTS * PAGES, PAGE, SWIZZLED], TILE)
    row = gl.expand_dims(gl.arange(0, PAGE, layout=gl.SliceLayout(1, SPREAD)), 1)
    for part in gl.static_range(PARTS):
        page = pages.index((stage * PARTS + part) * PAGES + keys % BLOCK_N // PAGE)
        v = page.load(SPREAD)
        page.store(gl.where(row < keys % PAGE, v, gl.zeros_like(v)))
    fence_async_shared()


@gluon.jit
def attend(q, rings, barriers, turns, count, played, seen, window, scale_log2, WHICH: gl.constexpr, plan: gl.constexpr):
    """The weighed values of a tile's 64 queries and their log-sum-exp.

    seen: position of the first query, that of every query, tiles of keys from the first to the last, and keys in all.
    """
    k_smem, v_smem = rings
    _, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    first, row, low, last, keys = seen
    BLOCK_N: gl.constexpr = plan[0]
    STAGES: gl.constexpr = plan[1]
    CONSUMERS: gl.constexpr = plan[2]
    HEAD_DIM: gl.constexpr = plan[3]
    CAUSAL: gl.constexpr = plan[4]
    WINDOWED: gl.constexpr = plan[5]
    PINGPONG: gl.constexpr = plan[6]
    PAGE: gl.constexpr = plan[7]
    dtype: gl.constexpr = q.dtype
    S_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_MMA: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_MMA)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_MMA)
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_MMA))
    stage = count % STAGES
    mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
    if PINGPONG:
        mbarrier.wait(turns.index(WHICH), (played & 1) ^ (1 if WHICH == 0 else 0))
    k = k_smem.index(stage)._reinterpret(dtype, [BLOCK_N, HEAD_DIM], TILE)
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, S_MMA)
    s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)
    if PINGPONG:
        mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
        played += 1
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(stage))
    if PAGE > 0:  # noqa: SIM102 - known when compiling, unlike the other
        if (keys % PAGE != 0) & ((last + 1) * BLOCK_N > keys):
            mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
            _clear(v_smem, stage, keys, PAGE, BLOCK_N, HEAD_DIM)
    s = _hide(s, row, last * BLOCK_N + column, keys, window, CAUSAL, WINDOWED)
    m = gl.full([ROWS], NO_MAXIMUM, gl.float32, ROW)
    p32, m, shrink = _soften(s, m, scale_log2)
    sums = _sums(p32)
    p = _pack(p32, dtype)
    o = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_MMA)

    # From the last tile down: those that the diagonal cuts, those seen whole, those that the window cuts.
    whole_high = last - 1
    whole_low = low
    if CAUSAL:
        whole_high = gl.minimum(gl.maximum(first + 1, 0) // BLOCK_N, last) - 1
        if WINDOWED:
            lowest = gl.maximum(first + ROWS - window, 0)
            whole_low = gl.minimum((lowest + BLOCK_N - 1) // BLOCK_N, whole_high + 1)
            whole_low = gl.maximum(whole_low, low)
            whole_high = gl.maximum(whole_high, low - 1)
    for cut in gl.static_range(3):
        if cut == 0:
            above = last - 1
            below = whole_high
        elif cut == 1:
            above = whole_high
            below = whole_low - 1
        else:
            above = whole_low - 1
            below = low - 1
        if cut == 1 or (CAUSAL and cut == 0) or WINDOWED:
            for step in range(above - below):
                after = count + 1
                next_stage = after % STAGES
                mbarrier.wait(k_ready.index(next_stage), after // STAGES & 1)
                if PINGPONG:
                    mbarrier.wait(turns.index(WHICH), (played & 1) ^ (1 if WHICH == 0 else 0))
                k = k_smem.index(next_stage)._reinterpret(dtype, [BLOCK_N, HEAD_DIM], TILE)
                s = gl.zeros([ROWS, BLOCK_N], gl.float32, S_MMA)
                s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)
                stage = count % STAGES
                mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
                v = v_smem.index(stage)._reinterpret(dtype, [BLOCK_N, HEAD_DIM], TILE)
                o = warpgroup_mma(_unpack(p, dtype, P_MMA), v, o, is_async=True)
                if PINGPONG:
                    mbarrier.arrive(turns.index((WHICH + 1) % CONSUMERS))
                    played += 1
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(k_empty.index(next_stage))
                if cut != 1:
                    s = _hide(s, row, (above - step) * BLOCK_N + column, keys, window, CAUSAL, WINDOWED)
                p32, m, shrink = _soften(s, m, scale_log2)
                sums = _shrunk(sums, shrink) + _sums(p32)
                o = warpgroup_mma_wait(0, deps=(o,))
                mbarrier.arrive(v_empty.index(stage))
                o = o * gl.expand_dims(gl.convert_layout(shrink, O_ROW, assert_trivial=True), 1)
                p = _pack(p32, dtype)
                count = after

    mbarrier.arrive(q_empty.index(WHICH))
    stage = count % STAGES
    mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
    v = v_smem.index(stage)._reinterpret(dtype, [BLOCK_N, HEAD_DIM], TILE)
    o = warpgroup_mma(_unpack(p, dtype, P_MMA), v, o, is_async=True)
    total = gl.convert_layout(gl.sum(sums, 1), ROW)
    lse = (m * scale_log2 + gl.log2(total)) * LN2
    # A query that sees no key has no total.
    inverse = gl.convert_layout(1.0 / gl.where(total > 0.0, total, 1.0), O_ROW, assert_trivial=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_empty.index(stage))
    return (o * gl.expand_dims(inverse, 1)).to(dtype), lse, count + 1, played


@gluon.jit
def consume(shared, WHICH: gl.constexpr, plan: gl.constexpr):
    """A warpgroup: 64 queries of each tile, from their scores to the output."""
    buffers, barriers, board, turns, o_desc, o_smem, lse_ptr, sizes, scale_log2 = shared
    q_smem, k_smem, v_smem = buffers
    queries, keys, heads, _, tiles, section, blocks, window, all_heads = sizes
    BLOCK_N: gl.constexpr = plan[0]
    HEAD_DIM: gl.constexpr = plan[3]
    CAUSAL: gl.constexpr = plan[4]
    BLOCK_M: gl.constexpr = plan[2] * ROWS
    dtype: gl.constexpr = q_smem.dtype
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = q_smem.index(WHICH)._reinterpret(dtype, [ROWS, HEAD_DIM], TILE)
    mine = o_smem.index(WHICH)
    count = 0
    played = 0
    turn = 0
    index = receive(turn, board, 4)
    while index < tiles:
        block, line = tile_of(index, section, blocks, all_heads, CAUSAL)
        first = block * BLOCK_M
        low, last = key_tiles(first, queries, keys, window, BLOCK_M, BLOCK_N, CAUSAL)
        first += WHICH * ROWS
        row = first + gl.arange(0, ROWS, layout=ROW)
        mbarrier.wait(barriers[0].index(WHICH), turn & 1)
        seen = (first, row, low, last, keys)
        out, lse, count, played = attend(
            q, (k_smem, v_smem), barriers, turns, count, played, seen, window, scale_log2, WHICH, plan
        )
        gl.store(lse_ptr + line.to(gl.int64) * queries + row, lse, row < queries)
        tma.store_wait(0)
        mine._reinterpret(dtype, [ROWS, HEAD_DIM], TILE).store(out)
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [line // heads, first, line % heads, 0], mine)
        turn += 1
        index = receive(turn, board, 4)
    tma.store_wait(0)
