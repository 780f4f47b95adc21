"""Fused attention on a GPU against the reference in fp64, values and gradients."""

from __future__ import annotations

import pytest
import torch

from rooflight.ops.attention import attention

pytestmark = pytest.mark.gpu


def exact(q, k, v, scale, causal, window):
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = torch.einsum("bqhe,bshe->bhqs", q, k) * scale
    rows, columns = torch.arange(q.shape[1], device=q.device)[:, None], torch.arange(k.shape[1], device=q.device)
    hidden = columns > rows
    if window:
        hidden = hidden | (rows - columns >= window)
    if causal:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhqs,bshe->bqhe", scores.softmax(-1), v)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 100)])
@pytest.mark.parametrize("queries", [128, 333])
def test_values_and_gradients(head_dim, kv_heads, causal, window, queries):
    torch.manual_seed(0)

    def draw(heads):
        return torch.randn(2, queries, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(8), draw(kv_heads), draw(kv_heads)
    out = attention(q, k, v, head_dim**-0.5, causal, window)[0]
    want = exact(q, k, v, head_dim**-0.5, causal, window)
    grad = torch.randn_like(out)
    got_grads = torch.autograd.grad(out, (q, k, v), grad)
    want_grads = torch.autograd.grad(want, (q, k, v), grad.double())
    for got, expected in ((out, want), *zip(got_grads, want_grads, strict=True)):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 1e-2, error
