"""Memory: weights, gradients, optimizer, activations and KV cache against figures by hand and against a real run.

Legend of the comments: s tokens a sequence, b sequences, h width, a heads, L layers (as in Korthikanti 2205.05198)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rooflight.models.config import ModelConfig, same_layers
from rooflight.models.count import parameter_counts
from rooflight.workload import program
from rooflight.workload.explanation import Memory
from rooflight.workload.memory import CATEGORIES, WORKSPACE, over_time, play
from rooflight.workload.program import Setting
from rooflight.workload.walk import Walk
from tests.workload.setups import FAMILIES, KINDS, llama, walked

CAPACITY = 1e12


def memory(config: ModelConfig, setting: Setting) -> Memory:
    return over_time(walked(config, setting), CAPACITY)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_gradients_and_states_follow_from_the_parameter_count(name: str) -> None:
    config = FAMILIES[name]
    n = parameter_counts(config)["total"]
    found = memory(config, Setting("train", 2, 19, optimizer="adamw"))
    assert (found.weights, found.gradients, found.optimizer) == (2 * n, 2 * n, 8 * n)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "bytes_each"),
    [
        # ZeRO (1910.02054), stage 0: 2 for the weight, 2 for its gradient, 12 for master, mean and square in fp32.
        ("bf16", "adamw-master", (2, 2, 12)),
        ("bf16", "adamw", (2, 2, 8)),
        ("bf16", "adamw-bf16", (2, 2, 4)),
        ("fp32", "adamw", (4, 4, 8)),
        # An fp32 weight is its own master.
        ("fp32", "adamw-master", (4, 4, 8)),
        ("bf16", "sgd", (2, 2, 0)),
        ("bf16", "none", (2, 2, 0)),
    ],
)
def test_bytes_a_parameter(dtype: str, optimizer: str, bytes_each: tuple[int, int, int]) -> None:
    config = llama(5)
    n = parameter_counts(config)["total"]
    found = memory(config, Setting("train", 2, 16, dtype, optimizer=optimizer))
    assert (found.weights, found.gradients, found.optimizer) == tuple(each * n for each in bytes_each)


def test_an_inference_step_has_neither_gradients_nor_states() -> None:
    for phase in ("prefill", "decode"):
        found = memory(llama(3), Setting(phase, 2, 16))
        assert (found.gradients, found.optimizer) == (0, 0)
        assert found.weights == 2 * parameter_counts(llama(3))["total"]


def gpt(layers: int, width: int, heads: int) -> ModelConfig:
    """The block of Korthikanti et al.: LayerNorm, multi-head attention, GELU, d_ff = 4h; no positions, no biases."""
    dim = width // heads
    config = llama(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=dim,
        ffn_width=4 * width,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
    )
    return replace(config, layers=same_layers(layers))


def layer_bytes(make: Any, setting: Setting) -> float:
    """What one more layer keeps for the backward: the difference of activations at the end of the forward."""

    def kept(layers: int) -> float:
        found = memory(make(layers), setting)
        last = [m for m in found.timeline if m.label.startswith("forward: norm")]
        return last[-1].bytes["activations"]

    difference = kept(4) - kept(3)
    assert difference == kept(3) - kept(2)
    return difference


@pytest.mark.parametrize(("s", "b", "h", "a"), [(32, 2, 64, 4), (48, 1, 32, 8)])
def test_activations_of_a_gpt_layer_with_naive_attention(s: int, b: int, h: int, a: int) -> None:
    """Korthikanti et al. 2205.05198, section 4.1, equation 1: s·b·h·(34 + 5·a·s/h) bytes in 16 bits.

    Theirs: attention 11·sbh + 5·a·s²·b, of which a dropout mask of 1·sbh after the projection and 1·a·s²·b over the
    probabilities, and 2·a·s²·b for the dropped-out probabilities beside the softmax's; MLP 19·sbh, of which a mask of
    1·sbh; LayerNorms 4·sbh. Without dropout: 34 − 2 = 32 and 5 − 1 − 2 = 2, so s·b·h·(32 + 2·a·s/h). Item by item:

        attention   x 2 · q, k, v 6 · context 2                     = 10
        MLP         x 2 · GELU's input 8 · GELU's output 8          = 18
        LayerNorms  2 inputs                                        =  4

    q, k and v are views of one QKV output; x is a LayerNorm's output. Mean and 1/σ of a row are computed again.
    """
    found = layer_bytes(lambda layers: gpt(layers, h, a), Setting("train", b, s, attention="naive"))
    assert found == s * b * h * 32 + 2 * a * s * s * b


@pytest.mark.parametrize(("s", "b", "h", "a"), [(32, 2, 64, 4), (64, 1, 32, 8)])
def test_flash_attention_keeps_no_square_of_the_context(s: int, b: int, h: int, a: int) -> None:
    # Instead of the probabilities 2·a·s²·b, one logsumexp a row in fp32: 4·a·s·b.
    found = layer_bytes(lambda layers: gpt(layers, h, a), Setting("train", b, s))
    assert found == s * b * h * 32 + 4 * a * s * b


@pytest.mark.parametrize("make", [lambda layers: gpt(layers, 64, 4), llama])
@pytest.mark.parametrize("attention", ["flash", "naive"])
def test_full_recompute_keeps_a_layers_input_only(make: Any, attention: str) -> None:
    """2·s·b·h a layer (2205.05198, section 5): the residual stream, with the block's output added to it."""
    s, b, h = 32, 2, make(1).width
    setting = Setting("train", b, s, attention=attention, recompute="full")
    assert layer_bytes(make, setting) == 2 * s * b * h


