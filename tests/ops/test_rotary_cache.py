"""The fused step between qkv and attention equals the operations that it replaces, bit for bit, and costs less."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig, Rope, same_layers
from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.models.transformer import Transformer
from rooflight.ops import batch
from rooflight.ops.attention import write_kv
from rooflight.ops.norm import rms_norm
from rooflight.ops.rope import rotary
from rooflight.ops.rotary_cache import rotate_and_cache
from rooflight.workload.program import Program
from rooflight.workload.walk import record

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(
    tokens: int, heads: int, key_heads: int, head_dim: int, channels: int, dtype: torch.dtype, cache: torch.dtype
) -> tuple[Any, ...]:
    """All up to the number of heads; the rows of qkv are slices of wider ones."""
    qkv = draw(tokens, (heads + 2 * key_heads) * head_dim + 16, dtype=dtype)[:, :-16]
    angles = draw(tokens, channels, dtype=FP32, seed=1)
    caches = (torch.zeros(tokens, 4, key_heads, head_dim).to(cache) for _ in range(2))
    slots = torch.randperm(4 * tokens, generator=torch.Generator().manual_seed(2))[:tokens]
    return qkv, angles.cos(), angles.sin(), *caches, slots, heads


def apart(qkv: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
    """The four operations that the fused one replaces."""
    k_cache, v_cache, slots, heads, interleaved, q_weight, k_weight, eps, offset = rest
    q, k, v = qkv.unflatten(1, (-1, k_cache.shape[3])).split([heads, k_cache.shape[2], k_cache.shape[2]], dim=1)
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps, offset), rms_norm(k, k_weight, eps, offset)
    q, k = rotary(q, k, cos, sin, interleaved)
    write_kv(k, v, k_cache, v_cache, slots)
    return q


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dtype", "cache"),
    [(FP32, FP32), (BF16, BF16), (BF16, torch.float16)],
)
@pytest.mark.parametrize(("tokens", "head_dim", "channels"), [(1, 64, 32), (5, 16, 5), (300, 64, 16)])
def test_equals_the_operations_apart(tokens, head_dim, channels, dtype, cache, interleaved, norm, offset):
    args = arguments(tokens, 6, 2, head_dim, channels, dtype, cache)
    weights = [draw(head_dim, dtype=dtype, seed=seed) if norm else None for seed in (3, 4)]
    options = (interleaved, *weights, EPS, offset)
    copies = [x.clone() for x in args[3:5]]
    out, want = rotate_and_cache(*args, *options), apart(*args[:3], *copies, *args[5:], *options)
    assert out.is_contiguous() and torch.equal(bits(out), bits(want))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(args[3:5], copies))


def test_costs_what_the_operations_apart_do_less_the_passes_between():
    args = arguments(5, 6, 2, 16, 6, BF16, BF16)
    weights = [draw(16, dtype=BF16, seed=seed) for seed in (3, 4)]
    out = rotate_and_cache(*args, False, *weights, EPS, 1.0)
    fused = rotate_and_cache.price(out, *args, False, *weights, EPS, 1.0)
    q, k, v = args[0].unflatten(1, (-1, 16)).split([6, 2, 2], dim=1)
    norms = [rms_norm.price(x, x, weight, EPS, 1.0) for x, weight in zip((q, k), weights)]
    costs = [*norms, rotary.price((q, k), q, k, *args[1:3]), write_kv.price(None, k, v, *args[3:6])]
    assert fused.total_flops == sum(cost.total_flops for cost in costs)
    # q and k are written and read again between the norms and the rotation, k once more on its way to the cache.
    between = 2 * (2 * (q.numel() + k.numel()) + 2 * k.numel())
    assert fused.total_bytes == sum(cost.total_bytes for cost in costs) - between
    assert [part.component for part in fused.parts] == ["norm and residual", "rotary", "KV cache write"]
    plain = rotate_and_cache.price(out, *args)
    assert [part.component for part in plain.parts] == ["rotary", "KV cache write"]


def taken(change: dict[int, Any]) -> bool:
    args: list[Any] = [*arguments(3, 4, 2, 16, 4, FP32, FP32), False, None, None, EPS, 0.0]
    for at, value in change.items():
        args[at] = value
    takes = rotate_and_cache.kernel_takes
    assert takes is not None
    return takes(*args)


def test_what_the_kernel_leaves_to_the_reference():
    qkv, table, cache, weight = torch.ones(3, 8 * 16), torch.ones(3, 4), torch.ones(3, 4, 2, 16), torch.ones(16)
    assert taken({}) and taken({0: qkv.half(), 3: cache.to(FP8), 4: cache.to(FP8)}) and taken({8: weight, 9: weight})
    assert taken({5: torch.arange(3, dtype=torch.int32)})
    assert not taken({0: qkv.double()}) and not taken({0: qkv[:, :-1]}) and not taken({6: 5})
    assert not taken({1: torch.ones(3, 9), 2: torch.ones(3, 9)}) and not taken({1: table[:0], 2: table[:0]})
    assert not taken({8: weight.double(), 9: weight.double()})
    assert not taken({3: cache.double()}) and not taken({4: cache[..., :8]}) and not taken({4: cache.transpose(0, 1)})
    assert not taken({5: torch.arange(3.0)}) and not taken({5: torch.arange(4)})
    wide = torch.ones(3, 4, 2, 264)
    assert not taken({0: torch.ones(3, 8 * 264), 3: wide, 4: wide})


CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=40,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_width=48,
    layers=same_layers(2, 0, Rope(10000.0, 8)),
    max_context=64,
    qk_norm=True,
)


def step(config: ModelConfig, *, dense: bool, grad: bool = False, attention: str = "flash") -> tuple[Any, Tensor]:
    """Names of the operations of one step of 6 tokens over a cache, and its logits."""
    model = Transformer(config).initialize()
    cache = KVCache.allocate(config, 3, 4, FP32, "cpu")
    for tensor in (*cache.keys, *cache.values):
        if tensor is not None:
            tensor.zero_()
    paged = Paged(
        cache, torch.tensor([[2, 0]]), torch.tensor([6]), torch.tensor([0, 6]), torch.tensor([8, 9, 10, 11, 0, 1]), 6, 6
    )
    layout = Layout((1, 6) if dense else None, paged, attention)
    tokens = torch.arange(6)
    logits: list[Tensor] = []
    with batch.use(batch.Batch.of((6,), (6,))), torch.set_grad_enabled(grad):
        found = record(Program(model, lambda _: logits.append(model(tokens, tokens, layout)), {}, ()))
    return Counter(r.name for r in found.trace.records), logits[0].detach()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("attention", ["flash", "naive"])
def test_a_step_over_the_cache_takes_it(attention, qk_norm):
    config = replace(CONFIG, qk_norm=qk_norm)
    names, logits = step(config, dense=False, attention=attention)
    assert names["rotate_and_cache"] == 2 and not names.keys() & {"rotary", "rotary_qkv", "write_kv"}
    # The first layer's own norm is apart from its attention's. With gradients all are, and give the same numbers.
    assert names["rms_norm"] == 1
    others, same = step(config, dense=False, grad=True, attention=attention)
    assert not others["rotate_and_cache"] and others["write_kv"] == 2
    assert others["rotary" if qk_norm else "rotary_qkv"] == 2
    assert others["rms_norm"] == 1 + 4 * qk_norm and torch.equal(logits, same)


def test_other_steps_do_not():
    names, _ = step(CONFIG, dense=True)
    assert not names["rotate_and_cache"] and names["write_kv"] == 2
    names, _ = step(replace(CONFIG, layers=same_layers(2)), dense=False)
    assert not names["rotate_and_cache"] and names["write_kv"] == 2 and not names["rotary"]


def test_a_cache_without_values_is_refused():
    model = Transformer(CONFIG).initialize()
    cache = KVCache(KVCache.allocate(CONFIG, 3, 4, FP32, "cpu").keys, (None, None))
    where = (torch.tensor([[2]]), torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([8]), 1)
    with torch.no_grad(), pytest.raises(InvalidValue, match="cache with values"):
        model(torch.zeros(1, dtype=torch.long), torch.zeros(1), Layout(None, Paged(cache, *where)))
