"""How products of tens of rows are cut into programs, and what `wide_linear` refuses; no kernel runs here."""

from __future__ import annotations

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div
from rooflight.ops.kernels.wide_linear import add_linear, norm_linear
from rooflight.ops.kernels.wide_plan import (
    HEIGHT,
    SHARED_BYTES,
    Plan,
    fits,
    plan_for,
    programs_of,
    registers_of,
    shared_bytes,
    steps_of,
)

REGISTERS_OF_A_MULTIPROCESSOR, WARPS = 65536, 12
# Outputs after the gate, inputs, whether gated.
SHAPES = [(4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False), (96, 40, False)]


@pytest.mark.parametrize("rows", [1, 9, 16, 33, 64, 100, 128])
@pytest.mark.parametrize(("outputs", "inputs", "gated"), SHAPES)
def test_programs_cover_all_and_run_at_once(outputs, inputs, gated, rows):
    plan = plan_for(rows, outputs, inputs, gated, 132)
    if outputs == 3072 and rows > 32:
        # All weights and rows of a program would not find room.
        assert plan is None
        return
    assert plan is not None and fits(plan, inputs, gated)
    assert plan.height % HEIGHT == 0
    assert steps_of(plan, inputs) * plan.splits * plan.inputs >= inputs
    assert plan.rows * ceil_div(rows, plan.rows) >= rows
    assert programs_of(plan, rows, outputs, gated) <= 132
    assert shared_bytes(plan, inputs, gated) <= SHARED_BYTES
    assert registers_of(plan, True) * 32 * WARPS <= REGISTERS_OF_A_MULTIPROCESSOR


def test_a_large_matrix_has_no_plan():
    assert plan_for(64, 14336, 4096, True, 132) is None
    assert plan_for(64, 4096, 14336, False, 132) is None


def test_refusals():
    x, w = torch.zeros(20, 64, dtype=torch.bfloat16), torch.zeros(128, 64, dtype=torch.bfloat16)
    norm, out = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(20, 128, dtype=torch.bfloat16)
    wide = torch.zeros(20, 70, dtype=torch.bfloat16)
    many = torch.zeros(129, 64, dtype=torch.bfloat16)
    cases = [
        ((many, norm, w, None, 1e-6), "rows"),
        ((x[:, :32], norm, w, None, 1e-6), "columns"),
        ((x.float(), norm.float(), w.float(), None, 1e-6), "bf16"),
        ((x, norm, w.half(), None, 1e-6), "bf16"),
        ((wide[:, :64], norm, w, None, 1e-6), "16 bytes"),
        ((x, norm, w, norm, 1e-6), "bias"),
        ((x, w[0, :8], w, None, 1e-6), "norm weight"),
        ((x, norm, w, None, 1e-6, 0.0, "tanh"), "activation"),
        ((x, norm, w[:120], None, 1e-6, 0.0, "silu"), "eights"),
    ]
    for args, message in cases:
        with pytest.raises(InvalidValue, match=message):
            norm_linear(*args)
    with pytest.raises(InvalidValue, match="residual"):
        add_linear(out[:, :64], x, w, None)
    large = torch.zeros(128, 4096, dtype=torch.bfloat16)
    with pytest.raises(InvalidValue, match="does not fit"):
        add_linear(out, torch.zeros(20, 4096, dtype=torch.bfloat16), large, None, Plan(64, 64, 1, 64))
