"""Which products of 2 to 32 rows `few_linear` takes, and how they are cut.

Legend: M rows of x  N outputs  K inputs
"""

from __future__ import annotations

from dataclasses import dataclass

from rooflight.ops.kernels import ceil_div, power_of_2

LEAST_ROWS, MOST_ROWS = 2, 32
FEWEST_PROGRAMS = 64
OTHER_REGISTERS = 44  # of a thread, for addresses, the norm and the like
# What is tried in turn: outputs of a program, inputs of a warp in a step, warps, registers of a thread. Measured for a
# layer of Qwen3-0.6B by `benchmarks/ops_decode_layer.py --tune few`; of 64 rows cuBLAS is the faster one.
MANY_ROWS = 16
SHAPES = ((32, 64, 8, 128), (32, 64, 8, 255), (16, 64, 8, 128), (16, 64, 16, 128), (16, 64, 8, 255))
SHORT_INPUTS, SHORT_OF_MANY, LONG_OF_MANY = 1024, (16, 32, 4, 255), (16, 64, 8, 255)


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch constants: outputs of a program, inputs of a warp in a step, warps, steps ahead, registers of a thread.

    held: steps of weights that are in registers or on their way; ahead: steps of x.
    """

    outputs: int
    inputs: int
    warps: int
    held: int
    ahead: int
    registers: int


def rows_block(rows: int) -> int:
    """Rows of x for which the kernel is compiled: a power of two, of which all smaller counts are a part."""
    return max(8, power_of_2(rows))


def steps_of(plan: Plan, inputs: int) -> int:
    return ceil_div(inputs, plan.inputs * plan.warps)


def cut(rows: int, inputs: int, gated: bool, outputs: int, width: int, warps: int, registers: int) -> Plan | None:
    """A plan with as many steps ahead as registers of a thread hold; None if not two steps of weights, nor all of them.

    Two numbers of 16 bits are in a register, each sum in its own.
    """
    tiles, block, steps = 2 if gated else 1, rows_block(rows), ceil_div(inputs, width * warps)
    of_weights, of_x = tiles * width * outputs // 64, width * block // 64
    room = registers - OTHER_REGISTERS - tiles * outputs * block // 32 - of_x
    held = min(steps, room // of_weights)
    if held < min(steps, 2):
        return None
    ahead = min(steps, 1 + (room - held * of_weights) // of_x)
    return Plan(outputs, width, warps, held, ahead, registers)


def plan_for(rows: int, outputs: int, inputs: int, gated: bool) -> Plan | None:
    """How a product is cut; outputs are those after the gate. None: better left to others.

    A program has all inputs of its outputs, at least as many programs run as keep memory busy, and all weights are on
    their way before the kernel ahead is through.
    """
    if not LEAST_ROWS <= rows <= MOST_ROWS or inputs % 8:
        return None
    of_many = SHORT_OF_MANY if inputs <= SHORT_INPUTS else LONG_OF_MANY
    for block, width, warps, registers in SHAPES if rows <= MANY_ROWS else (of_many,):
        plan = cut(rows, inputs, gated, block, width, warps, registers)
        if plan is not None and plan.held == steps_of(plan, inputs) and ceil_div(outputs, block) >= FEWEST_PROGRAMS:
            return plan
    return None
