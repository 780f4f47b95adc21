"""The kernel of `wide_linear`: tens to hundreds of rows times a small matrix whose weights are there before x is.

D[h, m] = Σ_k W[h, k]·x[m, k]: 64 or 128 rows of the weight are the tall side of a warpgroup's product, rows of x its
narrow one. A program asks for all weights it needs and multiplies a norm's weight into them while the kernel ahead
still runs; x then comes, all of it. Four other warps sum its squares, by which products are scaled at the end.
Where inputs are split among programs, the last of them to be done adds up their sums, always in one order.
Legend: N outputs  K inputs of a step  H rows of the weight in a program  R rows of x in it  J outputs in it
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005 - arguments of Triton functions are of its language, which has no starred tuples
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.ops.kernels.stream_kernel import _apply, _barrier
from rooflight.ops.kernels.wide_inputs import place, produce, scale_weights, square, tile_of
from rooflight.ops.kernels.wide_plan import COPYING_REGISTERS as _COPYING
from rooflight.ops.kernels.wide_plan import SQUARING_REGISTERS as _SQUARING

MERGED = gl.constexpr(16384)  # sums of others that are on their way at once
SQUARING_WARPS = gl.constexpr(4)
SQUARING_REGISTERS, COPYING_REGISTERS = gl.constexpr(_SQUARING), gl.constexpr(_COPYING)


@gluon.jit
def _multiply(buffers, barriers, NORMED: gl.constexpr):
    """All steps' products, one behind the other."""
    weights, narrow = buffers[0], buffers[1]
    arrived, ready = barriers[0], barriers[1]
    STEPS: gl.constexpr = weights.shape[0]
    R: gl.constexpr = narrow.shape[1]
    H: gl.constexpr = weights.shape[1] * weights.shape[2] * 8
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    acc = warpgroup_mma_init(gl.zeros((H, R), gl.float32, product))
    for step in range(STEPS):
        if not NORMED:
            mbarrier.wait(arrived.index(step), 0)
        mbarrier.wait(ready.index(step), 0)
        acc = warpgroup_mma(tile_of(weights, step), narrow.index(step).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _bias(bias_ptr, n_J, outputs):
    return gl.load(bias_ptr + n_J, n_J < outputs, 0.0).to(gl.float32)[:, None]


@gluon.jit
def _consume(
    buffers,
    barriers,
    workspace,
    norm,
    results,
    KIND: gl.constexpr,
    ADDS: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Four warps: products, and what becomes of them."""
    weights, narrow, squares = buffers
    arrived, scaled, squared = barriers[0], barriers[2], barriers[3]
    part_ptr, squares_ptr, counter_ptr = workspace
    norm_ptr, eps, _, inputs = norm
    out_ptr, bias_ptr, rows, eighths, stride_eighths, parts = results
    GROUPS: gl.constexpr = weights.shape[1]
    GATES: gl.constexpr = weights.shape[2]
    R: gl.constexpr = narrow.shape[1]
    J: gl.constexpr = GROUPS * 8
    H: gl.constexpr = J * GATES
    # Eight outputs of a thread are 16 bytes.
    finish: gl.constexpr = gl.BlockedLayout([8, 1], [GROUPS, 32 // GROUPS], [1, 4], [0, 1])
    tile, split, part = place(parts, SPLITS)
    outputs, out_stride = eighths * 8, stride_eighths * 8
    j_J = gl.arange(0, J, gl.SliceLayout(1, finish))
    n_J = tile * J + j_J
    r_R = gl.arange(0, R, gl.SliceLayout(0, finish))
    m_R = part * R + r_R
    inside_JR = (n_J < outputs)[:, None] & (m_R < rows)[None, :]
    at_JR = out_ptr + m_R[None, :] * out_stride + n_J[:, None]
    if norm_ptr is not None:
        scale_weights(weights, arrived, norm, split, 0)
        _barrier()
        mbarrier.wait(scaled, 0)
    # For the residual and the workspace; x comes by the producer, which waits too.
    gdc_wait()
    if ADDS:
        residual_JR = gl.load(at_JR, inside_JR, 0.0)
    acc_HR = _multiply(buffers, barriers, norm_ptr is not None)
    if norm_ptr is not None:
        mbarrier.wait(squared, 0)
    if SPLITS == 1:
        # Eight gates, then the eight values for them: a thread has both.
        if GATES == 2:
            pairs = acc_HR.reshape([GROUPS, 2, 8, R]).permute([0, 2, 3, 1])
            low, high = pairs.split()
            low_JR = gl.convert_layout(low.reshape([J, R]), finish)
            high_JR = gl.convert_layout(high.reshape([J, R]), finish)
        else:
            low_JR = gl.convert_layout(acc_HR, finish)
            high_JR = low_JR
        if norm_ptr is not None:
            squares_R = squares.load(gl.SliceLayout(0, finish))
        last = True
    else:
        product: gl.constexpr = acc_HR.type.layout
        shared_by_all = tile * parts + part
        part_ptr += shared_by_all * (SPLITS * H * R)
        h_H = gl.arange(0, H, gl.SliceLayout(1, product))
        column_R = gl.arange(0, R, gl.SliceLayout(0, product))
        gl.store(part_ptr + split * (H * R) + column_R[None, :] * H + h_H[:, None], acc_HR)
        if norm_ptr is not None:
            squares_ptr += shared_by_all * (SPLITS * R)
            line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            gl.store(squares_ptr + split * R + gl.arange(0, R, line), squares.load(line))
        # Every warp's stores come before the count, which publishes them.
        _barrier()
        last = gl.atomic_add(counter_ptr + shared_by_all, 1, sem="acq_rel") == SPLITS - 1
        low_JR = gl.zeros((J, R), gl.float32, finish)
        high_JR = low_JR
        squares_R = gl.zeros((R,), gl.float32, gl.SliceLayout(0, finish))
        if last:
            gl.store(counter_ptr + shared_by_all, 0)
            sums_JR = part_ptr + r_R[None, :] * H + (j_J // 8 * (8 * GATES) + j_J % 8)[:, None]
            # As many on their way as registers hold.
            TOGETHER: gl.constexpr = min(SPLITS, max(1, MERGED // (H * R)))
            for first in range(0, SPLITS, TOGETHER):
                for member in gl.static_range(TOGETHER):
                    other = first + member
                    low_JR += gl.load(sums_JR + other * (H * R), cache_modifier=".cg")
                    if GATES == 2:
                        high_JR += gl.load(sums_JR + other * (H * R) + 8, cache_modifier=".cg")
                    if norm_ptr is not None:
                        squares_R += gl.load(squares_ptr + other * R + r_R, cache_modifier=".cg")
    if last:
        if norm_ptr is not None:
            rstd_R = gl.rsqrt(squares_R / inputs + eps)
            low_JR *= rstd_R[None, :]
            if GATES == 2:
                high_JR *= rstd_R[None, :]
        if bias_ptr is not None:
            low_JR += _bias(bias_ptr, n_J, outputs)
        if GATES == 2:
            if bias_ptr is not None:
                high_JR += _bias(bias_ptr + outputs, n_J, outputs)
            low_JR = _apply(low_JR, KIND) * high_JR
        if ADDS:
            low_JR += residual_JR.to(gl.float32)
        gl.store(at_JR, low_JR.to(out_ptr.dtype.element_ty), inside_JR)


# Counts change from step to step: no variant of the kernel for some of them.
@gluon.jit(do_not_specialize=["rows", "eighths", "stride_eighths", "parts"])
def wide_linear_kernel(
    weight,
    x,
    out_ptr,
    bias_ptr,
    norm_ptr,
    part_ptr,
    squares_ptr,
    counter_ptr,
    eps,
    offset,
    rows,
    eighths,
    inputs,
    stride_eighths,
    parts,
    KIND: gl.constexpr,
    ADDS: gl.constexpr,
    SPLITS: gl.constexpr,
    STEPS: gl.constexpr,
):
    # What follows may start: it waits for this launch's end before it reads or writes what this one touches.
    gdc_launch_dependents()
    R: gl.constexpr = x.block_shape[0]
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    weights = gl.allocate_shared_memory(weight.dtype, [STEPS] + weight.block_shape, weight.layout)
    narrow = gl.allocate_shared_memory(x.dtype, [STEPS] + x.block_shape, x.layout)
    squares = gl.allocate_shared_memory(gl.float32, [R], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    arrived = gl.allocate_shared_memory(gl.int64, [STEPS, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [STEPS, 1], BARRIER)
    scaled = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    squared = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for step in gl.static_range(STEPS):
        mbarrier.init(arrived.index(step), count=1)
        mbarrier.init(ready.index(step), count=1)
    mbarrier.init(scaled, count=1)
    mbarrier.init(squared, count=1)
    fence_async_shared()
    _barrier()
    buffers = (weights, narrow, squares)
    barriers = (arrived, ready, scaled, squared)
    workspace = (part_ptr, squares_ptr, counter_ptr)
    norm = (norm_ptr, eps, offset, inputs)
    results = (out_ptr, bias_ptr, rows, eighths, stride_eighths, parts)
    if norm_ptr is not None:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, workspace, norm, results, KIND, ADDS, SPLITS)),
                (square, (buffers, barriers, norm, parts, SPLITS)),
                (produce, (buffers, barriers, weight, x, parts, SPLITS)),
            ],
            [SQUARING_WARPS, 1],
            [SQUARING_REGISTERS, COPYING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (buffers, barriers, workspace, norm, results, KIND, ADDS, SPLITS)),
                (produce, (buffers, barriers, weight, x, parts, SPLITS)),
            ],
            [1],
            [COPYING_REGISTERS],
        )
