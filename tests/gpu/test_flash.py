"""The flash attention kernels on a GPU, outputs and gradients, against fp64.

FlashAttention's protocol: the error is at most twice that of torch's plain attention in the same precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.attention import attention, packed_attention
from rooflight.ops.attention.flash import attention_backward
from rooflight.ops.attention.packed import packed_attention_backward
from rooflight.ops.kernels import flash_backward, flash_forward
from tests.ops.kernels.flash_oracle import Setup, Tensors, arguments, build, drawn, exact

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Rounding alone, where torch's own error happens to be small; of the largest value.
FLOOR = {BF16: 4e-3, FP16: 6e-4, FP32: 2e-6}
OPTIONS = ((True, 0, 0.0, False), (False, 0, 0.0, False), (True, 200, 20.0, True))  # causal, window, softcap, sinks


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to a reference fails. Fresh memory holds NaN."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in (attention, attention_backward, packed_attention, packed_attention_backward):
        monkeypatch.setattr(op, "reference", refuse)
    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *args, **kw: (lambda x: x.fill_(float("nan")) if x.is_floating_point() else x)(
            empty(self, *args, **kw)
        ),
    )


def run(setup: Setup, tensors: Tensors) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and gradients of q, k, v and of sinks where there are any."""
    name = "packed_attention" if setup.documents else "attention"
    args = arguments(setup, tensors, "cuda")
    out, lse = getattr(flash_forward, name)(*args)
    *grads, sinks = getattr(flash_backward, f"{name}_backward")(tensors.grad, *args[:3], out, lse, *args[3:])
    return out, lse, *grads, *([] if tensors.sinks is None else [sinks])


def assert_close(found: tuple[Tensor, ...], wanted: Any, plain: Any, dtype: torch.dtype) -> None:
    names = ("out", "lse", "dq", "dk", "dv", "sinks")
    for name, ours, want, theirs in zip(names, found, wanted, plain, strict=False):
        assert not ours.isnan().any(), name
        if ours.numel():
            error, other = ((x.double() - want).abs().max() for x in (ours, theirs))
            allowed = 2 * other + FLOOR[dtype] * max(1.0, float(want.abs().max()))
            assert error <= allowed, f"{name}: {error:.2e} against {other:.2e} of torch"


def check(setup: Setup, dtype: torch.dtype, seed: int = 0) -> None:
    tensors = build(setup, dtype, "cuda", seed)
    found = run(setup, tensors)
    assert_close(found, exact(setup, tensors), exact(setup, tensors, dtype), dtype)
    for first, second in zip(found, run(setup, tensors), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_drawn_cases(seed, dtype):
    check(drawn(seed, most=700), dtype, seed)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
def test_shapes(head_dim, value_dim, heads, key_heads, options):
    causal, window, softcap, sinks = options
    setup = Setup(
        *(333, 333, (), 1, heads, key_heads, head_dim, value_dim, causal, window, softcap, sinks),
        scale=head_dim**-0.5,
    )
    check(setup, BF16)
    if causal:
        check(replace(setup, documents=(130, 0, 1, 256, 77)), BF16)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_fp32(head_dim, value_dim):
    setup = Setup(300, 300, batch=1, head_dim=head_dim, value_dim=value_dim, scale=head_dim**-0.5)
    check(setup, FP32)
    check(replace(setup, documents=(130, 0, 1, 169), window=100, softcap=5.0, sinks=True), FP32)


@pytest.mark.parametrize(("queries", "keys", "causal"), [(1, 700, True), (100, 513, True), (513, 100, False)])
def test_other_queries_than_keys(queries, keys, causal):
    check(Setup(queries, keys, head_dim=128, value_dim=128, causal=causal, scale=0.1), BF16)


def test_operations_reach_the_kernels():
    """A softcap, and packed values of another width than the keys, with autograd through the operations."""
    setup = Setup(300, 300, head_dim=64, value_dim=64, softcap=10.0, sinks=True, scale=0.125)
    for case in (setup, replace(setup, documents=(100, 7, 193), value_dim=128)):
        tensors = build(case, BF16, "cuda")
        args = list(arguments(case, tensors, "cuda"))
        args[:3] = [x.detach().requires_grad_() for x in args[:3]]
        args[-1] = args[-1].detach().requires_grad_()
        out, lse = (packed_attention if case.documents else attention)(*args)
        grads = torch.autograd.grad(out, [*args[:3], args[-1]], tensors.grad)
        plain = exact(case, tensors, BF16)
        assert_close((out.detach(), lse, *grads), exact(case, tensors), plain, BF16)


def test_long_rows():
    """More elements than 32 bits count; the last rows see a window, and are what they are alone."""
    tokens, heads, head_dim, window = 530_000, 32, 128, 256
    assert tokens * heads * head_dim > 2**31
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(tokens, heads, head_dim, device="cuda", dtype=BF16, generator=g)
    k, v = (torch.randn(tokens, 1, head_dim, device="cuda", dtype=BF16, generator=g) for _ in range(2))

    def both(first: int) -> tuple[Tensor, ...]:
        count = tokens - first
        starts = torch.tensor([0, count], dtype=torch.int32, device="cuda")
        options = (starts, count, head_dim**-0.5, window, 0.0, None)
        rows = q[first:], k[first:], v[first:]
        out, lse = flash_forward.packed_attention(*rows, *options)
        dq, dk, dv, _ = flash_backward.packed_attention_backward(rows[0], *rows, out, lse, *options)
        return tuple(x[-256:].clone() for x in (out, dq, dk, dv))

    for found, wanted in zip(both(0), both(tokens - 1024), strict=True):
        assert (found.float() - wanted.float()).abs().max() <= 2e-2 * wanted.float().abs().max()


def test_a_graph_serves_other_documents_than_it_was_captured_with():
    setup = Setup(documents=(500, 12, 0), head_dim=64, value_dim=64, softcap=5.0, scale=0.125)
    tensors = build(setup, BF16, "cuda")
    args = list(arguments(setup, tensors, "cuda"))
    flash_forward.packed_attention(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = flash_forward.packed_attention(*args)
    for documents in ((500, 12, 0), (100, 200, 212)):
        case = replace(setup, documents=documents)
        args[3].copy_(arguments(case, tensors)[3])
        graph.replay()
        want, plain = exact(case, tensors)[0], exact(case, tensors, BF16)[0]
        assert_close((out,), (want,), (plain,), BF16)
