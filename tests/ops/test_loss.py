"""The fused loss against torch's own over chunks of tokens, and how it chooses between its two operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.errors import InvalidValue, RooflightError
from rooflight.ops import chunked_loss, fused_loss
from rooflight.ops.cost import Cost
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


@pytest.mark.parametrize("block", [1, 25, 1000])
@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
def test_chunks_of_any_size_give_torchs_loss_and_gradients(
    inputs: tuple[Tensor, Tensor, Tensor], chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "ROW_BYTES", 4 * chunk)
    monkeypatch.setattr(chunked_loss, "BLOCK", block)
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


def test_micro_batches_with_the_batchs_count_add_up_to_the_batch(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TD, weight_VD, targets_T = inputs
    targets_T[5:] = IGNORE
    whole = linear_cross_entropy(x_TD, weight_VD, targets_T)
    expected = torch.autograd.grad(whole, (x_TD, weight_VD))
    count = int((targets_T != IGNORE).sum())
    # The second half has no target at all.
    halves = [(x_TD[rows], targets_T[rows]) for rows in (slice(0, 5), slice(5, 10))]
    parts = [linear_cross_entropy(x, weight_VD, targets, count=count) for x, targets in halves]
    assert parts[1] == 0
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(torch.autograd.grad(parts[0] + parts[1], (x_TD, weight_VD)), expected)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*halves[0][:1], weight_VD, halves[0][1], count=count), parts[0])
    with pytest.raises(InvalidValue, match="count -1"):
        linear_cross_entropy(x_TD, weight_VD, targets_T, count=-1)


def test_rows_that_are_ignored_cannot_spoil_gradients(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TD, weight_VD, targets_T = inputs
    x = x_TD.detach().clone()
    x[1] = float("nan")
    loss, grad_x_TD, _ = linear_cross_entropy_with_grad(x, weight_VD.detach(), targets_T)
    assert loss.isfinite() and grad_x_TD.isfinite().all() and torch.equal(grad_x_TD[1], torch.zeros(6))


@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward_says_why_it_cannot_be(inputs: tuple[Tensor, Tensor, Tensor], retain: bool) -> None:
    loss = linear_cross_entropy(*inputs) * 2
    first = torch.autograd.grad(loss, inputs[0], retain_graph=retain)[0].clone()
    with pytest.raises(RooflightError if retain else RuntimeError, match="second"):
        torch.autograd.grad(loss, inputs[1])
    again = torch.autograd.grad(linear_cross_entropy(*inputs) * 2, inputs[0])[0]
    assert torch.equal(first, again)


def test_the_weights_gradient_is_handed_on_without_a_copy() -> None:
    x_TD = torch.randn(4, 6, requires_grad=True)
    weight_VD = torch.nn.Parameter(torch.randn(11, 6))
    made: list[int] = []

    class Outputs(Seen):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if func.name().endswith("with_grad"):
                made.extend(t.data_ptr() for t in out)
            return out

    with Outputs() as seen:
        (linear_cross_entropy(x_TD, weight_VD, torch.tensor([0, 3, 4, 1])) * 0.5).backward()
    assert weight_VD.grad is not None and x_TD.grad is not None
    assert [x_TD.grad.data_ptr(), weight_VD.grad.data_ptr()] == made[1:]
    assert "aten::clone" not in seen.names


def priced(tokens: int, vocabulary: int = 32, dtype: torch.dtype = torch.float32, count: int = 0) -> Cost:
    x_TD = torch.empty(tokens, 8, device="meta", dtype=dtype)
    weight_VD = torch.empty(vocabulary, 8, device="meta", dtype=dtype)
    targets_T = torch.empty(tokens, dtype=torch.int64, device="meta")
    out = (torch.empty((), device="meta"), x_TD, weight_VD)
    return linear_cross_entropy_with_grad.price(out, x_TD, weight_VD, targets_T, 0.0, IGNORE, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_chunks_read_the_weight_again_and_hold_no_more(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = dtype.itemsize
    monkeypatch.setattr(fused_loss, "LOGITS_BYTES", 256 * 32 * size)  # chunks of 256 tokens

    def extra(tokens: int) -> int:
        cost = priced(tokens, dtype=dtype)
        return cost.traffic - cost.total_bytes

    # Another chunk adds its logits, the weight twice, and its gradient's fp32 sum read and written; x once more.
    elements = 32 * 8
    assert extra(768) - extra(512) == 5 * 256 * 32 * size + 2 * elements * size + 8 * elements + 256 * 8 * size
    # The fp32 sum beside the bf16 gradient is written, read and rounded only where there are several chunks.
    first = 0 if dtype == torch.float32 else 8 * elements
    assert extra(512) - extra(256) == extra(768) - extra(512) + first
    rows = 256 * 64 * size  # a row of 32 logits is padded to 64
    held = 0 if dtype == torch.float32 else 4 * elements
    assert [priced(n, dtype=dtype).workspace for n in (256, 512, 768)] == [rows, rows + held, rows + held]


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"),
    [(16384, 128256, 4096), (32768, 50304, 8192), (100, 128256, 128), (16384, 10**9, 128), (9000, 128256, 3072)],
)
def test_chunks_of_a_gpu_are_as_few_as_a_gib_of_logits_allows_and_even(
    tokens: int, vocabulary: int, chunk: int
) -> None:
    assert fused_loss.chunk_tokens(tokens, vocabulary, 2) == chunk
    assert chunk == 128 or 2 * chunk * vocabulary <= 2**30
