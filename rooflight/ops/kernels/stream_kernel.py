"""The kernel of `stream_linear`: few rows times many weights, at the speed at which memory gives the weights.

D[n, m] = Σ_k W[n, k]·x[m, k]: the weights are the tall side of a warpgroup's product, the rows of x its narrow one. All
(tile of outputs, step along K) are one line that programs share evenly (stream-K, Osama et al. 2023); sums of a
tile that several programs share go through memory, and the last of them to be done adds them up, always in one order.
A launch depends on its predecessor programmatically: its first weights are on their way before that one has ended.
Legend: M rows of x, R of a program's tile of it  N outputs  K inputs, of a step  H outputs of a half tile
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are its blocks and scalars, without annotations
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Values of partial sums that a thread holds at once while it adds them up.
MERGED_ROWS = gl.constexpr(128)
# Triton 3.6 and 3.7 call it differently.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def begin_of(program, total, programs):
    """First position of a program on the line of all steps of all tiles."""
    return program * total // programs


@gluon.jit
def program_of(position, total, programs):
    """The program whose share holds a position."""
    return ((position + 1) * programs - 1) // total


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _apply(x, KIND: gl.constexpr):
    if KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        gl.static_assert(KIND == "relu")
        y = gl.where(x < 0.0, 0.0, x)
    return y


@gluon.jit
def _fetch_weights(weight, low, high, narrow, ready, turn, position, steps, height, apart):
    """Ask for a step's weights; its barrier waits for them and for the rows of x."""
    stage = turn % low.shape[0]
    row, k = position // steps * height, position % steps * low.shape[2]
    step_bytes: gl.constexpr = (2 * low.shape[1] + narrow.shape[1]) * low.shape[2] * 2
    mbarrier.expect(ready.index(stage), step_bytes)
    tma.async_copy_global_to_shared(weight, [row, k], ready.index(stage), low.index(stage))
    tma.async_copy_global_to_shared(weight, [row + apart, k], ready.index(stage), high.index(stage))


@gluon.jit
def _fetch_rows(x, narrow, ready, turn, position, steps):
    stage = turn % narrow.shape[0]
    k = position % steps * narrow.shape[2]
    tma.async_copy_global_to_shared(x, [0, k], ready.index(stage), narrow.index(stage))


