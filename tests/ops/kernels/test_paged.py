"""Paged attention and the cache's scatter under the interpreter, against fp64 row by row.

The interpreter multiplies no bf16 matrices: that type is tested on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.attention.paged_cuda import takes_attention, takes_write
from rooflight.ops.kernels.paged_parts import Cut
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


def scheduled(interpret, args: tuple[Any, ...], cut: Cut) -> Tensor:
    table, contexts, starts = args[3:6]
    longest, key_heads = table.shape[1] * args[1].shape[1], args[1].shape[2]
    return interpret("paged_parts.attention_schedule", contexts, starts, longest, key_heads, args[9], cut)


@pytest.mark.parametrize("cut", [Cut(1, 1600, 16), Cut(2, 16, 16), Cut(7, 1, 8), Cut(20, 48, 16), Cut(500, 16, 16)])
@pytest.mark.parametrize("window", [0, 60])
def test_parts_of_a_context(interpret, cut, window):
    """However contexts are cut, twice the same: the programs' counters are zeros again."""
    setup = Setup(
        (1, 1, 1, 1, 3, 0, 1), (300, 1, 17, 64, 90, 0, 150), heads=6, head_dim=24, page=8, window=window, sinks=True
    )
    args = build(setup)
    q, keys, options = args[0], args[1:6], args[8:]
    tiles, schedule = Tiles(16, 16, 4, 5), scheduled(interpret, args, cut)
    found = []
    for _ in range(2):
        _, left = interpret.call("paged_decode.decode", torch.empty_like(q), q, *keys, *options, True, schedule, tiles)
        found.append(left[0][[0, 1, 2, 3, 7]])
    assert_close(found[0], exact(*args)[[0, 1, 2, 3, 7]].float(), torch.float32)
    assert bits_equal(*found)


@pytest.mark.parametrize(("sequences", "cut"), [(31, Cut(90, 16, 16)), (33, Cut(33, 1, 16)), (257, Cut(40, 1, 16))])
def test_more_sequences_than_are_looked_at_together(interpret, sequences, cut):
    contexts = tuple(37 * i % 83 for i in range(sequences))
    queries = tuple(int(i % 7 != 3) for i in range(sequences))
    args = build(Setup(queries, contexts, heads=1, key_heads=1, pad=5))
    q, keys, options = args[0], args[1:6], args[8:]
    call = (torch.empty_like(q), q, *keys, *options, True, scheduled(interpret, args, cut), Tiles(16, 16, 4, 5))
    assert_close(interpret.call("paged_decode.decode", *call)[1][0], exact(*args).float(), torch.float32)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("cut", [Cut(1, 32, 32), Cut(9, 32, 32), Cut(33, 16, 16), Cut(300, 64, 32)], ids=str)
@pytest.mark.parametrize(
    "contexts", [(0,), (1,), (700,), (300, 0, 17, 64, 33, 1), tuple(37 * i % 301 for i in range(70))]
)
def test_a_schedule_is_a_partition(interpret, contexts, cut, window):
    """Each key in sight stands in one part; a sequence's parts follow one another and are about equally long."""
    queries = tuple(int(i % 7 != 3) + int(i % 7 == 4) for i in range(len(contexts)))
    args = build(Setup(queries, contexts, heads=1, key_heads=1, window=window))
    lines, starts = scheduled(interpret, args, cut), args[5].tolist()
    parts: dict[int, list[list[int]]] = {b: [] for b, query in enumerate(queries) if query == 1}
    for unit, (sequence, row, begin, end, part, count, rows, _) in enumerate(lines.tolist()):
        assert rows == starts[-1]
        if sequence >= 0:
            assert row == starts[sequence]
            parts[sequence].append([begin, end, part, count, unit])
    total = sum(min(contexts[b], window or contexts[b]) for b in parts)
    for b, found in parts.items():
        oldest = max(0, contexts[b] - window) if window else 0
        assert [part for _, _, part, _, _ in found] == list(range(len(found))) == [u - found[0][4] for *_, u in found]
        assert {count for *_, count, _ in found} == {len(found)}
        assert [begin for begin, *_ in found] == [oldest, *(end for _, end, *_ in found[:-1])]
        assert found[-1][1] == contexts[b]
        longest = max(cut.least, -(-total // cut.parts)) + (len(parts) + 2) * cut.step
        assert all((end - begin) <= longest for begin, end, *_ in found)


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
