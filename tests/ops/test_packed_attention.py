"""Attention within packed documents: against fp64 over a mask, at its edges, its price, and its ways on a GPU.

Legend: T tokens  N documents  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rooflight.errors import InvalidValue, RooflightError
from rooflight.ops import batch
from rooflight.ops.attention import attention, cuda_packed, packed, packed_attention
from rooflight.ops.batch import Batch
from rooflight.ops.cost import Cost

SCALE = 0.3
# The last row's documents are longer than the chunk of queries that the reference takes at a time.
LENGTHS = ((5, 3, 8), (1, 1, 1, 7), (13,), (0, 4, 4, 0, 9, 0), (300, 1, 261))
SHAPES = ((4, 4, 8, 8), (6, 2, 8, 8), (4, 1, 16, 8))  # H, K, E, U
OPTIONS = ((0, 0.0, False), (3, 0.0, False), (0, 2.0, True), (270, 2.0, True))  # window, softcap, sinks


def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Any, window: int, cap: float, sinks: Tensor | None) -> Any:
    """Every token against every token, those of other documents hidden: out [T,H,U], logsumexp [H,T]."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    age = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
    seen = (document_T.unsqueeze(1) == document_T) & (age >= 0)
    if window:
        seen = seen & (age < window)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhe,she->hqs", q, k) * SCALE
    if cap:
        scores = cap * torch.tanh(scores / cap)
    weights = torch.exp(scores) * seen
    total = weights.sum(-1) + (0 if sinks is None else sinks.exp().unsqueeze(-1))
    return torch.einsum("hqs,shu->qhu", weights / total.unsqueeze(-1), v), total.log()


def draw(lengths: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as slices of one projection's output, grad, and sinks."""
    heads, kv_heads, head_dim, value_dim = shape
    generator = torch.Generator().manual_seed(5)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    tokens = sum(lengths)
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * value_dim]
    q, k, v = normal(tokens, sum(widths)).split(widths, dim=-1)
    laid = [q.unflatten(-1, (heads, -1)), k.unflatten(-1, (kv_heads, -1)), v.unflatten(-1, (kv_heads, -1))]
    return [*laid, normal(tokens, heads, value_dim), normal(heads)]


