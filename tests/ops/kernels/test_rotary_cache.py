"""The fused step between qkv and attention: under the interpreter against fp64, and compiled for an H100 or H200.

The compiler's table: `python -m pytest tests/ops/kernels/test_rotary_cache.py -s -k hopper`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import qk_norm_rope
from rooflight.ops.kernels.qk_norm_rope import LARGE, SMALL, Tile, tile_of

from . import test_ahead_of_time as ahead
from .oracle import TOLERANCE, assert_close, exact
from .paged_oracle import FP8, numbers

COMPILES = (qk_norm_rope._rotate_and_cache_kernel,)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-3


def draw(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(
    tokens: int, heads: int, key_heads: int, head_dim: int, channels: int, dtype: torch.dtype, cache: torch.dtype
) -> tuple[Any, ...]:
    """All up to the number of heads. qkv is a slice; two slots are negative; nothing of a cache is a number."""
    wide = draw(tokens, (heads + 2 * key_heads) * head_dim + 32, dtype=dtype)
    angles = draw(tokens, channels, seed=1)
    caches = (torch.full((tokens, 4, key_heads, head_dim), float("nan")).to(cache) for _ in range(2))
    slots = torch.randperm(4 * tokens, generator=torch.Generator().manual_seed(2))[:tokens]
    if tokens > 1:
        slots[tokens // 2], slots[-1] = -1, -7
    return wide[:, 16:-16], angles.cos(), angles.sin(), *caches, slots, heads


def expected(args: tuple[Any, ...], interleaved: bool, weights: tuple[Any, Any], offset: float) -> list[Tensor]:
    """q, keys and values in fp64."""
    qkv, cos, sin, k_cache, _, _, heads = args
    q, k, v = qkv.unflatten(1, (-1, k_cache.shape[3])).split([heads, k_cache.shape[2], k_cache.shape[2]], dim=1)
    if weights[0] is not None:
        q, k = (exact("rms_norm", x, weight, EPS, offset) for x, weight in zip((q, k), weights))
    return [*exact("rotary", q, k, cos, sin, interleaved, False), v.double()]


def check(interpret: Any, args: tuple[Any, ...], *options: Any, tile: Tile | None = None) -> None:
    interleaved, q_weight, k_weight, offset = options
    call = ("qk_norm_rope.rotate_and_cache", *args, interleaved, q_weight, k_weight, EPS, offset, tile)
    out, left = interpret.call(*call)
    q, k, v = expected(args, interleaved, (q_weight, k_weight), offset)
    dtype, cache_dtype, slots = args[0].dtype, args[3].dtype, args[5]
    assert_close(out, q.to(dtype), dtype)
    kept = slots >= 0
    for cache, rows in zip(left[3:5], (k, v)):
        found = cache.flatten(0, 1).float()
        coarser = max(dtype, cache_dtype, key=TOLERANCE.__getitem__)
        assert_close(found[slots[kept]], rows[kept].float(), coarser)
        # Nothing else was written, by the negative slots neither.
        others = torch.ones(len(found), dtype=torch.bool).index_fill(0, slots[kept].long(), False)
        assert found[others].isnan().all()


SIZES = [
    (1, 16, 8, 128, 64),
    (7, 3, 1, 64, 32),
    (3, 4, 2, 256, 128),
    (5, 5, 5, 80, 16),
    (4, 2, 2, 96, 48),
    (2, 6, 3, 80, 40),
    (6, 7, 1, 64, 3),
    (1, 1, 1, 2, 1),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "key_heads", "head_dim", "channels"), SIZES)
def test_sizes(interpret, tokens, heads, key_heads, head_dim, channels, interleaved, norm):
    args = arguments(tokens, heads, key_heads, head_dim, channels, FP32, FP32)
    weights = [draw(head_dim, seed=seed) if norm else None for seed in (3, 4)]
    check(interpret, args, interleaved, *weights, 0.0)


@pytest.mark.parametrize("cache", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_types(interpret, dtype, cache):
    args = arguments(5, 4, 2, 64, 24, dtype, cache)
    check(interpret, args, False, draw(64, dtype=dtype, seed=3), draw(64, dtype=FP32, seed=4), 1.0)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_a_cache_of_fp8(interpret, dtype):
    """Numbers that fp8 holds, turned by nothing: the interpreter rounds no others to it as a GPU does."""
    qkv, _, _, *caches, slots, heads = arguments(5, 4, 2, 64, 32, dtype, FP8)
    qkv = numbers(tuple(qkv.shape), FP8, torch.Generator().manual_seed(0)).to(dtype)
    _, left = interpret.call(
        "qk_norm_rope.rotate_and_cache", qkv, torch.ones(5, 32), torch.zeros(5, 32), *caches, slots, heads
    )
    k, v = qkv.unflatten(1, (-1, 64))[:, heads:].split(2, dim=1)
    for cache, rows in zip(left[3:5], (k, v)):
        assert torch.equal(cache.flatten(0, 1)[slots[slots >= 0]].to(dtype), rows[slots >= 0])


@pytest.mark.parametrize("tile", [SMALL, LARGE, Tile(64, 1)], ids=str)
def test_tiles(interpret, tile):
    """Tiles that hold less than a token's heads, and more than all of them."""
    for tokens in (1, 9, 40):
        args = arguments(tokens, 6, 2, 64, 32, FP32, FP32)
        check(interpret, args, False, draw(64, seed=3), draw(64, seed=4), 0.0, tile=tile)


