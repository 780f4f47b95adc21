"""The CPU's paged attention against softmax in fp64, one query and head at a time, over every kind of step.

Legend: T new tokens  B sequences  N blocks  P tokens a block  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rooflight.ops.attention import paged_cpu
from rooflight.ops.attention.paged import paged_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
E, P = 32, 8
SCALE = 0.3
MOST = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Step:
    """New tokens and the context after them of each sequence."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]


STEPS = {
    "one": Step((1,), (37,)),
    "full blocks": Step((1, 1), (16, 16)),
    "ragged decode": Step((1,) * 7, (1, 130, 70, 8, 9, 64, 33)),
    "new prompts": Step((70, 5, 130), (70, 5, 130)),
    "chunks": Step((66, 2, 64), (90, 2, 200)),
    "mixed": Step((1, 1, 40, 1, 3), (20, 90, 40, 17, 25)),
    "nothing new": Step((1, 0, 2), (5, 9, 12)),
}


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(
    step: Step, heads: int, key_heads: int, dtype: torch.dtype, latent: bool = False, cache: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, int]:
    """Blocks in a random order; a table's entries beyond a context name a block that other sequences use."""
    needed = [-(-context // P) for context in step.contexts]
    total, most = sum(needed) + 3, max(needed) + 2
    order = iter(torch.randperm(total, generator=torch.Generator().manual_seed(5)).tolist())
    table = torch.zeros((len(needed), most), dtype=torch.long)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([next(order) for _ in range(count)])
    kept = dtype if cache is None else cache
    starts = torch.tensor([0, *step.queries]).cumsum(0)
    return (
        draw(int(starts[-1]), heads, E, seed=1, dtype=dtype),
        draw(total, P, key_heads, E, seed=2, dtype=kept),
        None if latent else draw(total, P, key_heads, E, seed=3, dtype=kept),
        table,
        torch.tensor(step.contexts),
        starts,
        max(step.queries),
    )


def exact(
    q_THE: Tensor,
    k_NPKE: Tensor,
    v_NPKU: Tensor | None,
    table: Tensor,
    contexts: Tensor,
    starts: Tensor,
    value_dim: int,
    window: int,
    sinks_H: Tensor | None,
) -> Tensor:
    """Each query by itself: the keys at its own and earlier positions, looked up one by one."""
    out = torch.zeros((q_THE.shape[0], q_THE.shape[1], value_dim), dtype=torch.float64)
    group = q_THE.shape[1] // k_NPKE.shape[2]
    for b, context in enumerate(contexts.tolist()):
        first, last = int(starts[b]), int(starts[b + 1])
        for token in range(first, last):
            position = context - (last - token)
            low = max(0, position - window + 1) if window else 0
            places = [(int(table[b, p // P]), p % P) for p in range(low, position + 1)]
            for head in range(q_THE.shape[1]):
                keys = torch.stack([k_NPKE[block, place, head // group] for block, place in places]).double()
                values = keys[:, :value_dim]
                if v_NPKU is not None:
                    values = torch.stack([v_NPKU[block, place, head // group] for block, place in places]).double()
                weights = torch.exp(SCALE * (keys @ q_THE[token, head].double()))
                sink = 0.0 if sinks_H is None else math.exp(float(sinks_H[head]))
                out[token, head] = weights @ values / (weights.sum() + sink)
    return out


def check(step: Step, heads: int, key_heads: int, dtype: torch.dtype, window: int = 0, **options: object) -> None:
    latent, sinks = bool(options.get("latent")), options.get("sinks")
    cache = options.get("cache")
    args = arguments(step, heads, key_heads, dtype, latent, cache if isinstance(cache, torch.dtype) else None)
    value_dim = 20 if latent else E
    sinks_H = draw(heads, seed=4, dtype=dtype) if sinks else None
    assert paged_cpu.takes(args[0], args[1], args[2], 0.0)
    found = paged_attention(*args, value_dim, SCALE, window, 0.0, sinks_H)
    assert found.shape == (args[0].shape[0], heads, value_dim) and found.dtype == dtype and found.is_contiguous()
    expected = exact(*args[:6], value_dim, window, sinks_H)
    worst = (found.double() - expected).abs().max().item() / expected.abs().max().item()
    assert worst <= MOST[dtype]


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (2, 2), (4, 1)])
def test_every_kind_of_step(step: Step, heads: int, key_heads: int) -> None:
    check(step, heads, key_heads, torch.float32)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("window", [1, 5, 64, 1000])
def test_windows(step: Step, window: int) -> None:
    check(step, 4, 2, torch.float32, window)


@pytest.mark.parametrize("step", [STEPS["ragged decode"], STEPS["mixed"], STEPS["new prompts"]])
@pytest.mark.parametrize(
    "options",
    [{"sinks": True}, {"latent": True}, {"sinks": True, "latent": True, "window": 9}, {"cache": torch.bfloat16}],
)
def test_sinks_latent_caches_and_caches_of_another_type(step: Step, options: dict[str, object]) -> None:
    check(step, 4, 1 if options.get("latent") else 2, torch.float32, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_half_precision(step: Step, dtype: torch.dtype) -> None:
    check(step, 6, 2, dtype, sinks=True)


def test_sequences_far_apart_in_length_and_large_ones_go_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a group gathers stays within bounds: padding to at most twice, and bytes of keys."""
    gathered: list[tuple[int, int]] = []
    gather = paged_cpu._Cache.gather

    def seen(cache: paged_cpu._Cache, blocks_RC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        gathered.append((blocks_RC.shape[0], blocks_RC.shape[1]))
        return gather(cache, blocks_RC, dtype)

    monkeypatch.setattr(paged_cpu._Cache, "gather", seen)
    step = Step((1,) * 6, (100, 400, 390, 10, 99, 388))
    check(step, 2, 1, torch.float32)
    assert sorted(gathered) == [(1, 2), (2, 13), (3, 50)]
    gathered.clear()
    monkeypatch.setattr(paged_cpu, "_GATHERED", 2 * 50 * P * E * 4)
    check(step, 2, 1, torch.float32)
    assert sorted(gathered) == [(1, 2), (1, 49), (2, 13), (2, 50)]


def test_what_it_leaves_to_the_reference() -> None:
    q, k, v = arguments(STEPS["one"], 4, 2, torch.float32)[:3]
    assert v is not None
    assert paged_cpu.takes(q, k, v, 0.0)
    assert not paged_cpu.takes(q, k, v, 30.0)
    assert not paged_cpu.takes(q, k, v[..., :8], 0.0)
    assert not paged_cpu.takes(q.double(), k.double(), v.double(), 0.0)
    assert not paged_cpu.takes(q, k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn), 0.0)
    assert not paged_cpu.takes(q.to("meta"), k.to("meta"), v.to("meta"), 0.0)
