"""What `wide_kernel` multiplies: weights and rows of x on their way, the norm's weight, and squares of x.

All of a program's weights and rows lie in shared memory at once: nothing there is written twice but weights, scaled.

Legend: K inputs of a step  R rows of x in a program
"""

# ruff: noqa: ANN001, ANN201, RUF005 - arguments of Triton functions are of its language, which has no starred tuples
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from rooflight.ops.kernels.stream_kernel import _barrier

EIGHT = gl.constexpr(8)


@gluon.jit
def place(parts, SPLITS: gl.constexpr):
    """Which (outputs, inputs, rows of x) a program has; those of the same weights are neighbours."""
    program = gl.program_id(0)
    return program // parts // SPLITS, program // parts % SPLITS, program % parts


@gluon.jit
def tile_of(weights, step):
    """A step's weights as a matrix."""
    MATRIX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    HEIGHT: gl.constexpr = weights.shape[1] * weights.shape[2] * EIGHT
    return weights.index(step)._reinterpret(weights.dtype, [HEIGHT, weights.shape[4]], MATRIX)


@gluon.jit
def produce(buffers, barriers, weight, x, parts, SPLITS: gl.constexpr):
    """One warp: ask for all weights, and when the launch ahead is through for all rows of x."""
    weights, narrow = buffers[0], buffers[1]
    arrived, ready = barriers[0], barriers[1]
    STEPS: gl.constexpr = weights.shape[0]
    R: gl.constexpr = narrow.shape[1]
    BLOCK_K: gl.constexpr = narrow.shape[2]
    weight_bytes: gl.constexpr = weights.shape[1] * weights.shape[2] * 8 * BLOCK_K * 2
    tile, split, part = place(parts, SPLITS)
    first = split * STEPS * BLOCK_K
    for step in range(STEPS):
        mbarrier.expect(arrived.index(step), weight_bytes)
        at = [tile * weights.shape[1], 0, 0, first + step * BLOCK_K]
        tma.async_copy_global_to_shared(weight, at, arrived.index(step), weights.index(step))
    gdc_wait()
    for step in range(STEPS):
        mbarrier.expect(ready.index(step), R * BLOCK_K * 2)
        at = [part * R, first + step * BLOCK_K]
        tma.async_copy_global_to_shared(x, at, ready.index(step), narrow.index(step))


@gluon.jit
def scale_weights(weights, arrived, norm, split, FIRST: gl.constexpr):
    """Multiply the norm's weight into every second step's weights, rounded."""
    norm_ptr, _, offset, inputs = norm
    STEPS: gl.constexpr = weights.shape[0]
    BLOCK_K: gl.constexpr = weights.shape[4]
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [gl.num_warps(), 1], [1, 0])
    scales = ()
    for step in gl.static_range(FIRST, STEPS, 2):
        k_K = (split * STEPS + step) * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, across))
        scales = scales + (gl.load(norm_ptr + k_K, k_K < inputs, 0.0),)
    for step in gl.static_range(FIRST, STEPS, 2):
        mbarrier.wait(arrived.index(step), 0)
        tile = tile_of(weights, step)
        scale_K = scales[step // 2].to(gl.float32) + offset
        tile.store((tile.load(across).to(gl.float32) * scale_K[None, :]).to(weights.dtype))
    fence_async_shared()


@gluon.jit
def square(buffers, barriers, norm, parts, SPLITS: gl.constexpr):
    """Four warps: half of the weights' scaling, then the sum of squares of each row of x."""
    weights, narrow, squares = buffers
    arrived, ready, scaled, squared = barriers
    STEPS: gl.constexpr = weights.shape[0]
    R: gl.constexpr = narrow.shape[1]
    BLOCK_K: gl.constexpr = narrow.shape[2]
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [gl.num_warps(), 1], [1, 0])
    _, split, _ = place(parts, SPLITS)
    scale_weights(weights, arrived, norm, split, 1)
    _barrier()
    mbarrier.arrive(scaled)
    squares_R = gl.zeros((R,), gl.float32, gl.SliceLayout(1, across))
    for step in range(STEPS):
        mbarrier.wait(ready.index(step), 0)
        x_RK = narrow.index(step).load(across).to(gl.float32)
        squares_R += gl.sum(x_RK * x_RK, 1)
    squares.store(squares_R)
    _barrier()
    mbarrier.arrive(squared)
