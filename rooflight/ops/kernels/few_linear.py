"""y = x·Wᵀ + b for 2 to 32 rows and small weights: all weights of a launch are on their way before x is there.

A program has all inputs of its outputs: its warps share the inputs, and sums meet once, at the end. What stands around
the product in a decode step goes along: the RMSNorm of x before it, a gate's activation or a residual after it.
Legend: M rows of x  N outputs  K inputs of a warp in a step  W warps  R eights of rows or outputs  S slices of 32
"""

# ruff: noqa: ANN001, ANN202, RUF005 - arguments of Triton functions are of its language, which has no starred tuples
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div, early_launch
from rooflight.ops.kernels.activation import apply
from rooflight.ops.kernels.few_plan import Plan, plan_for, rows_block, steps_of

EIGHT, SLICE = tl.constexpr(8), tl.constexpr(32)


# Tiles are loaded as [8, W, S, R, 32]: a warp has 8 rows of 4 times 16 bytes each. That is how a tensor
# core wants both of its operands, but for the order of inputs, which a product may choose: so no tile goes through
# shared memory on its way. Triton lays lanes, then warps, along what it takes for most contiguous.
@triton.jit
def _rows(first, R: tl.constexpr):
    """Numbers of R·8 rows: [8, 1, 1, R, 1]."""
    return first + tl.arange(0, EIGHT)[:, None, None, None, None] + tl.arange(0, R)[None, None, None, :, None] * EIGHT


@triton.jit
def _columns(S: tl.constexpr, W: tl.constexpr):
    """Numbers of a step's inputs: [1, W, S, 1, 32]."""
    warp, part = tl.arange(0, W)[None, :, None, None, None], tl.arange(0, S)[None, None, :, None, None]
    return (warp * S + part) * SLICE + tl.arange(0, SLICE)[None, None, None, None, :]


@triton.jit
def _load(ptr, column, inside):
    return tl.load(tl.max_contiguous(ptr + column, (4, 2, 1, 1, 32)), inside, 0.0)


@triton.jit
def _first_operand(tile, R: tl.constexpr, S: tl.constexpr, W: tl.constexpr):
    """A tile as [W, R·8, K]."""
    apart = tl.reshape(tile, (EIGHT, W, S, R, 4, 2, 2, 2))
    return tl.reshape(tl.permute(apart, (1, 3, 0, 2, 5, 6, 4, 7)), (W, R * EIGHT, S * SLICE))


@triton.jit
def _second_operand(tile, R: tl.constexpr, S: tl.constexpr, W: tl.constexpr):
    """A tile as [W, K, R·8]."""
    apart = tl.reshape(tile, (EIGHT, W, S, R, 4, 2, 2, 2))
    return tl.reshape(tl.permute(apart, (1, 2, 5, 6, 4, 7, 3, 0)), (W, S * SLICE, R * EIGHT))


@triton.jit
def _scaled(w, norm, offset):
    """Weights times the norm's: x is then as it lies in memory."""
    return (w.to(tl.float32) * (norm.to(tl.float32) + offset)).to(w.dtype)


