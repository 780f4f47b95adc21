"""Cross-entropy of logits in memory and the softmax of scores on a GPU, through their Ops, against fp64 at real sizes.

Legend: T tokens  V vocabulary  R rows  S keys
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rooflight.ops import loss
from rooflight.ops.attention import naive
from rooflight.ops.loss import IGNORE, cross_entropy

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPS = (cross_entropy, loss.cross_entropy_backward, naive.attention_softmax, naive.softmax_backward)
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
# A rounding of each element; in fp32, what an exponential of a difference of about 20 is off by.
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 8e-3}
# Half the spacing of fp16 below 6e-5, and a little for what was rounded to fp32 before; the others have none so near.
SUBNORMAL = {FP32: 0.0, FP16: 3.1e-8, BF16: 0.0}
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to a reference fails: the kernel is what is tested. Fresh memory holds NaN."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in OPS:
        monkeypatch.setattr(op, "reference", refuse)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kw: empty(self, *args, **kw).fill_(float("nan")))


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Every element within a rounding of its own, and of what is nothing beside the greatest."""
    error, floor = (found.double() - wanted).abs(), 2e-7 * wanted.abs().max()
    worst = (error / (TOLERANCE[found.dtype] * wanted.abs() + floor + SUBNORMAL[found.dtype])).max()
    assert found.shape == wanted.shape and worst <= 1, f"{worst:.2f} times the tolerance"


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "softcap"),
    [(1024, 128256, 0.0), (999, 50257, 0.0), (512, 151936, 30.0), (1, 32000, 0.0), (20000, 1000, 0.0), (4097, 7, 3.0)],
)
def test_cross_entropy(tokens: int, vocabulary: int, softcap: float, dtype: torch.dtype) -> None:
    logits_TV = (3 * draw(tokens, vocabulary, dtype=dtype)).requires_grad_()
    targets_T = torch.randint(0, vocabulary, (tokens,), device="cuda")
    targets_T[3::7] = IGNORE
    value, lse_T = cross_entropy(logits_TV, targets_T, IGNORE, softcap)
    (found,) = torch.autograd.grad(tokens * value, logits_TV, retain_graph=True)
    leaf = logits_TV.detach().double().requires_grad_()
    z_TV = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    wanted = F.cross_entropy(z_TV, targets_T, ignore_index=IGNORE)
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=2e-6)
    torch.testing.assert_close(lse_T.double(), z_TV.logsumexp(-1).detach(), rtol=2e-6, atol=2e-6)
    close(found, torch.autograd.grad(tokens * wanted, leaf)[0])
    again, lses_T = cross_entropy(logits_TV, targets_T, IGNORE, softcap)
    assert torch.equal(again, value) and torch.equal(lses_T, lse_T)
    assert torch.equal(torch.autograd.grad(tokens * again, logits_TV)[0], found)


def test_a_slice_of_wider_rows() -> None:
    wide_TV = draw(300, 4096, dtype=BF16)
    targets_T = torch.randint(0, 1000, (300,), device="cuda")
    for rows in (wide_TV[:, 16:1016], wide_TV[:, 17:1017], wide_TV.t()[:300, :200]):
        value, lse_T = cross_entropy(rows, targets_T % rows.shape[1])
        same, lses_T = cross_entropy(rows.contiguous(), targets_T % rows.shape[1])
        torch.testing.assert_close((value, lse_T), (same, lses_T), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_neither_pass_waits_for_the_device() -> None:
    logits_TV, targets_T = draw(64, 1000, dtype=BF16).requires_grad_(), torch.arange(64, device="cuda")
    for _ in range(2):
        torch.autograd.grad(cross_entropy(logits_TV, targets_T)[0], logits_TV)  # compiles, the first time
        try:
            torch.cuda.set_sync_debug_mode("error")
            torch.autograd.grad(cross_entropy(logits_TV, targets_T)[0], logits_TV)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_to_the_31_logits() -> None:
    tokens, vocabulary = 2**15 + 8, 2**16
    logits_TV = torch.zeros(tokens, vocabulary, device="cuda", dtype=BF16)
    logits_TV[-1] = draw(vocabulary, dtype=BF16)
    targets_T = torch.full((tokens,), IGNORE, device="cuda")
    targets_T[-1] = 5
    value, lse_T = cross_entropy(logits_TV, targets_T)
    found = loss.cross_entropy_backward(torch.ones((), device="cuda"), logits_TV, targets_T, lse_T, IGNORE, 0.0)
    leaf = logits_TV[-1:].double().requires_grad_()
    wanted = F.cross_entropy(leaf, targets_T[-1:])
    assert float(value) == pytest.approx(float(wanted.detach()), rel=2e-6)
    close(found[-1:], torch.autograd.grad(wanted, leaf)[0])


@DTYPES
@pytest.mark.parametrize(
    ("shape", "causal", "softcap"),
    [
        ((1, 1, 16384, 4096), False, 0.0),
        ((8, 16, 1024, 1024), True, 0.0),
        ((1, 3, 77, 1000), True, 20.0),
        ((1, 2, 33, 16384), False, 0.0),
        ((1, 2, 33, 20000), True, 20.0),
    ],
)
def test_softmax(shape: tuple[int, ...], causal: bool, softcap: float, dtype: torch.dtype) -> None:
    scores, grad = (3 * draw(*shape, dtype=dtype)).requires_grad_(), draw(*shape, dtype=dtype, seed=1)
    probs = naive.attention_softmax(scores, causal, 0, softcap)
    (found,) = torch.autograd.grad(probs, scores, grad)
    z = scores.detach().double()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    hidden = torch.ones(shape[2:], dtype=torch.bool, device="cuda").triu(1 + shape[3] - shape[2])
    close(probs.detach(), (z.masked_fill_(hidden, float("-inf")) if causal else z).softmax(-1))
    # Of the probabilities as they are kept.
    p, g = probs.detach().double(), grad.double()
    slope = 1 - torch.tanh(scores.detach().double() / softcap) ** 2 if softcap else 1
    wanted = p * (g - (p * g).sum(-1, keepdim=True)) * slope
    error, floor = (found.double() - wanted).abs(), 1e-6 * (p * g).abs().amax(-1, keepdim=True)
    assert (error <= TOLERANCE[dtype] * wanted.abs() + floor + SUBNORMAL[dtype]).all()
