"""Norm, activation, rotary and embedding kernels on a GPU, through their Ops, against fp64 at real shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.activation import gated_activation
from rooflight.ops.embedding import embedding, embedding_backward
from rooflight.ops.norm import add_rms_norm, rms_norm
from rooflight.ops.rope import rotary
from rooflight.ops.rotary_qkv import rotary_qkv
from tests.ops.kernels.oracle import OPS, assert_close, bits_equal, exact

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
ROWS = pytest.mark.parametrize(
    ("rows", "width"), [(16384, 2048), (16384, 4096), (32768, 768), (1001, 8192), (77, 16384)]
)
EPS = 1e-5


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to a reference fails: the kernel is what is tested. Fresh memory holds NaN."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in OPS.values():
        if op.kernel is not None:
            monkeypatch.setattr(op, "reference", refuse)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kw: _poisoned(empty(self, *args, **kw)))


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed), dtype=dtype)


@DTYPES
@ROWS
def test_norm(rows, width, dtype):
    x, grad = (draw(rows, width, dtype=dtype, seed=i) for i in range(2))
    x.requires_grad_()
    weight = (1 + draw(width, dtype=dtype, seed=2) / 4).requires_grad_()
    out = rms_norm(x, weight, EPS, 1.0)
    assert_close(out.detach(), exact("rms_norm", x.detach(), weight.detach(), EPS, 1.0), dtype)
    found = torch.autograd.grad(out, (x, weight), grad, retain_graph=True)
    assert_close(found, exact("rms_norm_backward", grad, None, x, weight, EPS, 1.0), dtype)
    assert bits_equal(found, torch.autograd.grad(out, (x, weight), grad))


@DTYPES
@ROWS
def test_add_and_norm(rows, width, dtype):
    x, residual = (draw(rows, width, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight = (1 + draw(width, dtype=dtype, seed=2) / 4).requires_grad_()
    grads = draw(rows, width, dtype=dtype, seed=3), draw(rows, width, dtype=dtype, seed=4)
    out, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert_close(out.detach(), exact("rms_norm", total.detach(), weight.detach(), EPS, 0.0), dtype)
    found = torch.autograd.grad((out, total), (x, residual, weight), grads, retain_graph=True)
    grad_x, grad_weight = exact("rms_norm_backward", *grads, total, weight, EPS, 0.0)
    assert_close(found, (grad_x, grad_x, grad_weight), dtype)
    assert bits_equal(found, torch.autograd.grad((out, total), (x, residual, weight), grads))


def qkv_slices(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    qkv = draw(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q, k, _ = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    return q.unflatten(-1, (heads, head_dim)), k.unflatten(-1, (kv_heads, head_dim))


@DTYPES
def test_norm_of_heads(dtype):
    weight = (1 + draw(128, dtype=dtype, seed=2) / 4).requires_grad_()
    for x in qkv_slices(16384, 16, 8, 128, dtype):
        x.requires_grad_()
        out, grad = rms_norm(x, weight, EPS), draw(*x.shape, dtype=dtype, seed=3)
        assert_close(out.detach(), exact("rms_norm", x.detach(), weight.detach(), EPS, 0.0), dtype)
        found = torch.autograd.grad(out, (x, weight), grad)
        assert_close(found, exact("rms_norm_backward", grad, None, x, weight, EPS, 0.0), dtype)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "channels"),
    [(16384, 32, 8, 64, 32), (16384, 24, 8, 128, 64), (4097, 12, 12, 64, 16), (333, 3, 1, 80, 20)],
)
def test_rotary(tokens, heads, kv_heads, head_dim, channels, interleaved, dtype):
    q, k = (x.detach().requires_grad_() for x in qkv_slices(tokens, heads, kv_heads, head_dim, dtype))
    angle = draw(tokens, channels, dtype=torch.float32, seed=1)
    cos, sin = angle.cos(), angle.sin()
    out = rotary(q, k, cos, sin, interleaved)
    assert_close(
        [x.detach() for x in out], exact("rotary", q.detach(), k.detach(), cos, sin, interleaved, False), dtype
    )
    grads = tuple(draw(*x.shape, dtype=dtype, seed=2) for x in out)
    found = torch.autograd.grad(out, (q, k), grads)
    assert_close(found, exact("rotary", *grads, cos, sin, interleaved, True), dtype)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "channels"),
    [(16384, 32, 8, 64, 32), (16384, 24, 8, 128, 64), (4097, 12, 12, 64, 16), (333, 3, 1, 80, 20)],
)
def test_rotary_qkv(tokens, heads, kv_heads, head_dim, channels, interleaved, dtype):
    qkv = draw(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype).requires_grad_()
    angle = draw(tokens, channels, dtype=torch.float32, seed=1)
    args = (angle.cos(), angle.sin(), heads, kv_heads, interleaved)
    out = rotary_qkv(qkv, *args)
    assert_close([x.detach() for x in out], exact("rotary_qkv", qkv.detach(), *args), dtype)
    grads = tuple(draw(*x.shape, dtype=dtype, seed=2) for x in out)
    (found,) = torch.autograd.grad(out, qkv, grads)
    assert_close(found, exact("rotary_qkv_backward", *grads, *args[:2], interleaved), dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"])
@pytest.mark.parametrize(("rows", "width"), [(16384, 8192), (32768, 3072), (513, 2880), (100, 5621)])
def test_gated_activation(rows, width, kind, dtype):
    gate_up = (3 * draw(rows, 2 * width, dtype=dtype)).requires_grad_()
    out, grad = gated_activation(gate_up, kind), draw(rows, width, dtype=dtype, seed=1)
    assert_close(out.detach(), exact("gated_activation", gate_up.detach(), kind), dtype)
    found = torch.autograd.grad(out, gate_up, grad)
    assert_close(found, [exact("gated_activation_backward", grad, gate_up, kind)], dtype)


def test_more_than_2_to_the_31_elements():
    gate_up = torch.ones(2**18 + 1, 2 * 4096, device="cuda", dtype=torch.bfloat16)
    gate_up[-1] = draw(2 * 4096, dtype=torch.bfloat16)
    out = gated_activation(gate_up, "silu")
    assert_close(out[-1:], exact("gated_activation", gate_up[-1:], "silu"), torch.bfloat16)
    back = OPS["gated_activation_backward"](out, gate_up, "silu")
    assert_close(back[-1:], exact("gated_activation_backward", out[-1:], gate_up[-1:], "silu"), torch.bfloat16)


@DTYPES
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width"), [(32768, 50304, 768), (16384, 128256, 2048), (4099, 300, 80)]
)
def test_embedding_backward(tokens, vocabulary, width, share, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
    repeated = torch.rand(tokens, device="cuda", generator=generator) < share
    ids = torch.where(repeated, 17, ids)
    grad = draw(tokens, width, dtype=dtype)
    weight = torch.zeros(vocabulary, width, device="cuda", dtype=dtype, requires_grad=True)
    found = torch.autograd.grad(embedding(ids, weight, 2.0), weight, grad)[0]
    expected = torch.zeros(vocabulary, width, device="cuda", dtype=torch.float64)
    expected.index_add_(0, ids, 2.0 * grad.double())
    # Row by row: a sum of thousands must not set the scale for the others. Summing n values costs log n roundings.
    error = (found.double() - expected).abs().amax(1)
    size = expected.abs().amax(1) + 1e-3
    assert (error / size).max() < (1e-2 if dtype != torch.float32 else 1e-4)
    assert not found[expected.abs().amax(1) == 0].any()
    assert torch.equal(found, embedding_backward(grad, ids, vocabulary, 2.0))


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(32768, 50304, 768), (8192, 128256, 4096)])
def test_embedding_backward_in_a_graph(tokens, vocabulary, width):
    """Its launches overlap: replays, one on the heels of another, must leave nothing unwritten and no sum undone."""
    generator = torch.Generator("cuda").manual_seed(0)
    rare = torch.rand(tokens, device="cuda", generator=generator, dtype=torch.float64)
    ids = (vocabulary**rare).long() - 1  # a token's share falls with its number
    grad = draw(tokens, width, dtype=torch.bfloat16)
    expected = embedding_backward(grad, ids, vocabulary, 1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [embedding_backward(grad, ids, vocabulary, 1.0) for _ in range(3)]
    for _ in range(10):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)