@triton.jit
def _halved(x_MNW):
    """Sums of neighbours. A split wants both in one thread: they meet in registers, for half of what tl.sum costs."""
    one, other = tl.split(tl.reshape(x_MNW, (x_MNW.shape[0], x_MNW.shape[1], x_MNW.shape[2] // 2, 2)))
    return one + other


@triton.jit
def _finished(total_WNM, rstd_M, bias_N, LEVELS: tl.constexpr):
    """Sums of 2^LEVELS warps to outputs for the normalised x, with their bias: [M, N]."""
    total = tl.permute(total_WNM, (2, 1, 0))
    for _ in tl.static_range(LEVELS):
        total = _halved(total)
    return tl.reshape(total, (total.shape[0], total.shape[1])) * rstd_M[:, None] + bias_N[None, :]


@triton.jit
def _bias(bias_ptr, out_N, outputs):
    if bias_ptr is None:
        bias_N = tl.zeros_like(out_N).to(tl.float32)
    else:
        bias_N = tl.load(bias_ptr + out_N, out_N < outputs, 0.0).to(tl.float32)
    return bias_N


@triton.jit(do_not_specialize=["rows", "norm_stride"])
def _few_linear_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    up_ptr,
    bias_ptr,
    up_bias_ptr,
    norm_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    w_stride,
    norm_stride,
    eps,
    offset,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W: tl.constexpr,
    LEVELS: tl.constexpr,
    STEPS: tl.constexpr,
    HELD: tl.constexpr,
    AHEAD: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    S: tl.constexpr = BLOCK_K // SLICE
    M_EIGHTS: tl.constexpr = BLOCK_M // EIGHT
    N_EIGHTS: tl.constexpr = BLOCK_N // EIGHT
    first = tl.program_id(0) * BLOCK_N
    row_N, row_M = _rows(first, N_EIGHTS), _rows(0, M_EIGHTS)
    inside_N, inside_M = row_N < outputs, row_M < rows
    column = _columns(S, W)
    at_N = row_N.to(tl.int64) * w_stride
    w_ptr += at_N
    x_ptr += row_M * x_stride
    if norm_ptr is not None:
        # One row for all eight, by a stride of 0 that the compiler does not know: else it lays lanes out otherwise.
        norm_ptr += _rows(0, 1) * norm_stride
    if GATE is not None:
        up_ptr += at_N
    # Of all that is read only weights may be asked for before the kernel ahead is through.
    w = ()
    up = ()
    norm = ()
    for step in tl.static_range(HELD):
        at = column + step * BLOCK_K * W
        w = w + (_load(w_ptr, at, inside_N & (at < inputs)),)
        if GATE is not None:
            up = up + (_load(up_ptr, at, inside_N & (at < inputs)),)
        if norm_ptr is not None:
            norm = norm + (_load(norm_ptr, at, at < inputs),)
    out_N = first + tl.arange(0, BLOCK_N)
    bias_N = _bias(bias_ptr, out_N, outputs)
    up_bias_N = _bias(up_bias_ptr, out_N, outputs)
    if EARLY:
        gdc_wait()
    x = ()
    for step in tl.static_range(AHEAD):
        at = column + step * BLOCK_K * W
        x = x + (_load(x_ptr, at, inside_M & (at < inputs)),)
    token_M = tl.arange(0, BLOCK_M)
    y_ptr += token_M.to(tl.int64)[:, None] * outputs + out_N[None, :]
    inside_MN = (token_M < rows)[:, None] & (out_N < outputs)[None, :]
    if ADDED:
        residual_MN = tl.load(y_ptr, inside_MN, 0.0).to(tl.float32)
    total_WNM = tl.zeros((W, BLOCK_N, BLOCK_M), tl.float32)
    total_up_WNM = total_WNM
    squares = tl.zeros((EIGHT, W, S, M_EIGHTS, 4), tl.float32)
    for step in tl.static_range(STEPS):
        w_now, x_now = w[step], x[step]
        if norm_ptr is not None:
            w_now = _scaled(w_now, norm[step], offset)
            wide = tl.reshape(x_now, (EIGHT, W, S, M_EIGHTS, 4, EIGHT)).to(tl.float32)
            squares += tl.sum(wide * wide, 5)
        x_WKM = _second_operand(x_now, M_EIGHTS, S, W)
        total_WNM = tl.dot(_first_operand(w_now, N_EIGHTS, S, W), x_WKM, total_WNM)
        if GATE is not None:
            up_now = up[step]
            if norm_ptr is not None:
                up_now = _scaled(up_now, norm[step], offset)
            total_up_WNM = tl.dot(_first_operand(up_now, N_EIGHTS, S, W), x_WKM, total_up_WNM)
        if step + HELD < STEPS:
            at = column + (step + HELD) * BLOCK_K * W
            w = w + (_load(w_ptr, at, inside_N & (at < inputs)),)
            if GATE is not None:
                up = up + (_load(up_ptr, at, inside_N & (at < inputs)),)
            if norm_ptr is not None:
                norm = norm + (_load(norm_ptr, at, at < inputs),)
        if step + AHEAD < STEPS:
            at = column + (step + AHEAD) * BLOCK_K * W
            x = x + (_load(x_ptr, at, inside_M & (at < inputs)),)
    rstd_M = tl.full((BLOCK_M,), 1.0, tl.float32)
    if norm_ptr is not None:
        sums = tl.sum(tl.sum(tl.sum(squares, 2), 3), 1)
        rstd_M = tl.rsqrt(tl.reshape(tl.trans(sums), (BLOCK_M,)) / inputs + eps)
    y_MN = _finished(total_WNM, rstd_M, bias_N, LEVELS)
    if GATE is not None:
        y_MN = apply(y_MN, GATE) * _finished(total_up_WNM, rstd_M, up_bias_N, LEVELS)
    if ADDED:
        y_MN += residual_MN
    tl.store(y_ptr, y_MN, inside_MN)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, plan: Plan | None = None) -> Tensor:
    """x·Wᵀ + b, summed in fp32; rows of x and of the weight may be strided. plan: instead of the rule's."""
    y = x_TK.new_empty((*x_TK.shape[:-1], weight_NK.shape[0]))
    _launch(y, x_TK, weight_NK, bias_N, plan=plan)
    return y


def norm_linear(
    x_TK: Tensor,
    norm_weight_K: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float,
    gate: str | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """RMSNorm(x)·Wᵀ + b; with a gate act(first half of it)·second half. W times the norm's weight is rounded, not x."""
    outputs = weight_NK.shape[0] if gate is None else weight_NK.shape[0] // 2
    y = x_TK.new_empty((*x_TK.shape[:-1], outputs))
    _launch(y, x_TK, weight_NK, bias_N, norm_weight_K, eps, offset, gate, plan=plan)
    return y


def add_linear(
    residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, plan: Plan | None = None
) -> None:
    """residual += x·Wᵀ + b in place, rounded once; the residual is contiguous."""
    _launch(residual_TN, x_TK, weight_NK, bias_N, added=True, plan=plan)


def _launch(
    y: Tensor,
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    gate: str | None = None,
    added: bool = False,
    plan: Plan | None = None,
) -> None:
    inputs, outputs = weight_NK.shape[1], y.shape[-1]
    x_MK = x_TK if x_TK.dim() == 2 else x_TK.reshape(-1, inputs)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    rows = x_MK.shape[0]
    plan = plan or plan_for(rows, outputs, inputs, gate is not None)
    if plan is None:
        raise InvalidValue(f"no plan for {rows}×{outputs}×{inputs}: see rooflight/ops/kernels/few_plan.py")
    # A plain product's weights may be what the kernel ahead has just written; those of a layer are parameters.
    steps, early = steps_of(plan, inputs), early_launch(rows) and (norm_weight_K is not None or added)
    _few_linear_kernel[(ceil_div(outputs, plan.outputs),)](
        y,
        x_MK,
        weight_NK,
        None if gate is None else weight_NK[outputs:],
        bias_N,
        None if gate is None or bias_N is None else bias_N[outputs:],
        norm_weight_K,
        rows,
        outputs,
        inputs,
        x_MK.stride(0),
        weight_NK.stride(0),
        0,
        eps,
        offset,
        GATE=gate,
        ADDED=added,
        EARLY=early,
        BLOCK_M=rows_block(rows),
        BLOCK_N=plan.outputs,
        BLOCK_K=plan.inputs,
        W=plan.warps,
        LEVELS=plan.warps.bit_length() - 1,
        STEPS=steps,
        HELD=min(plan.held, steps),
        AHEAD=min(plan.ahead, steps),
        num_warps=plan.warps,
        maxnreg=plan.registers,
        launch_pdl=early,
    )