@gluon.jit
def _produce(ring, line, weight, x, apart):
    """One warp: keep the ring full of what comes next on the line."""
    low, high, narrow, ready, freed = ring
    steps, total, height = line
    STAGES: gl.constexpr = low.shape[0]
    begin = begin_of(gl.program_id(0), total, gl.num_programs(0))
    count = begin_of(gl.program_id(0) + 1, total, gl.num_programs(0)) - begin
    # Weights depend on nothing before this launch.
    for turn in range(gl.minimum(STAGES, count)):
        _fetch_weights(weight, low, high, narrow, ready, turn, begin + turn, steps, height, apart)
    gdc_wait()
    for turn in range(gl.minimum(STAGES, count)):
        _fetch_rows(x, narrow, ready, turn, begin + turn, steps)
    for turn in range(STAGES, count):
        mbarrier.wait(freed.index(turn % STAGES), (turn // STAGES - 1) & 1)
        _fetch_weights(weight, low, high, narrow, ready, turn, begin + turn, steps, height, apart)
        _fetch_rows(x, narrow, ready, turn, begin + turn, steps)


@gluon.jit
def _part_at(H: gl.constexpr, R: gl.constexpr, layout: gl.constexpr):
    """Where the elements of a half tile's sums lie in the workspace."""
    n_H = gl.arange(0, H, gl.SliceLayout(1, layout))
    m_R = gl.arange(0, R, gl.SliceLayout(0, layout))
    return n_H[:, None] * R + m_R[None, :]


@gluon.jit
def _write(
    out_ptr, bias_ptr, low_HR, high_HR, first, rows, outputs, out_stride, KIND: gl.constexpr, ADDS: gl.constexpr
):
    """Store a tile's outputs: the activation of one half times the other, or both, below one another."""
    layout: gl.constexpr = low_HR.type.layout
    n_H = first + gl.arange(0, low_HR.shape[0], gl.SliceLayout(1, layout))
    m_R = gl.arange(0, low_HR.shape[1], gl.SliceLayout(0, layout))
    if KIND != "none":
        if bias_ptr is not None:
            low_HR += gl.load(bias_ptr + n_H, n_H < outputs, 0.0).to(gl.float32)[:, None]
            high_HR += gl.load(bias_ptr + outputs + n_H, n_H < outputs, 0.0).to(gl.float32)[:, None]
        _store(out_ptr, _apply(low_HR, KIND) * high_HR, n_H, m_R, None, rows, outputs, out_stride, ADDS)
    else:
        _store(out_ptr, low_HR, n_H, m_R, bias_ptr, rows, outputs, out_stride, ADDS)
        _store(out_ptr, high_HR, low_HR.shape[0] + n_H, m_R, bias_ptr, rows, outputs, out_stride, ADDS)


@gluon.jit
def _store(out_ptr, y_HR, n_H, m_R, bias_ptr, rows, outputs, out_stride, ADDS: gl.constexpr):
    mask_HR = (n_H < outputs)[:, None] & (m_R < rows)[None, :]
    at_HR = out_ptr + m_R[None, :] * out_stride + n_H[:, None]
    if bias_ptr is not None:
        y_HR += gl.load(bias_ptr + n_H, n_H < outputs, 0.0).to(gl.float32)[:, None]
    if ADDS:
        y_HR += gl.load(at_HR, mask_HR, 0.0).to(gl.float32)
    gl.store(at_HR, y_HR.to(out_ptr.dtype.element_ty), mask_HR)


@gluon.jit
def _consume(
    ring,
    line,
    workspace,
    norm,
    norm_ptr,
    out_ptr,
    bias_ptr,
    rows,
    outputs,
    out_stride,
    KIND: gl.constexpr,
    ADDS: gl.constexpr,
):
    """The warps of the products: tile after tile, as far as it is this program's, and what becomes of its sums."""
    low, high, narrow, ready, freed = ring
    steps, total, height = line
    part_ptr, squares_ptr, counter_ptr = workspace
    eps, offset, inputs = norm
    WARPS: gl.constexpr = gl.num_warps()
    STAGES: gl.constexpr = low.shape[0]
    H: gl.constexpr = low.shape[1]
    R: gl.constexpr = narrow.shape[1]
    BLOCK_K: gl.constexpr = low.shape[2]
    dtype: gl.constexpr = low.dtype
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, R // (WARPS // 4), 16])
    across: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    program, programs = gl.program_id(0), gl.num_programs(0)
    begin, end = begin_of(program, total, programs), begin_of(program + 1, total, programs)
    # For the residual and the workspace; x comes by the producer, which waits too.
    gdc_wait()
    turn = 0
    position = begin
    while position < end:
        tile = position // steps
        first = position - tile * steps
        last = gl.minimum(steps, first + end - position)
        low_acc = warpgroup_mma_init(gl.zeros((H, R), gl.float32, product))
        high_acc = warpgroup_mma_init(gl.zeros((H, R), gl.float32, product))
        squares_R = gl.zeros((R,), gl.float32, gl.SliceLayout(1, across))
        for step in range(first, last):
            stage = turn % STAGES
            if norm_ptr is not None:
                # On its way while the barrier is waited for.
                k_K = step * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, across))
                norm_K = gl.load(norm_ptr + k_K, k_K < inputs, 0.0)
            mbarrier.wait(ready.index(stage), turn // STAGES & 1)
            if norm_ptr is not None:
                x_RK = narrow.index(stage).load(across).to(gl.float32)
                squares_R += gl.sum(x_RK * x_RK, 1)
                narrow.index(stage).store((x_RK * (norm_K.to(gl.float32) + offset)[None, :]).to(dtype))
                fence_async_shared()
            low_acc, high_acc = warpgroup_mma_wait(0, deps=(low_acc, high_acc))
            # Every warp is through with the stage before this one, and has written its part of x.
            _barrier()
            mbarrier.arrive(freed.index((turn + STAGES - 1) % STAGES), pred=turn > 0)
            x_KR = narrow.index(stage).permute((1, 0))
            low_acc = warpgroup_mma(low.index(stage), x_KR, low_acc, is_async=True)
            high_acc = warpgroup_mma(high.index(stage), x_KR, high_acc, is_async=True)
            turn += 1
        low_HR, high_HR = warpgroup_mma_wait(0, deps=(low_acc, high_acc))
        whole = last - first == steps
        if not whole:
            # A program has at most two tiles that others share: where it begins, and where it ends.
            at_HR = part_ptr + _part_at(H, R, product)
            m_R = gl.arange(0, R, gl.SliceLayout(1, across))
            slot = 2 * program + (first == 0).to(gl.int32)
            gl.store(at_HR + slot * (2 * H * R), low_HR)
            gl.store(at_HR + slot * (2 * H * R) + H * R, high_HR)
            if norm_ptr is not None:
                gl.store(squares_ptr + slot * R + m_R, squares_R)
            # Every warp's stores come before the count, which publishes them.
            _barrier()
            from_program = program_of(tile * steps, total, programs)
            to_program = program_of((tile + 1) * steps - 1, total, programs)
            whole = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == to_program - from_program
            if whole:
                gl.store(counter_ptr + tile, 0)
                low_HR = gl.zeros((H, R), gl.float32, product)
                high_HR = gl.zeros((H, R), gl.float32, product)
                squares_R = gl.zeros((R,), gl.float32, gl.SliceLayout(1, across))
                for other in range(from_program, to_program + 1, MERGED_ROWS // R):
                    for member in gl.static_range(MERGED_ROWS // R):
                        there = other + member <= to_program
                        slot = 2 * (other + member) + (other + member == from_program).to(gl.int32)
                        part = at_HR + slot * (2 * H * R)
                        low_HR += gl.load(part, there, 0.0, cache_modifier=".cg")
                        high_HR += gl.load(part + H * R, there, 0.0, cache_modifier=".cg")
                        if norm_ptr is not None:
                            squares_R += gl.load(squares_ptr + slot * R + m_R, there, 0.0, cache_modifier=".cg")
        if whole:
            if norm_ptr is not None:
                rstd_R = gl.convert_layout(gl.rsqrt(squares_R / inputs + eps), gl.SliceLayout(0, product))
                low_HR *= rstd_R[None, :]
                high_HR *= rstd_R[None, :]
            first_output = tile * height
            _write(out_ptr, bias_ptr, low_HR, high_HR, first_output, rows, outputs, out_stride, KIND, ADDS)
        position += last - first


# Counts change from model to model and step to step: no variant of the kernel for some of them.
@gluon.jit(do_not_specialize=["rows", "outputs", "out_stride", "steps", "total"])
def stream_linear_kernel(
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
    outputs,
    inputs,
    out_stride,
    steps,
    total,
    KIND: gl.constexpr,
    ADDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    # What follows may start: it waits for this launch's end before it reads or writes what this one touches.
    gdc_launch_dependents()
    H: gl.constexpr = weight.block_shape[0]
    BLOCK_K: gl.constexpr = weight.block_shape[1]
    low = gl.allocate_shared_memory(weight.dtype, [STAGES, H, BLOCK_K], weight.layout)
    high = gl.allocate_shared_memory(weight.dtype, [STAGES, H, BLOCK_K], weight.layout)
    narrow = gl.allocate_shared_memory(x.dtype, [STAGES, x.block_shape[0], BLOCK_K], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=1)
    fence_async_shared()
    _barrier()
    height = H if KIND != "none" else 2 * H
    apart = outputs if KIND != "none" else H
    ring = (low, high, narrow, ready, freed)
    workspace = (part_ptr, squares_ptr, counter_ptr)
    norm = (eps, offset, inputs)
    line = (steps, total, height)
    gl.warp_specialize(
        [
            (
                _consume,
                (ring, line, workspace, norm, norm_ptr, out_ptr, bias_ptr, rows, outputs, out_stride, KIND, ADDS),
            ),
            (_produce, (ring, line, weight, x, apart)),
        ],
        [1],
        [24],
    )
