"""Linear layers of few rows on a GPU against fp64, through their Op, with other plans, and replayed from CUDA graphs.

FlashAttention's protocol: the error is at most twice that of torch's own product in the same precision.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.kernels import skinny_linear
from rooflight.ops.kernels.skinny_plan import MOST_ROWS, Plan, takes
from rooflight.ops.linear import linear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
# Rounding of the output alone, where torch's own error happens to be 0.
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4}
REGISTERS = [Plan(8, 1024, 4, 1), Plan(2, 4096, 4, 1), Plan(8, 256, 1, 6), Plan(4, 1024, 4, 4), Plan(4, 4096, 8, 1)]
SIZES = [(6144, 4096), (1024, 3072)]
# Each is a kernel of its own: of a row that 16 bytes do not divide, or one of whose sizes is 1.
ODD_SIZES = [(1000, 1000), (77, 333), (1, 8), (50_257, 768)]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to the reference fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    monkeypatch.setattr(linear, "reference", refuse)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def check(y: Tensor, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    want = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    theirs = (torch.nn.functional.linear(x, w, b).double() - want).abs().max()
    error = (y.double() - want).abs().max()
    allowed = 2 * theirs + FLOOR[y.dtype] * want.abs().max()
    assert y.shape == want.shape and not y.isnan().any()
    assert error <= allowed, f"{error:.2e} against {theirs:.2e} of torch"


def case(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1), draw(outputs, dtype=dtype)


@pytest.mark.parametrize("plan", REGISTERS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_in_registers(rows, plan):
    for size in SIZES:
        x, w, b = case(rows, *size, torch.bfloat16)
        check(skinny_linear.linear(x, w, b, plan), x, w, b)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), ODD_SIZES)
def test_odd_sizes_and_both_types(outputs, inputs, dtype):
    for rows, plan in ((1, REGISTERS[0]), (5, REGISTERS[0])):
        x, w, b = case(rows, outputs, inputs, dtype)
        check(skinny_linear.linear(x, w, b, plan), x, w, b)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_the_layer_as_the_engine_calls_it(rows):
    """Strided rows, a bias, leading dimensions, and twice the same."""
    ran = 0
    for outputs, inputs in ((4096, 1024), (6144, 4096), (4096, 14336), (1024, 3072), (1024, 2048)):
        w, b = draw(outputs, inputs, seed=1), draw(outputs, seed=2)
        wide = draw(rows, inputs + 64)
        for x, bias in (
            (wide[:, :inputs], None),
            (wide[:, 64:], b if inputs == 4096 else None),
            (wide[None, :, :inputs], None),
        ):
            if not takes(x, w, bias):
                continue
            ran += 1
            with torch.inference_mode():
                y = linear(x, w, bias)
                check(y, x, w, bias)
                assert torch.equal(y, linear(x, w, bias))
    if not ran:
        pytest.skip(f"all products of {rows} rows are cuBLAS's")


def test_more_rows_and_gradients_are_as_they_were():
    x, w = draw(MOST_ROWS + 1, 256).requires_grad_(), draw(300, 256, seed=1).requires_grad_()
    for rows in (2, MOST_ROWS + 1):
        y = linear(x[:rows], w)
        check(y.detach(), x.detach()[:rows], w.detach(), None)
        grad = draw(rows, 300, seed=2)
        found = torch.autograd.grad(y, (x, w), grad)
        want = torch.autograd.grad(torch.nn.functional.linear(x[:rows].double(), w.double()), (x, w), grad.double())
        for a, b in zip(found, want, strict=True):
            assert (a.double() - b.double()).abs().max() <= 2e-2 * b.abs().max()


@pytest.mark.parametrize("plan", REGISTERS[:2], ids=str)
def test_a_graph_of_layers_one_after_the_other(plan):
    """Replays see new inputs."""
    rows = 8
    weights = [draw(1024, 2048, seed=1), draw(2048, 1024, seed=2), draw(1000, 2048, seed=3)]
    weights = [(w.float() / w.shape[1] ** 0.5).to(w.dtype) for w in weights]
    x = draw(rows, 2048)

    def run() -> list[Tensor]:
        found = [x]
        for w in weights:
            found.append(skinny_linear.linear(found[-1], w, None, plan))
        return found

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for seed in range(20):
        x.copy_(draw(rows, 2048, seed=seed))
        graph.replay()
        for before, w, after in zip(found, weights, found[1:]):
            check(after, before, w, None)
    assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


def test_weights_of_more_elements_than_32_bits_count():
    w = torch.zeros(2**19 + 40, 4096, device="cuda", dtype=torch.bfloat16)
    w[-40:] = draw(40, 4096)
    for rows, plan in ((1, REGISTERS[0]), (4, REGISTERS[0])):
        x = draw(rows, 4096, seed=1)
        y = skinny_linear.linear(x, w, None, plan)
        check(y[:, -40:], x, w[-40:], None)
        assert not y[:, :-40].any()
