"""The memory plan against formulas worked out by hand, and its refusals against plans with what they offer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.models.config import LayerKind, Rope
from rooflight.models.presets import preset
from rooflight.serve import memory_plan
from rooflight.serve.memory_plan import (
    CPU_CACHE_MOST,
    CUDA_CONTEXT_BYTES,
    GIB,
    GRAPH_BYTES,
    Demand,
    MemoryPlan,
    check,
    plan,
)
from tests.workload.setups import llama

SMALL = Demand(
    config=llama(layers=3, width=64, heads=4, kv_heads=2, head_dim=16, ffn_width=192, vocab_size=1000),
    dtype="bf16",
    kv_dtype="bf16",
    block_size=16,
    max_model_len=512,
    max_num_seqs=8,
    max_num_batched_tokens=256,
    memory_bytes=GIB,
    cuda=True,
)
LLAMA_8B = Demand(preset("llama-3.1-8b"), "bf16", "bf16", 16, 131072, 256, 8192, 141e9, True)


def changed(demand: Demand, **changes: Any) -> MemoryPlan:
    return plan(replace(demand, **changes))


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are as large as the memory allows, used or not."""
    monkeypatch.setattr(memory_plan, "USEFUL_LENGTHS", 10**9)


def test_no_cache_is_larger_than_two_times_all_requests_at_full_length() -> None:
    assert plan(SMALL).blocks == 2 * 8 * 512 // 16
    assert changed(SMALL, cuda=False).blocks == 2 * 8 * 512 // 16
    assert changed(SMALL, cuda=False, cpu_kv_cache_gib=0.25).blocks > 2 * 8 * 512 // 16


def test_weights_of_an_8b_are_its_published_parameters() -> None:
    assert plan(LLAMA_8B).weights == 2 * 8_030_261_248
    assert changed(LLAMA_8B, dtype="fp32", kv_dtype="fp32").weights == 4 * 8_030_261_248


def test_weights_by_hand() -> None:
    """2·V·D + L·(D·(H + 2K)·E + H·E·D + 3·D·F + 2·D) + D parameters."""
    layer = 64 * (4 + 2 * 2) * 16 + 4 * 16 * 64 + 3 * 64 * 192 + 2 * 64
    assert plan(SMALL).weights == 2 * (2 * 1000 * 64 + 3 * layer + 64)
    tied = changed(SMALL, config=replace(SMALL.config, tied=True))
    assert tied.weights == 2 * (1000 * 64 + 3 * layer + 64)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "expected"),
    [
        ("llama-3.1-8b", "bf16", 2 * 32 * 8 * 128 * 2),
        ("llama-3.1-8b", "fp32", 2 * 32 * 8 * 128 * 4),
        ("qwen3-0.6b", "bf16", 2 * 28 * 8 * 128 * 2),
        # MLA keeps one latent of 512 and a rotary key of 64 a layer.
        ("deepseek-v2-lite", "bf16", 27 * (512 + 64) * 2),
        # Half of the layers look back 4096 tokens only, and keep all of the cache.
        ("gemma-2-9b", "bf16", 2 * 42 * 8 * 256 * 2),
    ],
)
def test_bytes_of_cache_a_token(name: str, kv_dtype: str, expected: int) -> None:
    config = preset(name)
    found = plan(Demand(config, "bf16", kv_dtype, 32, 1024, 4, 128, 400 * GIB, True))
    assert found.kv_token_bytes == expected
    assert found.kv_block_bytes == 32 * expected


@pytest.mark.usefixtures("uncut")
def test_blocks_are_what_is_left_of_a_gpu() -> None:
    found = changed(SMALL, utilization=0.5)
    left = GIB // 2 - found.weights - found.activations - CUDA_CONTEXT_BYTES
    assert left < 0
    assert found.blocks == 0
    found = changed(SMALL, utilization=0.75)
    left = GIB * 3 // 4 - found.weights - found.activations - CUDA_CONTEXT_BYTES
    block = 16 * 2 * 3 * 2 * 16 * 2
    # One block is for padding.
    assert found.blocks == left // block - 1
    assert found.kv_cache == left // block * block
    assert found.tokens == 16 * found.blocks
    assert found.full_requests == found.blocks // 32
    assert found.total <= found.budget == GIB * 3 // 4
    assert found.total + block > found.budget


