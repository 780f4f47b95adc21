"""Packed documents on a GPU: the variable-length kernel, and the way without one, against fp64 over a mask."""

from __future__ import annotations

import pytest
import torch

from rooflight.models.layout import Layout
from rooflight.ops.attention import packed_attention
from tests.ops.test_packed_attention import starts_of

pytestmark = pytest.mark.gpu
LENGTHS = ((128, 64, 333, 1, 500), (1024,), (1, 1, 1), (0, 200, 0, 57, 0))


def exact(q, k, v, lengths, scale, window, cap, sinks):
    groups = q.shape[1] // k.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    age = torch.arange(len(q), device=q.device).unsqueeze(1) - torch.arange(len(q), device=q.device)
    hidden = (document.unsqueeze(1) != document) | (age < 0)
    if window:
        hidden = hidden | (age >= window)
    scores = torch.einsum("qhe,she->hqs", q, k.repeat_interleave(groups, 1)) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, len(q), 1)), -1)
    probs, lse = scores.softmax(-1)[..., : len(q)], scores.logsumexp(-1)
    return torch.einsum("hqs,shu->qhu", probs, v.repeat_interleave(groups, 1)), lse


# The mode that refuses to wait warns once that it is young.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim", "value_dim"), [(2, 64, 64), (8, 128, 128), (8, 96, 64)])
@pytest.mark.parametrize(
    ("window", "cap", "sinks"), [(0, 0.0, False), (100, 0.0, False), (0, 0.0, True), (100, 5.0, True)]
)
def test_values_and_gradients(lengths, kv_heads, head_dim, value_dim, window, cap, sinks):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    tokens, heads = sum(lengths), 8
    # As in a model: values are a slice of the projection's output.
    v = draw(tokens, kv_heads * value_dim + 64)[:, 64:].unflatten(-1, (kv_heads, value_dim))
    leaves = [draw(tokens, heads, head_dim), draw(tokens, kv_heads, head_dim), v, *([draw(heads)] if sinks else [])]
    leaves = [x.requires_grad_() for x in leaves]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    sink, wide_sink = (leaves[3], wide[3]) if sinks else (None, None)
    scale = head_dim**-0.5
    starts = starts_of(lengths).cuda()
    # Reading a length on the host would wait for the GPU, and raises here.
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = packed_attention(*leaves[:3], starts, max(lengths), scale, window, cap, sink)
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, want_lse = exact(wide[0], wide[1], wide[2], lengths, scale, window, cap, wide_sink)
    wanted = torch.autograd.grad(want, wide, grad.double())
    assert lse.shape == (heads, tokens)
    for got, expected in ((out, want), (lse, want_lse), *zip(found, wanted, strict=True)):
        # Between tokens that see themselves alone q and k have no gradient at all: then only noise is left.
        error = (got.double() - expected).norm() / max(expected.norm().item(), 0.1)
        assert error < 2e-2, error


def test_one_row_is_captured_in_a_cuda_graph():
    """Lengths that change between replays are read by the kernels and not by the host."""
    torch.manual_seed(0)
    tokens, heads, head_dim = 512, 4, 64
    q, k, v = (torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    starts = starts_of((500, 12, 0)).cuda()

    def run():
        return packed_attention(q, k, v, starts, tokens, 0.125)[0]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lengths in ((500, 12, 0), (100, 200, 212)):
        starts.copy_(starts_of(lengths))
        graph.replay()
        want, _ = exact(q.double(), k.double(), v.double(), lengths, 0.125, 0, 0.0, None)
        assert (out.double() - want).norm() / want.norm() < 2e-2


def test_a_layout_on_the_gpu():
    layout, _ = Layout.of_documents([5, 3], "cuda")
    assert layout.documents is not None and layout.documents.starts_N1.is_cuda
    assert layout.documents.starts_N1.tolist() == [0, 5, 8]