def test_other_layouts(interpret):
    """Columns that do not lie side by side, slots of 32 bits, one row for all tokens, no token."""
    qkv, cos, sin, *caches, slots, heads = arguments(5, 4, 2, 64, 32, FP32, FP32)
    for changed in (qkv.t().contiguous().t(), qkv[:1].expand(5, -1)):
        args = (changed, cos.t().contiguous().t(), sin, *caches, slots.int(), heads)
        check(interpret, args, False, draw(64, seed=3), draw(64, seed=4), 0.0)
    empty = (qkv[:0], cos[:0], sin[:0], *caches, slots[:0], heads)
    out, left = interpret.call("qk_norm_rope.rotate_and_cache", *empty)
    assert out.shape == (0, 4, 64) and left[3].isnan().all() and left[4].isnan().all()


def test_many_rows_take_the_larger_tile():
    assert tile_of(32 * 4096, 132) == SMALL and tile_of(8192 * 4096, 132) == LARGE


MODELS: dict[str, tuple[Any, ...]] = {  # heads, key heads, head dim, frequencies, interleaved, norm, types
    "qwen3-0.6b": (16, 8, 128, 64, False, True, BF16, BF16),
    "llama-3.1-8b": (32, 8, 128, 64, False, False, BF16, BF16),
    "llama-3.2-1b": (32, 8, 64, 32, False, False, BF16, BF16),
    "gemma-3": (8, 4, 256, 128, False, True, BF16, BF16),
    "phi-2": (32, 32, 80, 16, False, False, BF16, BF16),
    "phi-3": (32, 32, 96, 48, False, False, BF16, BF16),
    "interleaved": (16, 8, 128, 64, True, True, BF16, BF16),
    "qwen3, fp8 cache": (16, 8, 128, 64, False, True, BF16, FP8),
    "qwen3, fp16": (16, 8, 128, 64, False, True, FP16, FP16),
    "qwen3, fp32": (16, 8, 128, 64, False, True, FP32, FP32),
}


@pytest.mark.parametrize("tokens", [1, 32, 8192])
@pytest.mark.parametrize("model", MODELS)
def test_compiles_for_hopper(model, tokens, monkeypatch, tmp_path):
    heads, key_heads, head_dim, channels, interleaved, norm, dtype, cache_dtype = MODELS[model]
    found: list[ahead.Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(ahead.compile_launch(self, args, options, tmp_path))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setitem(ahead.POINTERS, FP8, "*fp8e4nv")
    monkeypatch.setattr(qk_norm_rope, "processors", lambda device: 132)
    monkeypatch.setattr(qk_norm_rope, "early_attention", lambda rows, channels: rows <= 64)
    table = ahead.meta(tokens, channels, dtype=FP32)
    cache = ahead.meta(100, 16, key_heads, head_dim, dtype=cache_dtype)
    weight = ahead.meta(head_dim, dtype=dtype) if norm else None
    qkv = ahead.meta(tokens, (heads + 2 * key_heads) * head_dim, dtype=dtype)
    slots = ahead.meta(tokens, dtype=torch.int64)
    qk_norm_rope.rotate_and_cache(qkv, table, table, cache, cache, slots, heads, interleaved, weight, weight, EPS)
    (kernel,) = found
    print(f"\n{model} {tokens}: {kernel}", end="")
    assert kernel.stack == 0, f"{kernel} spills"
    assert kernel.wide_loads > 0 and kernel.wide_stores > 0, f"{kernel} moves less than 16 bytes a thread"
    assert kernel.resident_threads >= 1024
    # A warp's rows are its own: no sum goes by way of shared memory.
    assert kernel.shared == 0 or head_dim & (head_dim - 1)
