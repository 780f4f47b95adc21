"""The Hopper attention kernels on a GPU against fp64, by FlashAttention's protocol: at most twice torch's own error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.kernels.flash_hopper_plan import takes
from tests.ops.kernels.paged_oracle import Setup, build, exact, with_types

pytestmark = pytest.mark.gpu
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4}


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def qkv(
    batch: int, queries: int, keys: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal values; fused as a projection leaves them where there are as many queries as keys."""
    g = torch.Generator("cuda").manual_seed(queries * 31 + keys)
    widths = [heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim]
    if queries == keys:
        fused = torch.randn(batch, keys, sum(widths), device="cuda", generator=g).to(dtype)
        q, k, v = fused.split(widths, -1)
    else:
        lengths = (queries, keys, keys)
        q, k, v = (torch.randn(batch, n, w, device="cuda", generator=g) for n, w in zip(lengths, widths, strict=True))
    q, k, v = (x.to(dtype).unflatten(-1, (-1, head_dim)) for x in (q, k, v))
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the precision of the arguments."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhe,bshe->bhqs", q, k) * q.shape[-1] ** -0.5
    row, col = (torch.arange(n, device=q.device) for n in (q.shape[1], k.shape[1]))
    if causal:
        scores = scores.masked_fill(col > row[:, None], float("-inf"))
    if window:
        scores = scores.masked_fill(col <= row[:, None] - window, float("-inf"))
    return torch.einsum("bhqs,bshe->bqhe", scores.softmax(-1), v), scores.logsumexp(-1)


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int = 0) -> None:
    from rooflight.ops.kernels.flash_hopper import forward

    scale = q.shape[-1] ** -0.5
    assert takes(q, k, v, scale, causal, window)
    out, lse = forward(q, k, v, scale, causal, window)
    want, want_lse = plain(q.double(), k.double(), v.double(), causal, window)
    theirs = (plain(q, k, v, causal, window)[0] - want).abs().max()
    assert out.is_contiguous() and not out.isnan().any()
    error = (out - want).abs().max()
    assert error <= 2 * theirs + FLOOR[q.dtype] * want.abs().max(), f"{error:.2e} against {theirs:.2e} of torch"
    assert (lse - want_lse).abs().max() < 2e-3
    again = forward(q, k, v, scale, causal, window)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 640, 1000, 2048, 2499])
def test_causal(length, head_dim, dtype):
    check(*qkv(2, length, length, (6, 2), head_dim, dtype), True)


FULL = [(1, 1), (1, 500), (300, 1), (129, 127), (1024, 1024), (700, 1301), (201, 2499)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), FULL)
def test_full(queries, keys, head_dim, dtype):
    check(*qkv(3, queries, keys, (4, 4), head_dim, dtype), False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1000, 2499])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 100, 128, 129, 300, 999])
def test_windows(window, head_dim, length, dtype):
    """The longer ones in blocks of 192 queries for 64 channels, whose first ones see nothing of the first tiles."""
    check(*qkv(2, length, length, (4, 1), head_dim, dtype), True, window)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_tiles_than_programs(head_dim):
    check(*qkv(4, 1500, 1500, (32, 8), head_dim, torch.bfloat16), True)


def test_large_scores_and_no_rows_of_neighbours():
    """Scores of hundreds overflow nothing, and the NaN of another sequence reaches no output."""
    q, k, v = qkv(2, 300, 300, (4, 4), 128, torch.bfloat16)
    check(q * 30, k, v, True)
    from rooflight.ops.kernels.flash_hopper import forward

    for x in (q, k, v):
        x[1] = float("nan")
    assert not forward(q, k, v, 0.1, True)[0][0].isnan().any()


