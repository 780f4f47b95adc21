"""What kernels of mixture-of-experts layers compile to for an H100 or H200, without one: no spills, 16-byte accesses.

`python -m pytest tests/ops/kernels/test_moe_compiled.py -s` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import dispatch, grouped, grouped_plan, routing
from rooflight.ops.kernels.grouped_plan import Plan

from . import test_ahead_of_time as ahead
from .test_paged_compiled import SHARED_OF_A_PROGRAM, programs_of_a_multiprocessor

COMPILES = (
    dispatch._permute_few_kernel,
    dispatch._count_kernel,
    dispatch._scan_kernel,
    dispatch._place_kernel,
    dispatch._copy_kernel,
    dispatch._invert_kernel,
    dispatch._combine_kernel,
    dispatch._unpermute_backward_kernel,
    grouped._linear_kernel,
    grouped._add_bias_kernel,
    grouped._bias_grad_kernel,
    routing._route_kernel,
    routing._route_backward_kernel,
)
# As much as memory of 4.8 TB/s and a latency of 0.7 µs wants of each of 132 multiprocessors.
LEAST_BYTES_ON_THEIR_WAY = 25_000
# Experts, experts a token, width, feed-forward width, biases.
MODELS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768, False),
    "gpt-oss-20b": (32, 4, 2880, 2880, True),
    "mixtral-8x7b": (8, 2, 4096, 14336, False),
    "deepseek-v3": (256, 8, 7168, 2048, False),
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[ahead.Compiled]]:
    """Kernels that a test launched, compiled and not run."""
    found: list[ahead.Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(ahead.compile_launch(self, args, options, tmp_path))

    monkeypatch.setattr(JITFunction, "run", run)
    yield found
    for kernel in found:
        print(f"\n{kernel}", end="")


def check(found: list[ahead.Compiled], *, threads: int) -> None:
    assert found
    for kernel in found:
        assert kernel.stack == 0, f"{kernel} spills"
        assert kernel.shared <= SHARED_OF_A_PROGRAM
        assert kernel.resident_threads >= threads, f"{kernel} leaves room for {kernel.resident_threads} threads"


@pytest.mark.parametrize("tokens", [1, 128, 4096])
@pytest.mark.parametrize("model", MODELS)
def test_rows_there_and_back(model, tokens, compiled):
    experts, top_k, width, _, _ = MODELS[model]
    x, y, weights = meta(tokens, width), meta(tokens * top_k, width), meta(tokens, top_k, dtype=torch.float32)
    _, source, _ = dispatch.permute(x, meta(tokens, top_k, dtype=torch.int64), experts)
    copying = compiled[-1]
    dispatch.unpermute(y, weights, source)
    adding = compiled[-1]
    dispatch.permute_backward(y, source, top_k)
    dispatch.unpermute_backward(x, y, weights, source)
    check(compiled, threads=512)
    assert copying.wide_stores > 0 and adding.wide_loads > 0 and compiled[-1].wide_stores > 0


@pytest.mark.parametrize(
    ("experts", "top_k", "options"),
    [
        (128, 8, ("softmax", True, 1.0, 1, 1, "max")),
        (32, 4, ("softmax_topk", True, 1.0, 1, 1, "max")),
        (256, 8, ("sigmoid", True, 2.5, 8, 4, "top2")),
        (512, 16, ("softmax", True, 1.0, 1, 1, "max")),
    ],
)
def test_route(experts, top_k, options, compiled):
    logits, bias = meta(64, experts), meta(experts, dtype=torch.float32)
    weights, chosen = routing.route(logits, bias, top_k, *options)
    routing.route_backward(weights, logits, chosen, *options[:3])
    check(compiled, threads=384)


@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 4096])
@pytest.mark.parametrize("model", MODELS)
def test_products(model, tokens, compiled):
    experts, top_k, width, ffn, bias = MODELS[model]
    rows, counts = tokens * top_k, meta(experts, dtype=torch.int64)
    up = grouped.linear(
        meta(rows, width), meta(experts, 2 * ffn, width), meta(experts, 2 * ffn) if bias else None, counts
    )
    kind = "clamped_swiglu" if bias else "silu"
    grouped.gated_linear(
        *(meta(rows, width), meta(experts, 2 * ffn, width), meta(experts, 2 * ffn) if bias else None, counts), kind
    )
    grouped.linear(up[:, :ffn], meta(experts, width, ffn), meta(experts, width) if bias else None, counts)
    check(compiled, threads=128)
    plan = grouped_plan.plan_for(rows, experts, torch.bfloat16)
    for kernel in compiled:
        assert kernel.wide_loads > 0
        on_their_way = programs_of_a_multiprocessor(kernel) * 2 * plan.outputs * plan.inputs * (plan.stages - 1)
        assert on_their_way >= LEAST_BYTES_ON_THEIR_WAY, f"{kernel}: {on_their_way} bytes at most"


@pytest.mark.parametrize("one", [one.plan for one in grouped_plan.SINGLE], ids=str)
def test_products_of_fp32(one: Plan, compiled):
    fp32 = torch.float32
    grouped.linear(meta(64, 2048, dtype=fp32), meta(16, 768, 2048, dtype=fp32), None, meta(16, dtype=torch.int64), one)
    check(compiled, threads=128)


def test_the_rest(compiled):
    counts = meta(32, dtype=torch.int64)
    grouped.input_grad(meta(640, 5760), meta(32, 5760, 2880), counts)
    grouped.add_bias(meta(640, 5760), meta(32, 5760), counts)
    grouped.bias_grad(meta(640, 5760), counts)
    check(compiled, threads=128)
