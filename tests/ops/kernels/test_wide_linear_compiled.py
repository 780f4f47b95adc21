"""What `wide_linear` compiles to for an H100 or H200: no spills, tensor cores, stores of 16 bytes, room in memory.

`python -m pytest tests/ops/kernels/test_wide_linear_compiled.py -s` prints the table.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.kernels import wide_kernel, wide_linear
from rooflight.ops.kernels.wide_plan import SHARED_BYTES, Plan, plan_for, shared_bytes

from . import test_stream_linear_compiled as ahead

COMPILES = (wide_kernel.wide_linear_kernel,)
MULTIPROCESSORS = 132
# Outputs after the gate, inputs.
PRODUCTS = {"qkv": (4096, 1024), "out": (1024, 2048), "gate_up": (3072, 1024), "down": (1024, 3072)}
compiled = ahead.compiled


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_linear, "processors", lambda device: MULTIPROCESSORS)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(
    product: str, rows: int, plan: Plan, gate: str = "silu", dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> None:
    outputs, inputs = PRODUCTS[product]
    gated = product == "gate_up"
    x, weight = meta(rows, inputs, dtype=dtype), meta(outputs * (2 if gated else 1), inputs, dtype=dtype)
    b = meta(weight.shape[0], dtype=dtype) if bias else None
    if product in ("qkv", "gate_up"):
        norm = meta(inputs, dtype=dtype)
        wide_linear.norm_linear(x, norm, weight, b, 1e-6, gate=gate if gated else None, plan=plan)
    else:
        wide_linear.add_linear(meta(rows, outputs, dtype=dtype), x, weight, b, plan)


def verify(found: list[ahead.Compiled], plan: Plan, product: str) -> None:
    (kernel,) = found
    assert kernel.stack == 0 and kernel.registers <= 255
    assert kernel.shared <= min(SHARED_BYTES, shared_bytes(plan, PRODUCTS[product][1], product == "gate_up"))
    # Products, copies, the start of the next launch, the wait for the one before, and outputs in eights.
    for instruction in ("HGMMA", "UTMALDG", "PREEXIT", "ACQBULK", "STG.E.128"):
        assert instruction in kernel.sass, f"no {instruction}"


@pytest.mark.parametrize(
    ("product", "rows"),
    [
        *((product, rows) for product in PRODUCTS for rows in (16, 32)),
        *((p, r) for p in ("out", "down") for r in (64, 128)),
    ],
)
def test_the_rules_plans_compile_for_hopper(product, rows, compiled):
    outputs, inputs = PRODUCTS[product]
    plan = plan_for(rows, outputs, inputs, product == "gate_up", MULTIPROCESSORS)
    assert plan is not None
    launch(product, rows, plan)
    verify(compiled, plan, product)


@pytest.mark.parametrize("gate", ["gelu", "gelu_tanh", "relu"])
def test_other_forms_compile(gate, compiled):
    plan = Plan(64, 32, 1, 128)
    launch("gate_up", 20, plan, gate, torch.float16, True)
    verify(compiled, plan, "gate_up")


@pytest.mark.parametrize("plan", [Plan(128, 64, 2, 64), Plan(128, 64, 2, 128), Plan(64, 32, 1, 64)], ids=str)
def test_other_cuts_compile(plan, compiled):
    launch("gate_up", plan.rows, plan, bias=True)
    verify(compiled, plan, "gate_up")