def test_replays_from_a_graph():
    from rooflight.ops.kernels.flash_hopper import forward

    q, k, v = qkv(2, 700, 700, (8, 8), 128, torch.bfloat16)
    want = forward(q, k, v, 0.1, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(q, k, v, 0.1, True)
    for _ in range(3):
        out[0].zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


def check_pages(setup: Setup, dtype: torch.dtype = torch.bfloat16, least: int = 2) -> None:
    """All rows, twice; then only those of sequences with `least` new tokens, and the rows beyond the last sequence."""
    from rooflight.ops.kernels.flash_hopper_paged import prefill
    from rooflight.ops.kernels.flash_hopper_paged import takes as takes_pages

    args = build(with_types(setup, dtype, dtype), "cuda")
    q, k, v, table, contexts, starts, most, _, scale, *options = args
    assert takes_pages(q, k, v, table, most, scale, *options)
    want, plain = exact(*args), exact(*args, dtype=dtype)
    found = []
    for fewest in (1, 1, least):
        found.append(torch.full_like(q, float("nan")))
        prefill(found[-1], q, k, v, table, contexts, starts, scale, fewest)
    allowed = 2 * (plain - want).abs().max() + FLOOR[dtype] * want.abs().max()
    error = (found[0] - want).abs().max()
    assert not found[0].isnan().any() and error <= allowed, f"{error:.2e} where {allowed:.2e} are allowed"
    assert torch.equal(found[0], found[1])
    # The rows beyond see no key.
    assert not found[0][sum(setup.queries) :].any()
    lengths = [*setup.queries, setup.pad]
    chosen = [n >= least for n in setup.queries] + [True]
    mine = torch.tensor(chosen).repeat_interleave(torch.tensor(lengths)).cuda()
    assert torch.equal(found[2][mine], found[0][mine]) and found[2][~mine].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages(head_dim, page, dtype):
    """Prompts, chunks behind a prefix, decodes between them, and padding."""
    queries, contexts = (300, 1, 129, 64, 1, 128, 2), (300, 700, 1000, 64, 5, 1023, 2)
    check_pages(Setup(queries, contexts, heads=6, key_heads=2, head_dim=head_dim, page=page, pad=9), dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("prefix", [0, 1, 15, 16, 17, 63, 64, 100, 127, 128, 129, 500])
def test_pages_behind_a_prefix(prefix, head_dim):
    queries = (65, 200)
    check_pages(Setup(queries, tuple(n + prefix for n in queries), heads=4, key_heads=1, head_dim=head_dim))


@pytest.mark.parametrize("sequences", [127, 128, 129, 500])
def test_pages_of_many_sequences(sequences):
    """Some without new tokens, some with an empty context, in more groups than are counted at once."""
    queries = tuple(130 if i == 3 else 37 * i * i % 11 for i in range(sequences))
    contexts = tuple(n + i % 40 if n else 0 for i, n in enumerate(queries))
    check_pages(Setup(queries, contexts, heads=4, key_heads=2, head_dim=64, pad=140, index=torch.int64))


def test_pages_of_more_tiles_than_programs():
    check_pages(Setup((400, 1, 260), (700, 300, 260), heads=48, key_heads=8, head_dim=128, pad=300))


def test_a_graph_serves_other_lengths_than_it_was_captured_with():
    from rooflight.ops.kernels.flash_hopper_paged import prefill

    setup = Setup((150, 100, 50), (400, 130, 60), heads=4, key_heads=2, head_dim=128)
    args = build(with_types(setup, torch.bfloat16, torch.bfloat16), "cuda")
    q, k, v, table, contexts, starts, _, _, scale, *_ = args
    out = torch.full_like(q, float("nan"))
    prefill(out, q, k, v, table, contexts, starts, scale, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill(out, q, k, v, table, contexts, starts, scale, 1)
    for cut in ((0, 150, 250, 300), (0, 10, 10, 70), (0, 0, 1, 30), (0, 150, 250, 300)):
        starts.copy_(torch.tensor(cut))
        out.fill_(float("nan"))
        graph.replay()
        want = exact(*args)
        assert (out - want).abs().max() <= 2e-2 * want.abs().max() and not out[cut[-1] :].any()
