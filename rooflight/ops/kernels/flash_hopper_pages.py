"""The warps that lead Hopper attention over a paged cache: one finds the tiles, two copy their pages.

A tile is a block of new tokens of one sequence, and one head. Which there are is known on the device alone.
Legend: B sequences  T rows of tokens
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are blocks and scalars of its language, unannotated
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from rooflight.ops.kernels.flash_hopper_tiles import ROWS

CHUNK = gl.constexpr(128)  # sequences that are counted together
CHUNKS = gl.constexpr(9)  # of them: 1024 sequences, and the rows beyond them
FIELDS = gl.constexpr(5)  # what a tile is told by: head, sequence, first row, rows from it on, keys in all
BEYOND = gl.constexpr(1 << 30)  # more tiles than there are
SWIZZLED = gl.constexpr(64)  # channels of a row in 128 bytes, which the tensor cores want to lie together


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def count_tiles(starts_ptr, ends, chunks, sequences, tokens, least, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """Write to `ends` how many tiles sequences up to each have, and return how many there are.

    Rows beyond the last sequence count as one more, of an empty context; sequences with fewer than `least` have none.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane = gl.arange(0, CHUNK, layout=LANES)
    before = 0
    for chunk in range(chunks):
        index = chunk * CHUNK + lane
        start = gl.load(starts_ptr + index, index <= sequences, other=0).to(gl.int32)
        stop = gl.load(starts_ptr + index + 1, index < sequences, other=0).to(gl.int32)
        length = gl.where(index < sequences, stop, tokens) - start
        wanted = (index == sequences) | (length >= least)
        blocks = gl.where((index <= sequences) & wanted, (length + BLOCK_M - 1) // BLOCK_M, 0)
        ends.index(chunk).store(before + gl.associative_scan(blocks, 0, _plus))
        before += gl.sum(blocks, 0)
    return before


@gluon.jit
def _post(board, turn, head, sequence, row, rows, keys):
    """Tell the other warps which tile comes next; none has the head −1."""
    slots, ready, empty = board
    slot = turn & 1
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(empty.index(slot), (turn >> 1 & 1) ^ 1)
    slots.index(slot * FIELDS).store(gl.full([1], head, gl.int32, ONE))
    slots.index(slot * FIELDS + 1).store(gl.full([1], sequence, gl.int32, ONE))
    slots.index(slot * FIELDS + 2).store(gl.full([1], row, gl.int32, ONE))
    slots.index(slot * FIELDS + 3).store(gl.full([1], rows, gl.int32, ONE))
    slots.index(slot * FIELDS + 4).store(gl.full([1], keys, gl.int32, ONE))
    mbarrier.arrive(ready.index(slot))


@gluon.jit
def read(board, turn, WARPS: gl.constexpr):
    """The tile that was posted."""
    slots, ready, empty = board
    slot = turn & 1
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(ready.index(slot), turn >> 1 & 1)
    head = gl.max(slots.index(slot * FIELDS).load(ONE), 0)
    sequence = gl.max(slots.index(slot * FIELDS + 1).load(ONE), 0)
    row = gl.max(slots.index(slot * FIELDS + 2).load(ONE), 0)
    rows = gl.max(slots.index(slot * FIELDS + 3).load(ONE), 0)
    keys = gl.max(slots.index(slot * FIELDS + 4).load(ONE), 0)
    mbarrier.arrive(empty.index(slot))
    return head, sequence, row, rows, keys


@gluon.jit
def last_tile(rows, keys, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The last tile of keys that a block of queries sees, of which the last `rows` queries begin with it."""
    return gl.maximum(gl.minimum(keys - rows + BLOCK_M, keys) - 1, 0) // BLOCK_N


@gluon.jit
def lead(found, plan: gl.constexpr):
    """The warp that takes tiles from the counter and finds their sequences, one or two tiles ahead of the others.

    Heads of a block are next to one another, for they share keys; of a sequence the blocks with the most keys go first.
    """
    board, ends, counter_ptr, starts_ptr, contexts_ptr, sizes = found
    tiles, heads, chunks, sequences, tokens = sizes
    BLOCK_M: gl.constexpr = plan[2] * ROWS
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, CHUNK, layout=LANES)
    turn = 0
    index = gl.program_id(0)
    while index < tiles:
        upcoming = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
        block = index // heads
        sequence = 0
        end = BEYOND
        for chunk in range(chunks):
            behind = ends.index(chunk).load(LANES)
            inside = chunk * CHUNK + lane <= sequences
            sequence += gl.sum((inside & (behind <= block)).to(gl.int32), 0)
            end = gl.minimum(end, gl.min(gl.where(inside & (behind > block), behind, BEYOND), 0))
        real = sequence < sequences
        row = gl.load(starts_ptr + sequence).to(gl.int32) + (end - 1 - block) * BLOCK_M
        stop = gl.load(starts_ptr + sequence + 1, real, other=tokens).to(gl.int32)
        keys = gl.load(contexts_ptr + sequence, real, other=0).to(gl.int32)
        _post(board, turn, index % heads, sequence, row, stop - row, keys)
        index = upcoming
        turn += 1
    _post(board, turn, -1, 0, 0, 0, 0)
    # The last program to end leaves the counters as it found them.
    if gl.atomic_add(counter_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)


@gluon.jit
def _blocks(table_ptr, tile, keys, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where the pages of a tile of keys lie, one in a lane; −1, which copies as zeros, where there are no keys."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    page = tile * (BLOCK_N // PAGE) + lane
    wanted = (lane < BLOCK_N // PAGE) & (page * PAGE < keys) & (tile >= 0)
    return gl.load(table_ptr + page, wanted, other=-1).to(gl.int32)


@gluon.jit
def _copy_tile(desc, blocks, head, count, ring, plan: gl.constexpr):
    """Bring the pages of a tile into the ring, once the readers of the tile before have left its place."""
    smem, ready, empty = ring
    STAGES: gl.constexpr = plan[1]
    PAGES: gl.constexpr = plan[0] // plan[7]
    PARTS: gl.constexpr = plan[3] // SWIZZLED
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes * PAGES * PARTS)
    for page in gl.static_range(PAGES):
        block = gl.sum(gl.where(lane == page, blocks, 0), 0)
        for part in gl.static_range(PARTS):
            buffer = smem.index((stage * PARTS + part) * PAGES + page)
            tma.async_copy_global_to_shared(desc, [block, 0, head, part * SWIZZLED], ready.index(stage), buffer)


@gluon.jit
def copy_pages(copied, QUERIES: gl.constexpr, plan: gl.constexpr):
    """A copying warp: keys, or values, of a tile from the last to the first; one of the two brings q as well."""
    desc, cache, ring, board = copied[:4]
    table_ptr, table_stride, group = cache
    BLOCK_N: gl.constexpr = plan[0]
    CONSUMERS: gl.constexpr = plan[2]
    PAGE: gl.constexpr = plan[7]
    count = 0
    turn = 0
    head, sequence, row, rows, keys = read(board, turn, 1)
    while head >= 0:
        last = last_tile(rows, keys, CONSUMERS * ROWS, BLOCK_N)
        # In 32 bits, as no table is larger: of 64 the compiler keeps a part in registers that the consumers lack.
        pages_ptr = table_ptr + sequence * table_stride
        blocks = _blocks(pages_ptr, last, keys, PAGE, BLOCK_N)
        if QUERIES:
            q_desc, q_smem, q_ready, q_empty = copied[4]
            for part in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(part), (turn & 1) ^ 1)
                mbarrier.expect(q_ready.index(part), q_desc.block_type.nbytes)
                at = [row + part * ROWS, head, 0]
                tma.async_copy_global_to_shared(q_desc, at, q_ready.index(part), q_smem.index(part))
        for step in range(last + 1):
            following = _blocks(pages_ptr, last - step - 1, keys, PAGE, BLOCK_N)
            _copy_tile(desc, blocks, head // group, count, ring, plan)
            blocks = following
            count += 1
        turn += 1
        head, sequence, row, rows, keys = read(board, turn, 1)
