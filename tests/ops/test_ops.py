"""Every operation against its fp64 formula, values and gradients, and against torch.library's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rooflight.ops.op import all_ops

from .case import Case, Draw
from .cases import CASES, OPS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}
WITH_FORMULA = [case for case in CASES if case.formula is not None]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _copy(args: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def _close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Floats within the tolerance of the storage type, relative to the greatest; integers equal."""
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        if not a.is_floating_point():
            assert torch.equal(a, b)
        elif a.numel():
            error = (a.double() - b.double()).abs().max()
            assert error <= TOLERANCE[dtype] * (1 + b.double().abs().max())


@DTYPES
@pytest.mark.parametrize("case", WITH_FORMULA, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    args = case.args(Draw(dtype))
    wanted = _double_args(args)
    out, expected = OPS[case.name](*args), case.formula(*wanted)  # pyright: ignore[reportOptionalCall]
    if case.mutates:
        out, expected = [args[i] for i in case.mutates], [wanted[i] for i in case.mutates]
    _close(out, expected, dtype)


def _double_args(args: Any) -> Any:
    return tree_map(_double, _copy(args))


@DTYPES
@pytest.mark.parametrize("case", [case for case in WITH_FORMULA if case.differentiable], ids=str)
def test_gradients(case: Case, dtype: torch.dtype) -> None:
    args = case.args(Draw(dtype))
    leaves, wanted = _leaves(args, case), _leaves(_double_args(args), case)
    outputs, expected = tree_leaves(OPS[case.name](*leaves)), tree_leaves(case.formula(*wanted))  # pyright: ignore
    # An output that the operation calls not differentiable, as a logsumexp, counts in neither.
    counts = [out.requires_grad for out in outputs]
    assert counts[0]
    found = torch.autograd.grad(_weighted(outputs, counts), [leaves[i] for i in case.differentiable])
    formula = torch.autograd.grad(_weighted(expected, counts), [wanted[i] for i in case.differentiable])
    _close(found, formula, dtype)


def _leaves(args: tuple[Any, ...], case: Case) -> list[Any]:
    return [x.detach().requires_grad_() if i in case.differentiable else x for i, x in enumerate(args)]


def _weighted(outputs: list[Tensor], counts: list[bool]) -> Tensor:
    """A fixed random weighting of the outputs that count."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for out, counted in zip(outputs, counts, strict=True):
        if counted:
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            total = total + (out.double() * weight).sum()
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, request: pytest.FixtureRequest) -> None:
    if case.collective:
        request.getfixturevalue("fake_ranks")
    args = case.args(Draw(torch.float32))
    args = tuple(x.requires_grad_() if i in case.differentiable else x for i, x in enumerate(args))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS[case.name].overload, args, test_utils=tests)


def test_every_operation_has_a_row() -> None:
    assert {op.name for op in all_ops()} == {case.name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_without_a_formula_or_a_count_says_why(case: Case) -> None:
    assert case.why or (case.formula is not None and case.scalar is not None)


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(8).isnan().all()