def test_selective_recompute_keeps_what_is_dear_to_compute() -> None:
    """Everything but norms, rotary, activation and naive attention: its products' outputs, and those of flash."""
    s, b, config = 32, 2, llama(1)
    h, f, heads, kv, dim = config.width, config.ffn_width, config.heads, config.kv_heads, config.head_dim
    # In 16 bits a token: qkv, attention's projection, gate and up, down; and the layer's second input, the residual.
    products = 2 * ((heads + 2 * kv) * dim + h + 2 * f + h)
    residual = 2 * h
    naive = layer_bytes(llama, Setting("train", b, s, attention="naive", recompute="selective"))
    assert naive == s * b * (products + residual)
    # Flash attention's output, and its logsumexp in fp32.
    flash = layer_bytes(llama, Setting("train", b, s, recompute="selective"))
    assert flash == s * b * (products + residual + 2 * heads * dim + 4 * heads)


def test_a_llama_layer_keeps_these_tensors() -> None:
    """SwiGLU, RMSNorm, grouped queries, flash attention: what each operation saves, added up."""
    s, b, config = 32, 2, llama(1)
    h, f, q, kv = config.width, config.ffn_width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    # RMSNorm twice: its input, and its output, which is the linear's input. The backward computes 1/rms again.
    norms = 2 * (2 * h + 2 * h)
    # Rotated q and k, and v; the output and logsumexp of attention. The QKV output itself is gone.
    attention = 2 * (q + 2 * kv) + 2 * q + 4 * config.heads
    swiglu = 2 * 2 * f + 2 * f
    assert layer_bytes(llama, Setting("train", b, s)) == s * b * (norms + attention + swiglu)


def test_recomputation_trades_memory_in_order() -> None:
    found = [
        memory(llama(6), Setting("train", 2, 64, recompute=r)).activations_peak for r in ("none", "selective", "full")
    ]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("context", [1, 16, 17, 40])