def close(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def oracle(tensors: list[Tensor], lengths: Any, window: int, cap: float, sinks: bool) -> tuple[Any, Any]:
    """(out, logsumexp) and gradients of q, k, v and, with them, sinks in fp64."""
    leaves = [x.double().detach().requires_grad_() for x in (*tensors[:3], *(tensors[4:] if sinks else ()))]
    outputs = exact(*leaves[:3], lengths, window, cap, leaves[3] if sinks else None)  # pyright: ignore[reportCallIssue]
    return outputs, torch.autograd.grad(outputs[0], leaves, tensors[3].double())


@pytest.mark.parametrize(("window", "cap", "sinks"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients(lengths: Any, shape: Any, window: int, cap: float, sinks: bool) -> None:
    tensors = draw(lengths, shape)
    leaves = [x.detach().requires_grad_() for x in (*tensors[:3], *(tensors[4:] if sinks else ()))]
    q, k, v = leaves[:3]
    options = (starts_of(lengths), max(lengths), SCALE, window, cap, leaves[3] if sinks else None)
    outputs = packed_attention(q, k, v, *options)
    wanted, wanted_grads = oracle(tensors, lengths, window, cap, sinks)
    close(outputs, wanted)
    close(torch.autograd.grad(outputs[0], leaves, tensors[3]), wanted_grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("window", [0, 2, 100, 128, 600])
@pytest.mark.parametrize("lengths", [(128, 129), (513, 127), (1030,)], ids=str)
def test_long_documents_in_tiles(lengths: Any, window: int, dtype: torch.dtype) -> None:
    """Around the sizes at which the CPU's way changes."""
    tensors = draw(lengths, (2, 1, 8, 8), dtype)
    q, k, v = leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    outputs = packed_attention(q, k, v, starts_of(lengths), max(lengths), SCALE, window)
    found = (*outputs, *torch.autograd.grad(outputs[0], leaves, tensors[3]))
    wanted, wanted_grads = oracle(tensors, lengths, window, 0.0, False)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-6}[dtype]
    for a, b in zip(found, (*wanted, *wanted_grads), strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(("window", "cap", "sinks"), OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_way_without_host_values(lengths: Any, window: int, cap: float, sinks: bool) -> None:
    """What a GPU runs where no fused kernel takes the call; a bound above the longest document changes nothing."""
    *qkv, grad, sink = tensors = draw(lengths, SHAPES[-1])
    options = (starts_of(lengths), max(lengths) + 3, SCALE, window, cap, sink if sinks else None)
    outputs = packed.masked_forward(*qkv, *options)  # pyright: ignore[reportCallIssue]
    wanted, wanted_grads = oracle(tensors, lengths, window, cap, sinks)
    close(outputs, wanted)
    found = packed.masked_backward(grad, *qkv, *outputs, *options)  # pyright: ignore[reportCallIssue]
    close(found[: len(wanted_grads)], wanted_grads)


def test_the_way_without_host_values_reads_none() -> None:
    """On the meta device there are no values to read: a hidden synchronisation would raise."""
    *qkv, grad, sink = (x.to("meta") for x in draw((5, 3, 8), SHAPES[1]))
    options = (torch.empty(4, dtype=torch.int32, device="meta"), 8, SCALE, 3, 2.0, sink)
    outputs = packed.masked_forward(*qkv, *options)  # pyright: ignore[reportCallIssue]
    found = packed.masked_backward(grad, *qkv, *outputs, *options)  # pyright: ignore[reportCallIssue]
    assert [x.shape for x in found] == [x.shape for x in (*qkv, sink)]


def test_fake_tensors_need_no_lengths() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(16, heads, 8, requires_grad=True) for heads in (6, 2, 2))
        out, lse = packed_attention(q, k, v, torch.empty(4, dtype=torch.int32), 8, SCALE)
        out.sum().backward()
    assert (out.shape, lse.shape) == ((16, 6, 8), (6, 16))
    assert k.grad is not None and k.grad.shape == k.shape


@pytest.mark.parametrize("window", [0, 4])
def test_one_document_is_dense_attention(window: int) -> None:
    q, k, v, *_ = draw((13,), SHAPES[1])
    out, lse = packed_attention(q, k, v, starts_of((13,)), 13, SCALE, window)
    dense = attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), SCALE, True, window)
    assert torch.equal(out, dense[0][0]) and torch.equal(lse, dense[1][0])


@pytest.mark.parametrize(
    ("starts", "longest", "message"),
    [
        ([0, 5, 12], 8, "rise from 0 to the 13 tokens; they are [0, 5, 12]"),
        ([1, 5, 13], 8, "rise from 0 to the 13 tokens"),
        ([0, 9, 5, 13], 13, "rise from 0 to the 13 tokens"),
        ([0, 5, 13], 7, "max_length 7 is less than the longest document, 8 tokens"),
    ],
)
def test_wrong_starts(starts: list[int], longest: int, message: str) -> None:
    q, k, v, *_ = draw((13,), SHAPES[0])
    with pytest.raises(InvalidValue, match=message.replace("[", r"\[")):
        packed_attention(q, k, v, torch.tensor(starts, dtype=torch.int32), longest, SCALE)


def price(
    lengths: tuple[int, ...], window: int = 0, facts: Batch | None = None, dtype: torch.dtype = torch.bfloat16
) -> Cost:
    q, k, v, *_ = draw(lengths, SHAPES[0], dtype)
    args = (q, k, v, starts_of(lengths), max(lengths), SCALE, window)
    out = packed_attention(*args)
    with batch.use(facts or Batch.of(lengths, lengths)):
        return packed_attention.price(out, *args)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_price_counts_pairs(lengths: tuple[int, ...], window: int) -> None:
    heads, _, head_dim, value_dim = SHAPES[0]
    pairs = sum(min(t + 1, window or t + 1) for length in lengths for t in range(length))
    cost = price(lengths, window)
    assert cost.flops["bf16"] == heads * pairs * 2 * (head_dim + value_dim)
    # In fp32 all of it is one kind of work, and none of it may be lost.
    assert price(lengths, window, dtype=torch.float32).flops == {"fp32": sum(cost.flops.values())}
    assert [part.component for part in cost.parts] == ["scores", "softmax", "context"]


def test_the_size_for_curves() -> None:
    """Tokens, heads, the length of the document of a mean token, head dim, key heads."""
    assert price((8, 8)).size == (16, 4, 8, 8, 4)
    assert price((12, 4)).size == (16, 4, 10, 8, 4)
    assert all(isinstance(n, int) and n > 0 for n in price((1, 1, 0, 1)).size)


def test_a_batch_of_other_lengths_is_refused() -> None:
    with pytest.raises(InvalidValue, match="documents of 15 tokens and packed attention runs over 16"):
        price((8, 8), facts=Batch.of((8, 7), (8, 7)))
    with pytest.raises(RooflightError, match="ops.batch.use"):
        packed_attention.price(None, *draw((3,), SHAPES[0])[:3], starts_of((3,)), 3, SCALE)


class Kernels:
    """Stands in for torch.ops.aten on a machine without a GPU: the two kernels' signatures and layouts, in fp64."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _run(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int) -> Any:
        assert scale == SCALE and q.shape[-1] == v.shape[-1] and starts.dtype == torch.int32
        return exact(q.double(), k.double(), v.double(), starts.diff().tolist(), window, 0.0, None)

    def _grads(self, args: Any, scale: float, window: int) -> Any:
        """From the probabilities that the given logsumexp makes, as the kernels do."""
        grad, q, k, v, out, lse_HT, starts = args
        grad, q, k, v, out = (x.double() for x in (grad, q, k, v, out))
        groups = q.shape[1] // k.shape[1]
        document_T = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().long())
        age = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
        seen = (document_T.unsqueeze(1) == document_T) & (age >= 0) & (age < (window or len(q)))
        wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
        probs = torch.exp(torch.einsum("qhe,she->hqs", q, wide_k) * scale - lse_HT.double().unsqueeze(-1)) * seen
        delta = (grad * out).sum(-1).t().unsqueeze(-1)
        ds = probs * (torch.einsum("qhu,shu->hqs", grad, wide_v) - delta) * scale
        dk = torch.einsum("hqs,qhe->she", ds, q).unflatten(1, (-1, groups)).sum(2)
        dv = torch.einsum("hqs,qhu->shu", probs, grad).unflatten(1, (-1, groups)).sum(2)
        return tuple(x.to(torch.bfloat16) for x in (torch.einsum("hqs,she->qhe", ds, wide_k), dk, dv))

    def _flash_attention_forward(
        self, q, k, v, starts, starts_k, longest, longest_k, dropout, causal, debug, *, scale, window_size_left,
        window_size_right,
    ):  # fmt: skip
        assert starts is starts_k and longest == longest_k and not dropout and causal and window_size_right == 0
        self.calls.append("flash")
        out, lse = self._run(q, k, v, starts, scale, 0 if window_size_left is None else window_size_left + 1)
        return out.to(q.dtype), lse.float(), None, None, None

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, starts, starts_k, longest, longest_k, dropout, causal, seed, unused, *, scale,
        window_size_left, window_size_right,
    ):  # fmt: skip
        assert starts is starts_k and causal and window_size_right == 0 and lse.shape == (q.shape[1], len(q))
        self.calls.append("flash backward")
        window = 0 if window_size_left is None else window_size_left + 1
        return self._grads((grad, q, k, v, out, lse, starts), scale, window)


@pytest.mark.parametrize(("window", "sinks"), [(0, False), (3, False), (0, True), (3, True)])
@pytest.mark.parametrize("shape", [(6, 2, 8, 8), (4, 1, 16, 8)], ids=str)
def test_what_stands_around_the_gpu_kernels(
    window: int, sinks: bool, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value channels filled up and cut off again, sinks, and the layouts, with the kernels themselves stood in for."""
    aten = Kernels()
    monkeypatch.setattr(cuda_packed, "_aten", aten)
    lengths = (5, 1, 8)
    *qkv, grad, sink = tensors = draw(lengths, shape, torch.bfloat16)
    options = (starts_of(lengths), 8, SCALE, window, 0.0, sink if sinks else None)
    assert cuda_packed.takes_forward(*qkv, *options)  # pyright: ignore[reportCallIssue]
    out, lse = cuda_packed.forward(*qkv, *options)  # pyright: ignore[reportCallIssue]
    assert cuda_packed.takes_backward(grad, *qkv, out, lse, *options)  # pyright: ignore[reportCallIssue]
    found = cuda_packed.backward(grad, *qkv, out, lse, *options)  # pyright: ignore[reportCallIssue]
    wanted, wanted_grads = oracle(tensors, lengths, window, 0.0, sinks)
    close((out, lse), wanted, 2e-2)
    close(found[: len(wanted_grads)], wanted_grads, 4e-2)
    assert aten.calls == ["flash", "flash backward"]


def test_what_the_gpu_kernels_leave_alone() -> None:
    def takes(shape: Any = SHAPES[0], dtype: torch.dtype = torch.bfloat16, cap: float = 0.0) -> bool:
        q, k, v, *_ = draw((5, 3), shape, dtype)
        return cuda_packed.takes_forward(q, k, v, starts_of((5, 3)), 5, SCALE, 0, cap)

    assert takes() and takes((4, 1, 192, 128))
    assert not takes(dtype=torch.float32)
    assert not takes(cap=2.0)
    assert not takes((4, 4, 12, 12)) and not takes((4, 4, 264, 264)) and not takes((4, 4, 8, 16))
