"""The fused step between qkv and attention on a GPU: against fp64, against the operations apart, and in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.models.config import ModelConfig, Rope, same_layers
from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.models.transformer import Transformer
from rooflight.ops.attention import write_kv
from rooflight.ops.norm import rms_norm
from rooflight.ops.rope import rotary
from rooflight.ops.rotary_cache import rotate_and_cache
from tests.ops.kernels.oracle import TOLERANCE, exact

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
EPS = 1e-6
# Of the numbers; a norm's sum in another order turns a rounding here and there.
SAME = 0.99
MODELS = {  # query heads, key heads, head dim, frequencies
    "qwen3-0.6b": (16, 8, 128, 64),
    "llama-3.2-1b": (32, 8, 64, 32),
    "gemma-3": (8, 4, 256, 128),
    "phi-2": (32, 32, 80, 16),
    "one key head": (7, 1, 128, 64),
}


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to the reference fails. Fresh memory holds NaN."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    monkeypatch.setattr(rotate_and_cache, "reference", refuse)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kw: _poisoned(empty(self, *args, **kw)))


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


def draw(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed), dtype=dtype)


def arguments(tokens: int, model: str, dtype: torch.dtype, cache: torch.dtype) -> list[Any]:
    """All up to the number of heads; every seventh slot is negative, and the caches hold ones."""
    heads, key_heads, head_dim, channels = MODELS[model]
    angles = draw(tokens, channels, seed=1)
    caches = [torch.ones(tokens // 16 + 2, 16, key_heads, head_dim, device="cuda").to(cache) for _ in "kv"]
    slots = torch.randperm(len(caches[0]) * 16, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    slots = torch.where(slots % 7 == 1, -1 - slots, slots)[:tokens]
    qkv = draw(tokens, (heads + 2 * key_heads) * head_dim + 64, dtype=dtype)[:, 32:-32]
    return [qkv, angles.cos(), angles.sin(), *caches, slots, heads]


def weights_of(args: list[Any], norm: bool) -> list[Any]:
    head_dim, dtype = args[3].shape[3], args[0].dtype
    return [1 + draw(head_dim, dtype=dtype, seed=seed) / 4 if norm else None for seed in (3, 4)]


def parts_of(args: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    key_heads, head_dim = args[3].shape[2:]
    q, k, v = args[0].unflatten(1, (-1, head_dim)).split([args[6], key_heads, key_heads], dim=1)
    return q, k, v


def apart(args: list[Any], interleaved: bool, weights: list[Any], offset: float) -> Tensor:
    q, k, v = parts_of(args)
    if weights[0] is not None:
        q, k = (rms_norm(x, weight, EPS, offset) for x, weight in zip((q, k), weights))
    q, k = rotary(q, k, *args[1:3], interleaved)
    write_kv(k, v, *args[3:6])
    return q


def assert_close(found: Tensor, want: Tensor, *dtypes: torch.dtype) -> None:
    """Within two roundings too many of the coarsest type, relative to the number and to the mean square's root."""
    want, tolerance = want.double(), 2 * max(0.07 if dtype == FP8 else TOLERANCE[dtype] for dtype in dtypes)
    allowed = tolerance * (want.abs() + want.pow(2).mean().sqrt())
    error = (found.double() - want).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times the tolerance"


def check(args: list[Any], out: Tensor, interleaved: bool, weights: list[Any], offset: float) -> None:
    """Against fp64; what no slot names still holds ones."""
    q, k, v = parts_of(args)
    if weights[0] is not None:
        q, k = (exact("rms_norm", x, weight, EPS, offset) for x, weight in zip((q, k), weights))
    q, k = exact("rotary", q, k, *args[1:3], interleaved, False)
    dtype, slots = args[0].dtype, args[5]
    assert out.is_contiguous()
    assert_close(out, q, dtype)
    kept = slots >= 0
    for cache, rows in zip(args[3:5], (k, v)):
        found = cache.flatten(0, 1).float()
        assert_close(found[slots[kept]], rows[kept], dtype, cache.dtype)
        others = torch.ones(len(found), dtype=torch.bool, device="cuda").index_fill(0, slots[kept].long(), False)
        assert (found[others] == 1).all()


