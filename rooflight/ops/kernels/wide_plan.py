"""Which products of up to 128 rows `wide_linear` takes, and how they are cut: outputs, rows and inputs of a program.

Legend: M rows of x  N outputs  K inputs
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div
from rooflight.ops.kernels.stream_plan import check as check_operands
from rooflight.ops.kernels.stream_plan import rows_block

SHARED_BYTES = 227 * 1024
OTHER_BYTES = 2048  # barriers, squares
HEIGHT = 64  # rows of the weight in a warpgroup's product
LEAST_SPLITS = 4  # of the inputs, where outputs are few
WIDE_STEPS_ROWS = 32  # of a program, up to which its steps are of 128 inputs
# Registers of a thread: what sums do not take, of the warps that square, of the one that copies.
OTHER_REGISTERS, SQUARING_REGISTERS, COPYING_REGISTERS = 64, 104, 24


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch constants: a program's rows of the weight and of x, programs along the inputs, inputs of a step."""

    height: int
    rows: int
    splits: int
    inputs: int


def steps_of(plan: Plan, inputs: int) -> int:
    """Steps of a program."""
    return ceil_div(ceil_div(inputs, plan.inputs), plan.splits)


def tiles_of(plan: Plan, outputs: int, gated: bool) -> int:
    return ceil_div(outputs * (2 if gated else 1), plan.height)


def programs_of(plan: Plan, rows: int, outputs: int, gated: bool) -> int:
    return tiles_of(plan, outputs, gated) * plan.splits * ceil_div(rows, plan.rows)


def shared_bytes(plan: Plan, inputs: int, gated: bool) -> int:
    """Weights, rows of x, and what the sums' change of hands takes."""
    steps = steps_of(plan, inputs)
    exchange = plan.height // (2 if gated else 1) * plan.rows * 4 if plan.splits == 1 else 0
    return 2 * plan.inputs * steps * (plan.height + plan.rows) + exchange + OTHER_BYTES


def registers_of(plan: Plan, normed: bool) -> int:
    """Registers of a thread on entry, of which the warps of products take what the others do not need."""
    sums = plan.height * plan.rows // 128
    # Where inputs are split, parts of others' sums are on their way beside a program's own.
    held = sums + sums // 2 if plan.splits == 1 else 3 * sums
    wanted = min(240, held + OTHER_REGISTERS) + COPYING_REGISTERS
    groups = 3 if normed else 2
    wanted += SQUARING_REGISTERS if normed else 0
    return ceil_div(ceil_div(wanted, groups), 8) * 8


def fits(plan: Plan, inputs: int, gated: bool) -> bool:
    """Whether a program finds its place in a multiprocessor."""
    return shared_bytes(plan, inputs, gated) <= SHARED_BYTES


def plan_for(rows: int, outputs: int, inputs: int, gated: bool, multiprocessors: int) -> Plan | None:
    """How a product is cut; outputs are those after the gate. None: better left to others.

    Few outputs: four programs share the inputs, and rows are shared as far as programs run at once. Else a program has
    all inputs where they find room, and up to 64 rows. Measured by `benchmarks/ops_decode_layer.py --tune wide`.
    """
    tiles, block = ceil_div(outputs * (2 if gated else 1), HEIGHT), rows_block(rows)
    few = LEAST_SPLITS * tiles <= multiprocessors
    for splits in (LEAST_SPLITS, 2 * LEAST_SPLITS) if few else (1, 2, LEAST_SPLITS):
        for part in (16, 32, 64, 128) if few else (min(block, 64), 128):
            if part > block or tiles * splits * ceil_div(rows, part) > multiprocessors:
                continue
            for width in (128, 64):
                plan = Plan(HEIGHT, part, splits, width)
                if (width == 64 or part <= WIDE_STEPS_ROWS) and fits(plan, inputs, gated):
                    return plan
    return None


def check(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    residual_MN: Tensor | None,
    activation: str | None,
) -> None:
    """Raise InvalidValue, with what is wrong, for arguments of `wide_linear` that its kernel cannot run."""
    check_operands(x_MK, weight_NK, bias_N, norm_weight_K, residual_MN, activation, "wide_linear")
    eights = 8 if activation is None else 16
    if weight_NK.shape[0] % eights or weight_NK.shape[1] % 8:
        raise InvalidValue(
            f"weight of {tuple(weight_NK.shape)}: inputs and outputs, gates and values apart, are in eights"
        )
    if residual_MN is not None and (residual_MN.stride(0) % 8 or residual_MN.data_ptr() % 16):
        raise InvalidValue(f"rows of residual begin at multiples of 16 bytes, not with strides {residual_MN.stride()}")
