"""Products of 2 to 64 rows with norm, gate and residual under the interpreter against fp64; fresh memory holds NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from rooflight.ops.kernels.few_plan import LEAST_ROWS, MOST_ROWS, Plan, plan_for, steps_of

from .oracle import assert_close

HALF, FULL = torch.float16, torch.float32
EPS = 1e-5
HELD, STREAMED = Plan(16, 32, 2, 4, 4, 255), Plan(32, 64, 4, 1, 1, 255)
PLANS = pytest.mark.parametrize("plan", [HELD, STREAMED], ids=["held", "streamed"])
# Outputs and inputs: whole tiles, some left over, and less than a tile.
SIZES = [(64, 256), (70, 200), (5, 24), (33, 520)]


def draw(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows + outputs + inputs)
    x, w, b, n = (
        torch.randn(*size, generator=g) for size in ((rows, inputs), (outputs, inputs), (outputs,), (inputs,))
    )
    return x.to(dtype), (w / inputs**0.5).to(dtype), b.to(dtype), (1 + n / 8).to(dtype)


def exact(x: Tensor, w: Tensor, b: Tensor | None, norm: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """In fp64; the norm's weight is rounded with the product's, as the kernel does."""
    wide, weight = x.double(), w.double()
    if norm is not None:
        wide = wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        weight = weight * (norm.double() + offset)
    y = wide @ weight.t()
    return y if b is None else y + b.double()


@PLANS
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("rows", [2, 7, 16, 33, 64])
def test_product(interpret, rows, outputs, inputs, dtype, plan):
    x, w, b, _ = draw(rows, outputs, inputs, dtype)
    bias = b if rows % 2 else None
    assert_close(interpret("few_linear.linear", x, w, bias, plan), exact(x, w, bias).to(dtype), dtype)


@PLANS
@pytest.mark.parametrize("gate", [None, "silu", "gelu"])
@pytest.mark.parametrize("rows", [3, 32])
def test_norm_and_gate(interpret, rows, gate, plan):
    x, w, b, n = draw(rows, 80, 264, HALF)
    for offset in (0.0, 1.0):
        want = exact(x, w, b, n, offset)
        if gate is not None:
            want = {"silu": silu, "gelu": gelu}[gate](want[:, :40]) * want[:, 40:]
        found = interpret("few_linear.norm_linear", x, n, w, b, EPS, offset, gate, plan)
        assert_close(found, want.to(HALF), HALF)


@PLANS
def test_residual_is_added_in_place_and_rounded_once(interpret, plan):
    x, w, b, _ = draw(12, 40, 96, HALF)
    residual = draw(12, 40, 40, HALF)[0]
    want = residual.double() + exact(x, w, b)
    _, left = interpret.call("few_linear.add_linear", residual.clone(), x, w, b, plan)
    assert_close(left[0], want.to(HALF), HALF)


@PLANS
def test_strided_rows_and_more_dimensions(interpret, plan):
    x, w, b, _ = draw(6, 40, 96, HALF)
    wide_x, wide_w = torch.full((6, 200), float("nan"), dtype=HALF), torch.full((40, 104), float("nan"), dtype=HALF)
    wide_x[:, 8:104], wide_w[:, :96] = x, w
    want = exact(x, w, b).to(HALF)
    assert_close(interpret("few_linear.linear", wide_x[:, 8:104], wide_w[:, :96], b, plan), want, HALF)
    found = interpret("few_linear.linear", wide_x[:, 8:104].unflatten(0, (2, 3)), w, b, plan)
    assert_close(found, want.unflatten(0, (2, 3)), HALF)
    assert_close(interpret("few_linear.linear", x.t().contiguous().t(), w, b, plan), want, HALF)


@PLANS
def test_what_is_not_finite_stays_in_its_row_and_output(interpret, plan):
    x, w, b, _ = draw(5, 40, 96, HALF)
    x[1, 3], w[7, 90] = float("inf"), float("nan")
    spoilt = torch.zeros(5, 40, dtype=torch.bool)
    spoilt[1], spoilt[:, 7] = True, True
    assert torch.equal(~interpret("few_linear.linear", x, w, b, plan).isfinite(), spoilt)


@pytest.mark.parametrize("rows", [2, 20])
def test_the_rules_plans(interpret, rows):
    for outputs, inputs in ((1024, 1024), (1024, 2048)):
        x, w, _, _ = draw(rows, outputs, inputs, HALF)
        assert_close(interpret("few_linear.linear", x, w, None), exact(x, w, None).to(HALF), HALF)


def test_a_product_without_a_plan_is_refused(interpret):
    x, w, b, _ = draw(MOST_ROWS + 1, 8, 16, HALF)
    with pytest.raises(RuntimeError, match="no plan for 33×8×16"):
        interpret("few_linear.linear", x, w, b)


@pytest.mark.parametrize("rows", [2, 8, 16, 17, 32])
def test_all_weights_of_small_models_are_on_their_way_at_once(rows):
    layers: list[Any] = [(4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False)]
    for outputs, inputs, gated in layers:
        plan = plan_for(rows, outputs, inputs, gated)
        assert plan is not None and plan.held == steps_of(plan, inputs)


def test_what_is_left_to_others():
    assert plan_for(LEAST_ROWS - 1, 4096, 1024, False) is None and plan_for(MOST_ROWS + 1, 4096, 1024, False) is None
    assert plan_for(8, 4096, 1004, False) is None and plan_for(8, 4096, 14336, False) is None