def test_the_largest_moment_of_a_prefill_by_hand() -> None:
    """Where a gate is applied, each token has gate and up of 2·F, their product of F, and the residual stream of D.

    Beside them stand cos and sin of E/2 in fp32, and three words a token of inputs.
    """
    tokens, width, ffn, head_dim = 4096, 64, 1920, 16
    found = changed(SMALL, config=replace(SMALL.config, ffn_width=ffn), max_num_seqs=1, max_num_batched_tokens=tokens)
    values = 2 * tokens * (3 * ffn + width)
    tables, inputs = tokens * 2 * (head_dim // 2) * 4, tokens * 3 * 8
    assert found.activations == pytest.approx(values + tables + inputs, rel=1e-4)


def test_the_largest_moment_of_sampling_by_hand() -> None:
    """Logits in bf16, their edited copy in fp32, another for log-probabilities, and who exceeds the chosen."""
    rows, vocabulary = 64, 50_000
    config = replace(SMALL.config, vocab_size=vocabulary)
    found = changed(SMALL, config=config, max_num_seqs=rows, max_num_batched_tokens=rows)
    assert found.activations == pytest.approx(rows * vocabulary * (2 + 4 + 4 + 1), rel=2e-3)
    # No more rows than tokens can be sampled in one step.
    fewer = changed(SMALL, config=config, max_num_seqs=rows, max_num_batched_tokens=rows // 4)
    assert fewer.activations == changed(SMALL, config=config, max_num_seqs=16, max_num_batched_tokens=16).activations


@pytest.mark.usefixtures("uncut")
def test_graphs_share_a_pool_and_keep_their_outputs() -> None:
    none, some = plan(SMALL), changed(SMALL, graph_sizes=(1, 2, 8))
    assert none.graphs == 0
    # The pool: the largest step's hidden states and logits, at most what a whole step holds.
    pool = some.graphs - 3 * GRAPH_BYTES - (1 + 2) * 1000 * 2
    assert 8 * 1000 * 2 < pool < none.activations
    assert none.blocks > some.blocks
    # Other steps keep a hidden state a slot, and their pool is that of their layers.
    more = changed(SMALL, graph_sizes=(1, 2, 8), graph_tokens=(32, 256))
    beside = 5 * GRAPH_BYTES + (1 + 2 + 8) * 1000 * 2 + 2 * 8 * 64 * 2
    layers = 256 * 2 * (3 * 192 + 64)
    assert more.graphs - beside == pytest.approx(layers, rel=0.2)
    assert len([label for label, _ in more.rows() if label.startswith("5 CUDA graphs")]) == 1
    cpu = changed(SMALL, graph_sizes=(1, 2, 8), graph_tokens=(32,), cuda=False)
    assert (cpu.graphs, cpu.context) == (0, 0)


def test_a_cpu_keeps_its_matrices_twice_where_it_packs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "packs", lambda dtype: dtype == torch.bfloat16)
    # A layer: q, k, v of 64 each way, the output projection, gate, up and down; then the head.
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 192
    assert changed(SMALL, cuda=False).packed == 2 * (3 * layer + 1000 * 64)
    assert changed(SMALL, cuda=False, dtype="fp32").packed == 0 == plan(SMALL).packed


@pytest.mark.usefixtures("uncut")
def test_a_cpus_cache_is_what_is_asked_for_or_a_quarter_of_what_is_free() -> None:
    asked = changed(SMALL, cuda=False, cpu_kv_cache_gib=0.25)
    assert asked.blocks == GIB // 4 // asked.kv_block_bytes - 1
    quarter = changed(SMALL, cuda=False)
    free = GIB - quarter.weights - quarter.packed - quarter.activations
    assert quarter.blocks == free // 4 // quarter.kv_block_bytes - 1
    most = changed(SMALL, cuda=False, memory_bytes=100 * GIB)
    assert most.blocks == CPU_CACHE_MOST // most.kv_block_bytes - 1


def test_a_number_of_blocks_is_taken_as_given() -> None:
    found = check(changed(SMALL, num_blocks=77))
    assert (found.blocks, found.kv_cache) == (77, 78 * found.kv_block_bytes)


@pytest.mark.parametrize("cuda", [True, False])
def test_rows_sum_to_the_memory_that_there_is(cuda: bool) -> None:
    found = changed(SMALL, cuda=cuda, graph_sizes=(1, 2, 4))
    assert sum(size for _, size in found.rows()) == GIB
    assumed = [label for label, _ in found.rows() if "assumed" in label]
    assert len(assumed) == (2 if cuda else 0)


def test_the_longest_context_is_the_caches_or_the_models() -> None:
    assert changed(SMALL, num_blocks=10).longest == 160
    assert changed(SMALL, config=replace(SMALL.config, max_context=100), num_blocks=10).longest == 100


def test_what_just_fits_is_accepted_and_a_byte_less_is_not() -> None:
    fixed = changed(SMALL, memory_bytes=GIB, utilization=1.0)
    least = fixed.fixed + (512 // 16 + 1) * fixed.kv_block_bytes
    assert check(changed(SMALL, memory_bytes=least, utilization=1.0)).full_requests == 1
    with pytest.raises(InvalidValue, match="one request of 512 tokens needs"):
        check(changed(SMALL, memory_bytes=least - 1, utilization=1.0))


# Flags as the settings name them, and the fields of the demand that they set.
FLAGS = {
    "max-model-len": ("max_model_len", int),
    "dtype": ("dtype", str),
    "kv-cache-dtype": ("kv_dtype", str),
    "gpu-memory-utilization": ("utilization", float),
    "max-num-batched-tokens": ("max_num_batched_tokens", int),
    "max-num-seqs": ("max_num_seqs", int),
    "cpu-kv-cache-gib": ("cpu_kv_cache_gib", float),
    "num-blocks": ("num_blocks", int),
}


def followed(demand: Demand, offer: str) -> Demand:
    """The demand after an offer's words."""
    changes: dict[str, Any] = {}
    for flag, value in re.findall(r"--([a-z-]+) (\S+)", offer):
        name, kind = FLAGS[flag]
        changes[name] = kind(value)
    if changes.get("dtype") is not None:
        changes["kv_dtype"] = changes["dtype"]
    memory = re.search(r"a (?:GPU|machine) with ([\d.]+) GiB", offer)
    if memory:
        changes["memory_bytes"] = float(memory.group(1)) * GIB
    if "max_num_seqs" in changes:
        changes["graph_sizes"] = tuple(n for n in demand.graph_sizes if n <= changes["max_num_seqs"])
    if "max_num_batched_tokens" in changes:
        changes["graph_tokens"] = tuple(n for n in demand.graph_tokens if n <= changes["max_num_batched_tokens"])
    assert changes, offer
    return replace(demand, **changes)


TOO_MUCH = {
    "a long context": (
        replace(LLAMA_8B, memory_bytes=24 * GIB, graph_sizes=(1, 8, 64, 256)),
        "131072 tokens needs 16.0",
    ),
    "weights": (replace(LLAMA_8B, memory_bytes=16 * GIB), "weights take 15.0 GiB"),
    "wide weights": (
        replace(LLAMA_8B, memory_bytes=34 * GIB, dtype="fp32", kv_dtype="fp32", max_model_len=8192),
        "weights take 29.9 GiB",
    ),
    "a wide cache": (replace(LLAMA_8B, memory_bytes=50 * GIB, kv_dtype="fp32"), "needs 32.0 GiB"),
    "a careful utilization": (replace(LLAMA_8B, memory_bytes=24 * GIB, utilization=0.7), "0.7 of the GPU's 24.0 GiB"),
    "large steps": (
        replace(
            LLAMA_8B, memory_bytes=20 * GIB, max_num_batched_tokens=65536, max_model_len=2048, graph_tokens=(512, 65536)
        ),
        "activations",
    ),
    "blocks": (replace(LLAMA_8B, num_blocks=10**6), "1953.1 GiB is more than is left"),
    "a CPU without room": (replace(LLAMA_8B, memory_bytes=12 * GIB, cuda=False), "GiB that are free"),
    "a CPU's modest cache": (replace(LLAMA_8B, memory_bytes=64 * GIB, cuda=False), "--cpu-kv-cache-gib 16.1"),
    "a CPU's cache": (
        replace(LLAMA_8B, memory_bytes=32 * GIB, cuda=False, cpu_kv_cache_gib=64.0, max_model_len=4096),
        "a KV cache of 64.0 GiB",
    ),
}


@pytest.mark.parametrize("name", sorted(TOO_MUCH))
def test_what_does_not_fit_is_refused_with_changes_that_fit(name: str) -> None:
    demand, told = TOO_MUCH[name]
    with pytest.raises(InvalidValue) as refusal:
        check(plan(demand))
    text = str(refusal.value)
    assert text.startswith("llama-3.1-8b does not fit: ")
    assert told in text
    assert "\n" not in text
    offers = text.split("; use ")[1].split(" or ")
    for offer in offers:
        check(plan(followed(demand, offer)))


def test_a_machine_that_is_named_is_no_larger_than_it_must_be() -> None:
    with pytest.raises(InvalidValue) as refusal:
        check(plan(replace(LLAMA_8B, memory_bytes=16 * GIB)))
    size = re.search(r"a GPU with ([\d.]+) GiB", str(refusal.value))
    assert size is not None
    with pytest.raises(InvalidValue):
        check(plan(replace(LLAMA_8B, memory_bytes=(float(size.group(1)) - 0.2) * GIB)))


def test_layers_of_many_kinds_are_planned_as_a_whole() -> None:
    """Windowed and full layers in turn: as many weights and as much cache as layers of one kind."""
    rope = Rope(10000.0, 16)
    mixed = replace(SMALL.config, layers=tuple(LayerKind(32 * (i % 2), rope, False) for i in range(3)))
    found, plain = changed(SMALL, config=mixed), plan(SMALL)
    assert (found.weights, found.activations, found.blocks) == (plain.weights, plain.activations, plain.blocks)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(InvalidValue, match="kv cache dtype 'int3' is unknown"):
        changed(SMALL, kv_dtype="int3")
