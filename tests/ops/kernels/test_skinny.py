"""Products of few rows under the interpreter against fp64; fresh memory holds NaN there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.fused_linear import norm_linear
from rooflight.ops.kernels.skinny_plan import CLASSES, MOST_ROWS, Plan, plan_for, takes

from .oracle import assert_close

HALF, BF16 = torch.float16, torch.bfloat16
FMA, STAGED = Plan(4, 256, 1, 1), Plan(2, 64, 1, 3)
# Outputs and inputs: whole tiles, some left over, less than a tile, one of each, and an input that no 16 bytes divide.
SIZES = [(64, 128), (70, 200), (5, 24), (1, 1), (33, 321)]


def draw(rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Any]:
    g = torch.Generator().manual_seed(rows + outputs + inputs)
    x, w, b = (torch.randn(*size, generator=g).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,)))
    return x, w, b if bias else None


def exact(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    y = x.double() @ w.double().t()
    return (y if b is None else y + b.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_in_registers(interpret, rows, outputs, inputs, dtype):
    args = draw(rows, outputs, inputs, dtype, bias=rows % 2 == 1)
    assert_close(interpret("skinny_linear.linear", *args, FMA), exact(*args), dtype)


@pytest.mark.parametrize("plan", [FMA, STAGED], ids=["at once", "in stages"])
def test_strided_rows_and_more_dimensions(interpret, plan):
    x, w, b = draw(6, 40, 96, HALF)
    wide_x, wide_w = torch.full((6, 200), float("nan"), dtype=HALF), torch.full((40, 100), float("nan"), dtype=HALF)
    wide_x[:, 8:104], wide_w[:, :96] = x, w
    want = exact(x, w, b)
    found = interpret("skinny_linear.linear", wide_x[:, 8:104], wide_w[:, :96], b, plan)
    assert_close(found, want, HALF)
    assert_close(interpret("skinny_linear.linear", wide_x[3, 8:104], wide_w[:, :96], b, plan), want[3], HALF)
    found = interpret("skinny_linear.linear", wide_x[:, 8:104].unflatten(0, (2, 3)), w, b, plan)
    assert_close(found, want.unflatten(0, (2, 3)), HALF)
    assert_close(interpret("skinny_linear.linear", x.t().contiguous().t(), w, b, plan), want, HALF)


@pytest.mark.parametrize("plan", [FMA, STAGED], ids=["at once", "in stages"])
def test_what_is_not_finite_stays_in_its_row_and_output(interpret, plan):
    x, w, b = draw(5, 40, 96, HALF)
    x[1, 3], w[7, 90] = float("inf"), float("nan")
    y = interpret("skinny_linear.linear", x, w, b, plan)
    spoilt = torch.zeros(5, 40, dtype=torch.bool)
    spoilt[1], spoilt[:, 7] = True, True
    assert torch.equal(~y.isfinite(), spoilt)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_the_classes_plans(interpret, rows):
    """What a layer's call would run, but for the number of multiprocessors."""
    for outputs, inputs in ((200, 1024), (130, 4096), (64, 3072), (90, 2048)):
        args = draw(rows, outputs, inputs, HALF, bias=False)
        assert plan_for(rows, outputs, inputs) is None or takes(*args)
        if takes(*args):
            assert_close(interpret("skinny_linear.linear", *args), exact(*args), HALF)


def normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (weight.double() + offset)


ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("plan", [None, Plan(4, 256, 1, 1), STAGED], ids=["rule", "at once", "in stages"])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
def test_norm_and_gate_around_the_product(interpret, gate, outputs, inputs, plan):
    rows = 1 if plan is None else 3
    x, w, b = draw(rows, outputs if gate is None else 2 * outputs, inputs, HALF, bias=gate != "silu")
    norm, offset = torch.rand(inputs).to(HALF), 1.0 if gate is None else 0.0
    want = normed(x, norm, 1e-3, offset) @ w.double().t() + (0 if b is None else b.double())
    if gate is not None:
        first, second = want.chunk(2, -1)
        want = ACTIVATIONS[gate](first) * second
    found = interpret("skinny_linear.norm_linear", x, norm, w, b, 1e-3, offset, gate, plan)
    assert_close(found, want.to(HALF), HALF)


@pytest.mark.parametrize("plan", [None, FMA, STAGED], ids=["rule", "at once", "in stages"])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_the_product_is_added_in_place(interpret, outputs, inputs, plan):
    rows = 1 if plan is None else 3
    x, w, b = draw(rows, outputs, inputs, HALF, bias=inputs % 2 == 0)
    residual = torch.randn(rows, outputs).to(HALF)
    _, left = interpret.call("skinny_linear.add_linear", residual, x, w, b, plan)
    assert_close(left[0], (residual.double() + exact(x.double(), w.double(), b)).to(HALF), HALF)
    assert torch.equal(left[2], w)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_one_row_and_many_mean_the_same(interpret, rows, gate):
    """`kernels.fused_linear` hands few rows to one launch and others to separate kernels."""
    x, w, b = draw(rows, 48, 96, HALF)
    norm = torch.rand(96).to(HALF)
    want = norm_linear.reference(x.float(), norm.float(), w.float(), b.float(), 1e-5, 0.0, gate)
    assert_close(interpret("fused_linear.norm_linear", x, norm, w, b, 1e-5, 0.0, gate), want.to(HALF), HALF)
    residual = torch.randn(rows, 48).to(HALF)
    _, left = interpret.call("fused_linear.add_linear", residual, x, w, b)
    assert_close(left[0], (residual.float() + exact(x, w, b).float()).to(HALF), HALF)


def test_a_product_without_a_plan_is_refused(interpret):
    with pytest.raises(RuntimeError, match="no plan for 65×8×16"):
        interpret("skinny_linear.linear", *draw(65, 8, 16, HALF))


def test_the_first_class_that_holds_a_product_decides(monkeypatch: pytest.MonkeyPatch):
    small, large = Plan(1, 256, 1, 1), Plan(2, 256, 1, 1)
    monkeypatch.setattr(
        "rooflight.ops.kernels.skinny_plan.CLASSES",
        (
            type(CLASSES[0])(1, 1024, 8, small),
            type(CLASSES[0])(1, 4096, 100, None),
            type(CLASSES[0])(8, 4096, 1, large),
        ),
    )
    assert plan_for(1, 8192, 1024) is small and plan_for(1, 8193, 1024) is None
    assert plan_for(2, 1024, 1024) is large and plan_for(2, 1025, 1024) is None and plan_for(1, 1, 4097) is None


def test_what_is_left_to_cublas():
    def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, b = meta(1, 1024), meta(4096, 1024), meta(4096)
    assert takes(x, w) and takes(x, w, b) and takes(x[0], w, b) and takes(x[None], w, b)
    assert takes(x.half(), w.half())
    assert not takes(meta(MOST_ROWS + 1, 1024), w) and not takes(meta(8, 9, 1024), w) and not takes(meta(0, 1024), w)
    assert not takes(x.float(), w.float()) and not takes(x, w.half()) and not takes(x, w, b.float())
    # What torch refuses, and weights that do not lie row by row.
    assert not takes(meta(1, 512), w) and not takes(x, w, meta(4097)) and not takes(x, meta(1024, 4096).t())
