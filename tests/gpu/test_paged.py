"""Paged attention and the cache's scatter on a GPU, through their Ops, against fp64; and replayed from CUDA graphs.

FlashAttention's protocol: the error is at most twice that of torch's plain attention in the same precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.attention import attention_schedule, paged_attention, write_kv
from tests.ops.kernels.paged_oracle import FP8, Setup, build, drawn, exact, with_types

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]
HALF = (torch.bfloat16, torch.float16)
# Rounding of the output alone, where torch's own error happens to be 0.
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 5e-6}


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to a reference fails. Fresh memory holds NaN."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in (attention_schedule, paged_attention, write_kv):
        monkeypatch.setattr(op, "reference", refuse)
    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *args, **kw: (lambda x: x.fill_(float("nan")) if x.is_floating_point() else x)(
            empty(self, *args, **kw)
        ),
    )


def check(args: tuple[Any, ...], found: Tensor | None = None) -> Tensor:
    out = paged_attention(*args) if found is None else found
    want, plain = exact(*args), exact(*args, dtype=args[0].dtype)
    if not out.numel():
        return out
    error, theirs = ((x.double() - want).abs().max() for x in (out, plain))
    allowed = 2 * theirs + FLOOR[out.dtype] * want.abs().max()
    assert not out.isnan().any() and error <= allowed, f"{error:.2e} against {theirs:.2e} of torch"
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_drawn_cases(seed, dtype):
    args = build(with_types(drawn(seed), dtype, dtype), "cuda", seed)
    out = check(args)
    assert torch.equal(out, paged_attention(*args))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2), (14, 2), (16, 1)])
@pytest.mark.parametrize("queries", [(1, 1, 1, 1), (1, 1, 333, 70)], ids=["decode", "mixed"])
def test_shapes(queries, heads, key_heads, head_dim):
    setup = Setup(queries, (1000, 17, 700, 70), heads=heads, key_heads=key_heads, head_dim=head_dim, pad=9)
    for dtype in HALF:
        check(build(with_types(setup, dtype, dtype), "cuda"))
    check(build(with_types(replace(setup, window=200, softcap=20.0, sinks=True), *HALF[:1], *HALF[:1]), "cuda"))


@pytest.mark.parametrize("cache_dtype", [FP8, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_caches_of_another_type(head_dim, cache_dtype):
    for queries in ((1, 1), (1, 200)):
        setup = Setup(queries, (900, 410), heads=8, key_heads=2, head_dim=head_dim)
        check(build(with_types(setup, torch.bfloat16, cache_dtype), "cuda"))


@pytest.mark.parametrize("page", [8, 16, 32, 64, 128])
def test_pages(page):
    for queries in ((1, 1, 1), (1, 1, 150)):
        setup = Setup(queries, (2049, 128, 300), heads=8, key_heads=2, head_dim=128, page=page)
        check(build(with_types(setup, torch.bfloat16, torch.bfloat16), "cuda"))


@pytest.mark.parametrize("contexts", [(65536,), (20000, 1, 7), (1500,) * 40])
def test_long_contexts_and_their_splits(contexts):
    setup = Setup((1,) * len(contexts), contexts, heads=8, key_heads=2, head_dim=128)
    args = build(with_types(setup, torch.bfloat16, torch.bfloat16), "cuda")
    first = check(args)
    for _ in range(20):
        assert torch.equal(first, paged_attention(*args))


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("sequences", [16, 64, 300])
def test_ragged_batches(sequences, heads):
    """Contexts of every length, some of them none; more sequences than a program looks at together."""
    contexts = tuple(0 if i % 11 == 5 else 37 * i * i % 1999 + 1 for i in range(sequences))
    setup = Setup((1,) * sequences, contexts, heads=heads, key_heads=1, head_dim=128, pad=3)
    args = build(with_types(setup, torch.bfloat16, torch.bfloat16), "cuda")
    first = check(args)
    for _ in range(5):
        assert torch.equal(first, paged_attention(*args))


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("queries", [(1, 1, 1, 1), (1, 1, 90, 0, 1)], ids=["decode", "mixed"])
def test_a_schedule_serves_all_layers(queries, window):
    contexts = (5000, 3, 700, 64, 9)[: len(queries)]
    setup = Setup(queries, contexts, heads=8, key_heads=2, head_dim=128, window=window, pad=2)
    args = build(with_types(setup, torch.bfloat16, torch.bfloat16), "cuda")
    longest = args[3].shape[1] * args[1].shape[1]
    schedule = attention_schedule(args[4], args[5], longest, args[1].shape[2], window)
    first = check(args)
    for _ in range(3):
        assert torch.equal(first, paged_attention(*args, schedule))


def test_a_graph_serves_other_contexts_than_it_was_captured_with():
    """One launch for batches of up to 6, with rows that stand for no request."""
    setup = Setup((1,) * 6, (700, 300, 64, 17, 5, 1), heads=8, key_heads=2, head_dim=128)
    args = list(build(with_types(setup, torch.bfloat16, torch.bfloat16), "cuda"))
    check(tuple(args))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*args)
    full = args[4].clone()
    for contexts in (full, full // 2, torch.tensor([0, 1, 0, 17, 0, 0]), torch.tensor([0] * 6), full):
        args[4].copy_(contexts.to(full.dtype))
        graph.replay()
        check(tuple(args), out)
        assert not out[args[4] == 0].any()


def test_a_cache_of_more_elements_than_32_bits_count():
    blocks, key_heads, head_dim = 140_000, 8, 128
    assert blocks * 16 * key_heads * head_dim > 2**31
    k, v = (torch.zeros(blocks, 16, key_heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    small = build(
        with_types(Setup((1, 40), (100, 60), heads=16, key_heads=8, head_dim=128), *HALF[:1], *HALF[:1]), "cuda"
    )
    count = small[1].shape[0]
    k[-count:], v[-count:] = small[1], small[2]
    table = torch.where(small[3] < count, small[3] + blocks - count, small[3])
    out = paged_attention(small[0], k, v, table, *small[4:])
    assert torch.equal(out, paged_attention(*small))
    slots = torch.tensor([blocks * 16 - 1, -1], device="cuda")
    new = torch.ones(2, key_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    write_kv(new, new, k, v, slots)
    assert (k[-1, -1] == 1).all() and (v[-1, -1] == 1).all()


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 257, 8192])
def test_write(tokens, cache_dtype):
    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(tokens, 32 * 128, device="cuda", generator=g).to(torch.bfloat16)
    k, v = (x.unflatten(1, (8, 128)) for x in qkv[:, 2048:].split(1024, 1))
    caches = [torch.zeros(tokens // 16 + 2, 16, 8, 128, device="cuda", dtype=cache_dtype) for _ in range(2)]
    slots = torch.randperm(caches[0].shape[0] * 16, device="cuda", generator=g)[:tokens]
    slots = torch.where(slots % 7 == 1, -1, slots)
    write_kv(k, v, *caches, slots)
    kept = slots >= 0
    for new, cache in ((k, caches[0]), (v, caches[1])):
        want = torch.zeros_like(cache, dtype=torch.float32).flatten(0, 1)
        want[slots[kept]] = new[kept].to(cache_dtype).float()
        assert torch.equal(cache.flatten(0, 1).float(), want)
