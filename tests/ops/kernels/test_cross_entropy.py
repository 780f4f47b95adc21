"""The kernels of cross-entropy over logits in memory: in the interpreter against fp64, and compiled for an H200.

Legend: T tokens  V vocabulary
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rooflight.ops import loss as op
from rooflight.ops.kernels import cross_entropy, loss
from rooflight.ops.loss import IGNORE
from tests.ops.kernels import test_ahead_of_time as ahead
from tests.ops.kernels.conftest import Interpreter
from tests.ops.kernels.test_ahead_of_time import meta
from tests.ops.kernels.test_loss import DTYPES, assert_close

compiled = ahead.compiled
COMPILES = (cross_entropy._mean_kernel, cross_entropy._backward_kernel)


def drawn(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits_TV = (3 * torch.randn(tokens, vocabulary, generator=draw)).to(dtype)
    targets_T = torch.randint(0, vocabulary, (tokens,), generator=draw)
    targets_T[0], targets_T[-1] = 0, vocabulary - 1
    targets_T[1] = IGNORE
    return logits_TV, targets_T


def exact(logits_TV: Tensor, targets_T: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp, gradient)."""
    leaf = logits_TV.double().requires_grad_()
    z_TV = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    value = F.cross_entropy(z_TV, targets_T, ignore_index=IGNORE)
    return value.detach(), z_TV.logsumexp(-1).detach(), torch.autograd.grad(value, leaf)[0]


def both(
    interpret: Interpreter, logits_TV: Tensor, targets_T: Tensor, softcap: float = 0.0, grad: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    value, lse_T = interpret("cross_entropy.cross_entropy", logits_TV, targets_T, IGNORE, softcap)
    args = (torch.tensor(grad), logits_TV, targets_T, lse_T, IGNORE, softcap)
    return value, lse_T, interpret("cross_entropy.cross_entropy_backward", *args)


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    ("tokens", "vocabulary"),
    [
        (7, 37),  # rows that begin anywhere
        (5, 128),
        (3, 16),
        (3, loss.READ_BLOCK + 304),  # a whole block and a piece
        (3, 2 * cross_entropy.BLOCK + 1),
    ],
)
def test_values_and_gradients(
    interpret: Interpreter, tokens: int, vocabulary: int, softcap: float, dtype: torch.dtype
) -> None:
    args = *drawn(tokens, vocabulary, dtype), softcap
    found = both(interpret, *args)
    for a, b in zip(found, exact(*args), strict=True):
        assert_close(a, b, dtype)
    assert [a.dtype for a in found] == [torch.float32, torch.float32, dtype]
    assert all(torch.equal(a, b) for a, b in zip(found, both(interpret, *args), strict=True))


def test_the_mean_and_the_incoming_gradient_of_more_rows_than_a_block(
    interpret: Interpreter,
) -> None:
    tokens = cross_entropy.MEAN_BLOCK + 7
    losses_T, targets_T = torch.rand(tokens), torch.tensor([4, IGNORE, 0]).repeat(tokens)[:tokens]
    kept = (targets_T != IGNORE).sum()
    found = interpret("cross_entropy._mean", losses_T, targets_T, IGNORE, True)
    torch.testing.assert_close(found, losses_T.sum() / kept)
    found = interpret("cross_entropy._mean", torch.tensor(2.5), targets_T, IGNORE, False)
    torch.testing.assert_close(found, 2.5 / kept)


def test_a_slice_of_wider_rows_is_read_no_further(interpret: Interpreter) -> None:
    logits_TV, targets_T = drawn(4, 300, torch.float32)
    buffer = torch.full((4, 320), float("nan"))
    buffer[:, 16:316] = logits_TV
    for rows in (buffer[:, 16:316], logits_TV.t().contiguous().t()):
        for a, b in zip(both(interpret, rows, targets_T, 0.0, 2.0), exact(logits_TV, targets_T, 0.0), strict=True):
            assert_close(a, 2 * b if a.dim() == 2 else b, torch.float32)


def test_what_is_not_finite_stays_in_its_row_and_shows(interpret: Interpreter) -> None:
    logits_TV, targets_T = drawn(5, 37, torch.float32)
    logits_TV[1] = float("nan")  # an ignored row
    logits_TV[2, 5], logits_TV[3, 3:] = float("nan"), float("-inf")
    targets_T[3] = 2
    _, lse_T, grad_TV = both(interpret, logits_TV, targets_T)
    assert lse_T.isnan().tolist() == [False, True, True, False, False]
    assert grad_TV.isnan().any(-1).tolist() == [False, False, True, False, False]
    assert torch.equal(grad_TV[1], torch.zeros(37))
    targets_T[2] = IGNORE
    assert both(interpret, logits_TV, targets_T)[0].isfinite()


def test_huge_logits_and_no_kept_token(interpret: Interpreter) -> None:
    logits_TV = torch.tensor([[1e4, 0.0, -1e4]])
    value, lse_T, grad_TV = both(interpret, logits_TV, torch.tensor([0]))
    assert value == 0 and lse_T[0] == 1e4 and torch.equal(grad_TV, torch.zeros(1, 3))
    value, _, grad_TV = both(interpret, logits_TV, torch.tensor([IGNORE]))
    assert value.isnan() and torch.equal(grad_TV, torch.zeros(1, 3))


def test_what_the_kernels_leave_to_the_reference() -> None:
    (logits_TV, targets_T), takes = drawn(4, 37, torch.float32), op.cross_entropy.kernel_takes
    assert takes is not None and takes(logits_TV, targets_T, IGNORE, 0.0)
    assert not takes(logits_TV[:0], targets_T[:0], IGNORE, 0.0)
    assert not takes(logits_TV.double(), targets_T, IGNORE, 0.0)
    takes = op.cross_entropy_backward.kernel_takes
    assert takes is not None and takes(torch.ones(()), logits_TV, targets_T, torch.zeros(4), IGNORE, 0.0)


@DTYPES
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(8192, 128256), (16384, 32000), (8192, 50257)])
def test_compiles_for_hopper(
    compiled: list[ahead.Compiled],
    tokens: int,
    vocabulary: int,
    softcap: float,
    dtype: torch.dtype,
) -> None:
    logits_TV, targets_T = meta(tokens, vocabulary, dtype=dtype), meta(tokens, dtype=torch.int64)
    scalar, lse_T = meta(dtype=torch.float32), meta(tokens, dtype=torch.float32)
    cross_entropy.cross_entropy(logits_TV, targets_T, IGNORE, softcap)
    cross_entropy.cross_entropy_backward(scalar, logits_TV, targets_T, lse_T, IGNORE, softcap)
    rows, mean, factor, backward = compiled
    assert not any(kernel.stack for kernel in compiled)
    if vocabulary % 16 == 0:
        assert rows.wide_loads >= 4 and backward.wide_loads >= 2 and backward.wide_stores >= 2
    # Rows that begin anywhere: a maximum and a sum for every element of a thread.
    assert rows.resident_threads >= (1024 if vocabulary % 16 == 0 else 512) and backward.resident_threads >= 1024
    assert min(mean.warps, factor.warps) == cross_entropy.MEAN_WARPS
