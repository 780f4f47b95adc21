"""The copying warp of Hopper attention, and the order in which programs walk the tiles.

A tile is a block of queries of one head. Programs take tiles from a counter, for no order fixed ahead keeps 132 of them
equally busy: rounds of unequal tiles that fall in step with their number cost up to a third.
Legend: Q queries  S keys
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(64)  # queries of a warpgroup


@gluon.jit
def tile_of(index, section, blocks, heads, REVERSED: gl.constexpr):
    """Block of queries and head of a tile: heads whose keys fit in the L2 together, of these the heavy blocks first."""
    before = index // (section * blocks) * section
    width = gl.minimum(section, heads - before)
    within = index - before * blocks
    block = within // width
    return (blocks - 1 - block if REVERSED else block), before + within % width


@gluon.jit
def send(index, turn, board, WARPS: gl.constexpr):
    """Tell the consumers which tile comes next."""
    slots, ready, empty = board
    mbarrier.wait(empty.index(turn & 1), (turn >> 1 & 1) ^ 1)
    slots.index(turn & 1).store(gl.full([1], index, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])))
    mbarrier.arrive(ready.index(turn & 1))


@gluon.jit
def receive(turn, board, WARPS: gl.constexpr):
    """The tile that the producer chose."""
    slots, ready, empty = board
    mbarrier.wait(ready.index(turn & 1), turn >> 1 & 1)
    index = gl.max(slots.index(turn & 1).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(empty.index(turn & 1))
    return index


@gluon.jit
def key_tiles(first, queries, keys, window, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """First and last tile of keys that a block of queries sees."""
    low = 0
    last = (keys - 1) // BLOCK_N
    if CAUSAL:
        last = (gl.minimum(first + BLOCK_M, queries) - 1) // BLOCK_N
        low = gl.where(window > 0, gl.maximum(first - window + 1, 0) // BLOCK_N, 0)
    return low, last


@gluon.jit
def _copy(desc, at, buffer, ready, empty, turn):
    """Bring a tile into a buffer for its so many-th turn, once the readers of the turn before have left it."""
    mbarrier.wait(empty, (turn & 1) ^ 1)
    mbarrier.expect(ready, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, at, ready, buffer)


@gluon.jit
def _copy_keys(desc, at, count, smem, ready, empty, STAGES: gl.constexpr):
    """The same into the ring of keys or of values."""
    stage = count % STAGES
    _copy(desc, at, smem.index(stage), ready.index(stage), empty.index(stage), count // STAGES)


@gluon.jit
def produce(copied, plan: gl.constexpr):
    """The copying warp: q of a tile, then its keys and values from the last to the first."""
    descriptors, counter_ptr, buffers, barriers, board, sizes = copied
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    queries, keys, heads, group, tiles, section, blocks, window, all_heads = sizes
    BLOCK_N: gl.constexpr = plan[0]
    STAGES: gl.constexpr = plan[1]
    CONSUMERS: gl.constexpr = plan[2]
    CAUSAL: gl.constexpr = plan[4]
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    count = 0
    turn = 0
    index = gl.program_id(0)
    while index < tiles:
        send(index, turn, board, 1)
        block, row = tile_of(index, section, blocks, all_heads, CAUSAL)
        sequence = row // heads
        head = row % heads // group
        first = block * BLOCK_M
        low, last = key_tiles(first, queries, keys, window, BLOCK_M, BLOCK_N, CAUSAL)
        # In the order in which consumers want them: scores are one tile ahead of values.
        _copy_keys(k_desc, [sequence, last * BLOCK_N, head, 0], count, k_smem, k_ready, k_empty, STAGES)
        for part in gl.static_range(CONSUMERS):
            at = [sequence, first + part * ROWS, row % heads, 0]
            _copy(q_desc, at, q_smem.index(part), q_ready.index(part), q_empty.index(part), turn)
        # Nothing else is ordered by it, and an ordering one would wait here for what memory owes to this warp.
        upcoming = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        for step in range(last - low):
            after = (last - step - 1) * BLOCK_N
            _copy_keys(k_desc, [sequence, after, head, 0], count + 1, k_smem, k_ready, k_empty, STAGES)
            _copy_keys(v_desc, [sequence, after + BLOCK_N, head, 0], count, v_smem, v_ready, v_empty, STAGES)
            count += 1
        _copy_keys(v_desc, [sequence, low * BLOCK_N, head, 0], count, v_smem, v_ready, v_empty, STAGES)
        count += 1
        index = upcoming
        turn += 1
    send(index, turn, board, 1)
