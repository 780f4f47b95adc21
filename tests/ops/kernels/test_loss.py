"""The kernels of the fused loss under the interpreter against fp64, and what they compile to for an H200."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import loss
from rooflight.ops.loss import IGNORE
from tests.ops.kernels.conftest import Interpreter
from tests.ops.kernels.test_ahead_of_time import Compiled, compile_launch, meta

COMPILES = (loss.row_loss_kernel,)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def drawn(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, width, generator=draw).to(dtype)
    weight_VD = torch.randn(vocabulary, width, generator=draw).to(dtype)
    targets_T = torch.randint(0, vocabulary, (tokens,), generator=draw)
    targets_T[0], targets_T[-1] = 0, vocabulary - 1
    targets_T[1] = IGNORE
    return x_TD, weight_VD, targets_T


def exact(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, softcap: float, count: int) -> tuple[Tensor, ...]:
    x, weight = x_TD.double().requires_grad_(), weight_VD.double().requires_grad_()
    z_TV = x @ weight.t()
    if softcap:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    value = cross_entropy(z_TV, targets_T, reduction="sum", ignore_index=IGNORE)
    value = value / (count or (targets_T != IGNORE).sum())
    return value.detach(), *torch.autograd.grad(value, (x, weight))


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert not found.isnan().any()
    assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk", "count"),
    [
        (7, 37, 3, 0),  # an odd vocabulary in several chunks, the last one short
        (5, 128, 8, 9),  # whole blocks only, one chunk, the count of a larger batch
        (3, loss.READ_BLOCK + 301, 2, 0),  # without a gradient, a whole block and a piece
    ],
)
def test_loss_and_gradients(
    interpret: Interpreter, tokens: int, vocabulary: int, chunk: int, count: int, softcap: float, dtype: torch.dtype
) -> None:
    args = drawn(tokens, vocabulary, 8, dtype)
    wanted = exact(*args, softcap, count)
    found = interpret("loss.linear_cross_entropy_with_grad", *args, softcap, IGNORE, count, chunk)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, dtype)
    assert [a.dtype for a in found] == [torch.float32, dtype, dtype]
    again = interpret("loss.linear_cross_entropy_with_grad", *args, softcap, IGNORE, count, chunk)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    alone = interpret("loss.linear_cross_entropy", *args, softcap, IGNORE, count, chunk)
    # Its blocks are smaller, and so the order of its sums is another.
    torch.testing.assert_close(alone, found[0], rtol=2e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("vocabulary", [loss.GRAD_BLOCK + 301, 2 * loss.GRAD_BLOCK])
def test_rows_of_several_blocks_become_their_gradient(
    interpret: Interpreter, vocabulary: int, softcap: float, dtype: torch.dtype
) -> None:
    # Without the products, which over so many terms are off by more than the kernel is.
    x_TD, weight_VD, targets_T = drawn(3, vocabulary, 8, dtype)
    logits_TV = loss.logits_buffer(x_TD, vocabulary, 3)
    torch.mm(x_TD, weight_VD.t(), out=logits_TV)
    leaf = logits_TV.double().requires_grad_()
    z_TV = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    losses = cross_entropy(z_TV, targets_T, reduction="none", ignore_index=IGNORE)
    (grad,) = torch.autograd.grad(losses.sum() / 2, leaf)
    args = logits_TV, targets_T, torch.zeros(3), torch.tensor(0.5), softcap, IGNORE
    _, (found_TV, _, losses_T, *_) = interpret.call("loss.row_losses", *args)
    torch.testing.assert_close(losses_T.double(), losses.detach(), rtol=1e-6, atol=0)
    # A rounding of each element, and fp32's of the logsumexp.
    rtol = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found_TV.double(), grad, rtol=rtol, atol=3.1e-8)


def test_rows_of_great_range_neither_overflow_nor_vanish(interpret: Interpreter) -> None:
    x_TD, targets_T = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([0, 2, 1])
    weight_VD = torch.tensor([[9e4], [0.0], [-9e4]])
    found = interpret("loss.linear_cross_entropy_with_grad", x_TD, weight_VD, targets_T, 0.0, IGNORE, 0, 4)
    wanted = exact(x_TD, weight_VD, targets_T, 0.0, 0)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


def test_a_softcaps_slope_is_right_near_zero(interpret: Interpreter) -> None:
    """Where tanh is computed by its series, and just beyond."""
    weight_VD = torch.linspace(-0.3, 0.3, 61).unsqueeze(-1)
    x_TD, targets_T = torch.tensor([[1.0], [0.01]]), torch.tensor([3, 30])
    found = interpret("loss.linear_cross_entropy_with_grad", x_TD, weight_VD, targets_T, 3.0, IGNORE, 0, 4)
    for a, b in zip(found, exact(x_TD, weight_VD, targets_T, 3.0, 0), strict=True):
        assert_close(a, b, torch.float32)


def test_what_is_not_finite_stays_in_its_row_and_shows(interpret: Interpreter) -> None:
    x_TD, weight_VD, targets_T = drawn(4, 37, 8, torch.float32)
    targets_T[2] = 37  # outside the vocabulary
    logits_TV = x_TD @ weight_VD.t()
    logits_TV[1] = float("nan")  # an ignored row
    losses_T, factor = torch.zeros(4), torch.tensor(0.5)
    _, left = interpret.call("loss.row_losses", logits_TV, targets_T, losses_T, factor, 0.0, IGNORE)
    grad_TV, _, losses_T = left[:3]
    assert losses_T.isnan().tolist() == [False, False, True, False]
    assert losses_T[1] == 0 and torch.equal(grad_TV[1], torch.zeros(37))
    assert not grad_TV.isnan().any()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Compiled]]:
    """Kernels that a test launched on meta tensors, compiled for sm_90 and not run."""
    found: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(compile_launch(self, args, options, tmp_path))

    monkeypatch.setattr(JITFunction, "run", run)
    yield found
    for kernel in found:
        print(f"\n{kernel} resident threads {kernel.resident_threads}", end="")


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("vocabulary", [128256, 50257])
@pytest.mark.parametrize("graded", [False, True])
def test_compiles_for_hopper(
    compiled: list[Compiled], vocabulary: int, softcap: float, graded: bool, dtype: torch.dtype
) -> None:
    logits_NV = loss.logits_buffer(meta(4096, 2048, dtype=dtype), vocabulary, 4096)
    targets_N, losses_N = meta(4096, dtype=torch.int64), meta(4096, dtype=torch.float32)
    factor = meta(dtype=torch.float32) if graded else None
    loss.row_losses(logits_NV, targets_N, losses_N, factor, softcap, IGNORE)
    (kernel,) = compiled
    # In fp32 a softcap takes 14 registers more than a thread of 32 warps has, in the piece of an odd vocabulary alone.
    assert kernel.stack <= (56 if softcap and graded and dtype == torch.float32 and vocabulary == 50257 else 0)
    assert kernel.wide_loads >= 4 and kernel.wide_stores >= (4 if graded else 0)
    assert kernel.resident_threads >= 512