@pytest.mark.parametrize("tokens", [1, 33, 4097])
@pytest.mark.parametrize(
    ("model", "dtype"),
    [*((model, BF16) for model in MODELS), *((m, dtype) for m in ("qwen3-0.6b", "phi-2") for dtype in (FP16, FP32))],
    ids=str,
)
def test_models(model, tokens, dtype):
    for interleaved, norm, offset in ((False, False, 0.0), (False, True, 0.0), (True, True, 1.0)):
        args = arguments(tokens, model, dtype, dtype)
        weights = weights_of(args, norm)
        copy = [*args[:3], args[3].clone(), args[4].clone(), *args[5:]]
        out = rotate_and_cache(*args, interleaved, *weights, EPS, offset)
        check(args, out, interleaved, weights, offset)
        want = apart(copy, interleaved, weights, offset)
        for a, b in ((out, want), (args[3], copy[3]), (args[4], copy[4])):
            assert (a == b).float().mean() >= SAME or dtype == FP32


@pytest.mark.parametrize("cache", [FP8, FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_caches_of_another_type(dtype, cache):
    for tokens in (2, 1000):
        args = arguments(tokens, "qwen3-0.6b", dtype, cache)
        weights = weights_of(args, True)
        check(args, rotate_and_cache(*args, False, *weights, EPS), False, weights, 0.0)


def test_a_graph_serves_other_slots_and_numbers():
    args = arguments(32, "qwen3-0.6b", BF16, BF16)
    args[5] = args[5].int()
    weights = weights_of(args, True)
    rotate_and_cache(*args, False, *weights, EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rotate_and_cache(*args, False, *weights, EPS)
    for seed in range(3):
        args[0].copy_(draw(*args[0].shape, dtype=BF16, seed=10 + seed))
        args[5].copy_(args[5].roll(5) if seed else torch.full_like(args[5], -1))
        for cache in args[3:5]:
            cache.fill_(1)
        graph.replay()
        check(args, out, False, weights, 0.0)


def test_more_elements_than_32_bits_count():
    tokens, (heads, key_heads, head_dim, channels) = 2**19 + 9, MODELS["qwen3-0.6b"]
    width = (heads + 2 * key_heads) * head_dim
    assert tokens * width > 2**31
    qkv = torch.ones(tokens, width, device="cuda", dtype=BF16)
    qkv[-3:] = draw(3, width, dtype=BF16)
    angles = draw(tokens, channels)
    # The last slots of caches of more than 2³¹ elements too.
    caches = [torch.ones(2**17 + 8, 16, key_heads, head_dim, device="cuda", dtype=BF16) for _ in "kv"]
    slots = torch.arange(tokens, device="cuda")
    slots[-3:] = len(caches[0]) * 16 - 1 - torch.arange(3, device="cuda")
    out = rotate_and_cache(qkv, angles.cos(), angles.sin(), *caches, slots, heads)
    small = [qkv[-3:], angles[-3:].cos(), angles[-3:].sin(), *(x[-1:].clone() for x in caches)]
    want = rotate_and_cache(*small, slots[-3:] - (len(caches[0]) - 1) * 16, heads)
    assert torch.equal(out[-3:], want) and not out.isnan().any()
    assert torch.equal(caches[0][-1], small[3][0]) and torch.equal(caches[1][-1], small[4][0])


@pytest.mark.parametrize("norm", [False, True])
def test_a_model_gives_the_same_logits_with_it_and_without(norm):
    config = ModelConfig("qwen3", 300, 256, 8, 2, 64, 512, same_layers(3, 0, Rope(1e4, 64)), 512, qk_norm=norm)
    with torch.device("cuda"):
        model = Transformer(config).initialize()
        cache = KVCache.allocate(config, 8, 16, FP32, "cuda")
        for tensor in (*cache.keys, *cache.values):
            tensor.zero_()  # type: ignore[union-attr]
        positions = torch.arange(40)
        table, where = torch.tensor([[5, 1, 7]]), (torch.tensor([40]), torch.tensor([0, 40]))
        slots = table[0, positions // 16] * 16 + positions % 16
    layout = Layout(None, Paged(cache, table, *where, slots, 40))
    with torch.no_grad():
        fused = model(positions, positions, layout)
    with torch.enable_grad():
        other = model(positions, positions, layout).detach()
    assert not fused.isnan().any() and (fused - other).abs().max() <= 1e-4 * other.abs().max()
