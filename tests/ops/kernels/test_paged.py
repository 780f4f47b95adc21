"""Paged attention and the cache's scatter under the interpreter, against fp64 row by row.

The interpreter multiplies no bf16 matrices: that type is tested on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.attention.paged_cuda import takes_attention, takes_write
from rooflight.ops.kernels.paged_tile import Tiles

from .oracle import assert_close, bits_equal
from .paged_oracle import FP8, Setup, build, drawn, exact, numbers, with_types

ONES = (1, 1, 1, 1)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_cases(interpret, seed):
    args = build(drawn(seed), seed=seed)
    assert takes_attention(*args)
    assert_close(interpret("paged_attention.paged_attention", *args), exact(*args).to(torch.float32), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float16, torch.float16), (torch.float32, FP8), (torch.float16, FP8), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("queries", [ONES, (1, 1, 40, 5)], ids=["decode", "mixed"])
def test_types(interpret, queries, dtype, cache_dtype):
    args = build(with_types(Setup(queries, (33, 9, 90, 20), sinks=True), dtype, cache_dtype))
    assert takes_attention(*args)
    assert_close(interpret("paged_attention.paged_attention", *args), exact(*args).to(dtype), dtype)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("window", [0, 60])
def test_splits_of_a_context(interpret, splits, window):
    """However a context is split, twice the same: the programs' counters are zeros again."""
    setup = Setup(ONES, (300, 1, 17, 64), heads=6, head_dim=24, page=8, window=window, sinks=True)
    args = build(setup)
    q, keys, options = args[0], args[1:6], args[8:]
    tiles = Tiles(16, 16, 4, 5)
    found = []
    for _ in range(2):
        _, left = interpret.call("paged_decode.decode", torch.empty_like(q), q, *keys, *options, True, tiles, splits)
        found.append(left[0])
    assert_close(found[0], exact(*args).float(), torch.float32)
    assert bits_equal(*found)


def test_empty_rows_are_zeros(interpret):
    """Rows of a graph's batch that no request fills: a token without context, no token, rows of no sequence."""
    for queries, contexts in (((1, 1, 1), (0, 40, 0)), ((1, 0, 1, 0), (20, 0, 0, 9)), ((1, 0, 30, 1), (0, 0, 50, 0))):
        args = build(Setup(queries, contexts, pad=5, sinks=True))
        out = interpret("paged_attention.paged_attention", *args)
        want = exact(*args)
        assert_close(out, want.float(), torch.float32)
        empty = (want == 0).all(-1).all(-1)
        assert empty.sum() > 5 and empty[-5:].all() and not out[empty].any()


def test_slices_of_wider_tensors(interpret):
    """Queries of fused QKV, a table wider than the step needs, keys and values side by side in one cache."""
    q, k, v, table, *rest = build(Setup((1, 30, 1), (20, 50, 70)))
    wide = torch.randn(32, 8 * 16)
    wide[:, : 4 * 16] = q.flatten(1)
    both = torch.stack((k, v), 1)
    table = torch.cat((table, table), 1)[:, : table.shape[1]]
    args = (wide[:, : 4 * 16].unflatten(1, (4, 16)), both[:, 0], both[:, 1], table, *rest)
    assert takes_attention(*args) and not args[0].is_contiguous() and not args[1].is_contiguous()
    assert_close(interpret("paged_attention.paged_attention", *args), exact(*args).float(), torch.float32)


def test_what_attention_leaves_to_the_reference():
    def of(change: dict[int, object], setup: Setup | None = None) -> bool:
        args = list(build(setup or Setup((1, 3), (4, 5))))
        for at, value in change.items():
            args[at] = value
        return takes_attention(*args)

    assert of({})
    assert not of({2: None}) and not of({7: 8}) and not of({8: -1.0})
    assert not of({}, Setup((1,), (4,), dtype=torch.float64, cache_dtype=torch.float64))
    assert not of({}, Setup((1,), (4,), head_dim=264))
    assert not of({}, Setup((1,), (4,), heads=34, key_heads=2))
    assert of({}, with_types(Setup((1,), (4,), heads=34, key_heads=2), torch.bfloat16, torch.bfloat16))
    assert not of({4: torch.tensor([1.0, 2.0])})


def written(k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor) -> list[Tensor]:
    """Row by row."""
    out = []
    for new, cache in ((k, k_cache), (v, v_cache)):
        if new is None or cache is None:
            continue
        cache = cache.clone()
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache[slot // cache.shape[1], slot % cache.shape[1]] = new[row].to(cache.dtype)
        out.append(cache)
    return out


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("heads", "width", "value_width"), [(2, 16, 16), (1, 5, 3), (9, 128, 128), (1, 576, 0)])
def test_write(interpret, heads, width, value_width, index, dtype):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(37, heads * (2 * width + value_width), generator=g).to(dtype)
    _, k, v = qkv.split([heads * width, heads * width, heads * value_width], 1)
    k = k.unflatten(1, (heads, width))
    v = v.unflatten(1, (heads, value_width)) if value_width else None
    caches = [torch.full((9, 8, heads, w), float("nan"), dtype=dtype) for w in (width, value_width) if w]
    k_cache, v_cache = caches[0], caches[1] if value_width else None
    slots = torch.randperm(72, generator=g)[:37]
    slots[[3, 30]] = -1
    slots = slots.to(index)
    assert takes_write(k, v, k_cache, v_cache, slots)
    _, left = interpret.call("kv_cache.write_kv", k, v, k_cache, v_cache, slots)
    found = [x for x in left[2:4] if x is not None]
    assert _same(found, written(k, v, k_cache, v_cache, slots))


def test_write_casts_and_takes_any_layout(interpret):
    """A cache of fp8, heads that do not lie side by side, and no token at all."""
    g = torch.Generator().manual_seed(1)
    k, v = (numbers((2, 5, 16), FP8, g).float().transpose(0, 1) for _ in range(2))
    slots = torch.tensor([11, 0, -7, 15, 4])
    for dtype in (FP8, torch.float16):
        caches = [torch.zeros(2, 8, 2, 16).to(dtype) for _ in range(2)]
        _, left = interpret.call("kv_cache.write_kv", k, v, *caches, slots)
        assert _same(list(left[2:4]), written(k, v, caches[0], caches[1], slots))
        _, left = interpret.call("kv_cache.write_kv", k[:0], v[:0], *caches, slots[:0])
        assert _same(list(left[2:4]), caches)


def test_what_the_scatter_leaves_to_the_reference():
    k, cache, slots = torch.ones(3, 2, 16), torch.ones(4, 8, 2, 16), torch.arange(3)
    assert takes_write(k, k, cache, cache, slots) and takes_write(k, None, cache, None, slots)
    assert takes_write(k.bfloat16(), k.bfloat16(), cache.to(FP8), cache.to(FP8), slots)
    assert not takes_write(k.double(), k.double(), cache, cache, slots)
    assert not takes_write(k, k, cache.double(), cache.double(), slots)
    assert not takes_write(k, k, cache[:, ::2], cache[:, ::2], slots)
