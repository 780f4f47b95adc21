"""The fused loss against torch's own over chunks of tokens, and how it chooses between its two operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.ops import fused_loss
from rooflight.ops.fused_loss import linear_cross_entropy, linear_cross_entropy_with_grad
from rooflight.ops.loss import IGNORE, cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Seen(TorchDispatchMode):
    """Names of the operators that ran, and the largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets_T = torch.randint(0, 11, (10,))
    targets_T[[1, 8]] = IGNORE
    return torch.randn(10, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True), targets_T


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
def test_chunks_of_any_size_give_torchs_loss_and_gradients(
    inputs: tuple[Tensor, Tensor, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "_CHUNK", chunk)
    x_TD, weight_VD, targets_T = inputs
    loss = linear_cross_entropy(x_TD, weight_VD, targets_T)
    expected = torch.nn.functional.cross_entropy(x_TD @ weight_VD.t(), targets_T)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss * 3, (x_TD, weight_VD))
    torch.testing.assert_close(found, torch.autograd.grad(expected * 3, (x_TD, weight_VD)))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x_TD, weight_VD, targets_T), expected.detach())


def test_gradients_are_made_only_where_wanted(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with Seen() as trained:
        linear_cross_entropy(*inputs)
    with torch.no_grad(), Seen() as evaluated:
        linear_cross_entropy(*inputs)
    assert trained.names == ["rooflight::linear_cross_entropy_with_grad"]
    assert evaluated.names == ["rooflight::linear_cross_entropy"]


def test_every_token_ignored_gives_nan_as_torch_does() -> None:
    logits_TV, targets_T = torch.randn(3, 5), torch.full((3,), IGNORE)
    assert cross_entropy(logits_TV, targets_T)[0].isnan()
    assert torch.nn.functional.cross_entropy(logits_TV, targets_T).isnan()


def test_huge_logits_do_not_overflow() -> None:
    logits_TV = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss, _ = cross_entropy(logits_TV, torch.tensor([0]))
    (grad_TV,) = torch.autograd.grad(loss, logits_TV)
    assert loss == 0
    assert torch.equal(grad_TV, torch.zeros(1, 3))


def test_more_chunks_read_the_weight_again() -> None:
    def traffic(tokens: int) -> int:
        x_TD, weight_VD = torch.empty(tokens, 8, device="meta"), torch.empty(32, 8, device="meta")
        targets_T = torch.empty(tokens, dtype=torch.int64, device="meta")
        out = (torch.empty((), device="meta"), x_TD, weight_VD)
        cost = linear_cross_entropy_with_grad.price(out, x_TD, weight_VD, targets_T)
        return cost.traffic - cost.total_bytes

    # A second chunk adds its logits, the weight twice, and its gradient's fp32 sum read and written; x once more.
    weight, chunk = 32 * 8 * 4, fused_loss._CHUNK
    assert traffic(2 * chunk) - traffic(chunk) == 5 * chunk * 32 * 4 + 4 * weight + chunk * 8 * 4