@pytest.mark.parametrize(("kv_dtype", "size"), [(None, 2), ("fp8", 1), ("fp32", 4)])
def test_kv_cache_bytes(context: int, kv_dtype: str | None, size: int) -> None:
    batch, config = 3, llama(5)
    # In blocks of 16 tokens: the last one may be part empty.
    room = 16 * -(-context // 16)
    found = memory(config, Setting("decode", batch, context, kv_dtype=kv_dtype))
    assert found.kv_cache == batch * 5 * 2 * room * config.kv_heads * config.head_dim * size


def test_grouped_and_single_key_heads_shrink_the_cache_in_proportion() -> None:
    def cache(kv_heads: int) -> float:
        return memory(llama(2, heads=8, kv_heads=kv_heads), Setting("decode", 2, 64)).kv_cache

    assert cache(8) == 4 * cache(2) == 8 * cache(1) > 0


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2-lite", "deepseek_v3"])
def test_latent_attention_caches_one_vector_a_token(name: str) -> None:
    config, latent = FAMILIES[name], FAMILIES[name].latent
    assert latent is not None
    found = memory(config, Setting("decode", 3, 32))
    assert found.kv_cache == 3 * 32 * len(config.layers) * (latent.kv_rank + latent.rope_dim) * 2


def test_the_peak_is_the_highest_moment_and_says_what_stands_there() -> None:
    found = memory(llama(3), Setting("train", 2, 64, attention="naive"))
    sums = [sum(moment.bytes.values()) for moment in found.timeline]
    # So few operations are all kept as moments.
    assert found.total == max(sums)
    assert found.peak_label == found.timeline[sums.index(max(sums))].label
    assert sum(size for _, size in found.at_peak) == found.total
    assert [size for _, size in found.at_peak] == sorted((size for _, size in found.at_peak), reverse=True)
    assert {kind for kind, _ in found.at_peak} <= set(CATEGORIES)
    assert found.fits and not replace(found, capacity=found.total - 1).fits


@pytest.mark.parametrize("name", KINDS)
def test_what_a_step_makes_for_itself_is_gone_after_it(name: str) -> None:
    for phase in ("prefill", "decode", "train"):
        walk = walked(FAMILIES[name], Setting(phase, 2, 19), fold=False)
        left = sum(size for record in walk.trace.records for _, size in record.changes)
        # The step's own answer, tokens or loss, is handed to whoever runs it and let go at once.
        assert left == 0


class LiveBytes(TorchDispatchMode):
    """Bytes of every storage that has been seen and still exists, at its highest right after an operation.

    What an operation held for itself while it ran is over by then: the prediction's workspace is none of it.
    Asks C++'s weak reference to each storage whether it is expired, and so shares no code with the recorder.
    """

    def __init__(self, standing: list[Any]) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._see(standing)

    def _see(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen = {key: entry for key, entry in self.seen.items() if not entry[0].expired()}
        self._see(output)
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return output


@contextmanager
def live_bytes(run: program.Program) -> Iterator[LiveBytes]:
    standing = [tree for pieces in run.standing.values() for tree, _ in pieces]
    with LiveBytes(standing) as mode:
        yield mode


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_the_predicted_peak_is_that_of_a_real_training_step(name: str, recompute: str) -> None:
    config = FAMILIES[name]
    for attention in ("flash", "naive") if recompute == "none" else ("naive",):
        setting = Setting("train", 2, 19, "fp32", attention=attention, recompute=recompute, optimizer="adamw")
        predicted = tensors_peak(walked(config, setting, fold=False))
        model = program.build_model(config, "fp32", "cpu").initialize()
        run = program.decoder(config, setting, "cpu", fold=False, model=model)
        with live_bytes(run) as mode:
            run.step(None)
        assert mode.peak == predicted


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", KINDS)
def test_the_predicted_peak_is_that_of_a_real_inference_step(name: str, phase: str) -> None:
    config, setting = FAMILIES[name], Setting(phase, 2, 19, "fp32")
    model = program.build_model(config, "fp32", "cpu").initialize()
    run = program.decoder(config, setting, "cpu", fold=False, model=model)
    with live_bytes(run) as mode:
        run.step(None)
    assert mode.peak == tensors_peak(walked(config, setting))


def tensors_peak(found: Walk) -> float:
    """The highest of what tensors hold, workspace apart."""
    start = sum(found.standing.values())
    return max(start, *(sum(now.values()) - now[WORKSPACE] for now in play(found)))
