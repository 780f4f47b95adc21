"""An engine from settings: the memory plan is told and heeded before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.serve import build as module
from rooflight.serve.build import build, plan_for, resolved
from rooflight.serve.load import find
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.settings import EngineSettings
from tests.serve.checkpoints import CONTEXT, checkpoint

GIB = 1 << 30


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("build") / "model")


def settings(model: Path | str, **changed: Any) -> EngineSettings:
    base: dict[str, Any] = {"device": "cpu", "on": "cloud-cpu", "block_size": 8, "num_blocks": 100}
    return EngineSettings(model=str(model), **{**base, **changed})


def test_the_plan_is_told_before_weights_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers by hand: GiB of weights and of the cache, whose block holds keys and values of 8 tokens in 2 layers."""
    told: list[str] = []
    size = 4 * (2 * 352 * 32 + 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 56 + 2 * 32) + 32)
    block = 2 * 2 * 2 * 8 * 4 * 8
    monkeypatch.setattr(module, "memory_available", lambda device: 7.0 * GIB)
    real = module.weights
    monkeypatch.setattr(module, "weights", lambda *args, **more: (told.append("weights"), real(*args, **more))[1])
    built = build(settings(directory, max_num_seqs=5), told.append)
    assert (built.plan.weights, built.plan.kv_block_bytes) == (size, block)
    assert (directory / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.1)
    before = told[: told.index("weights")]
    assert before[0] == "memory plan for model, fp32:"
    # What is told sums to what there is.
    shown = [int(value) for _, value in built.plan.rows()]
    assert sum(shown) == 7 * GIB
    assert any(re.search(r"KV cache, 100 blocks of 8 tokens +0\.00 GiB", line) for line in before)
    assert before[-1].strip() == f"800 tokens of cache: 4 requests of {CONTEXT} tokens at once, 5 at most"
    assert told[-1].startswith("loading weights from")
    scheduler = built.engine.scheduler.config
    assert (scheduler.num_blocks, scheduler.max_num_seqs, scheduler.max_model_len) == (100, 5, CONTEXT)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama-3.1-405b", {"num_blocks": 0}, "does not fit: weights take"),
    ("tiny", {"num_blocks": 9, "max_model_len": 256}, "one request of 256 tokens needs"),
    ("tiny", {"num_blocks": 10**9}, "is more than is left of"),
    ("tiny", {"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, "below the longest context of 256"),
    ("tiny", {"on": "no-such-machine"}, "no-such-machine"),
    ("tiny", {"max_model_len": 257}, "--max-model-len 257 is beyond"),
    ("tiny", {"max_model_len": -1}, "--max-model-len -1 is out of range"),
]


@pytest.mark.parametrize(("model", "changed", "words"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    model: str, changed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "weights", lambda *args, **more: pytest.fail("weights were loaded"))
    monkeypatch.setattr(module, "memory_available", lambda device: 7.0 * GIB)
    with pytest.raises(InvalidValue, match=words) as caught:
        build(settings(model, load_format="dummy", **changed), lambda text: None)
    assert "\n" not in str(caught.value)


def test_a_refusal_names_changes_that_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_available", lambda device: 7.0 * GIB)
    asked = {"load_format": "dummy", "num_blocks": 20, "max_model_len": 256}
    with pytest.raises(InvalidValue, match="--max-model-len 160") as caught:
        build(settings("tiny", **asked), lambda text: None)
    assert "--num-blocks 0" in str(caught.value)
    assert build(settings("tiny", **asked | {"max_model_len": 160}), lambda text: None).plan.full_requests == 1
    assert build(settings("tiny", **asked | {"num_blocks": 0}), lambda text: None).plan.full_requests > 1


def test_a_longest_context_that_nobody_asked_for_is_cut_to_the_cache() -> None:
    asked = settings("llama-3.1-8b", load_format="dummy", num_blocks=0, block_size=16, max_num_seqs=8)
    source = find(asked)
    memory = 24.0 * GIB
    found, cut, planned = plan_for(asked, source, memory, False)
    assert source.max_model_len == 131072
    # 131,072 bytes a token.
    assert planned.kv_token_bytes == 2 * 8 * 128 * 32 * 2
    assert found.max_model_len == cut.max_model_len == planned.tokens < 131072
    assert planned.total <= memory
    with pytest.raises(InvalidValue, match="one request of 131072 tokens"):
        plan_for(settings("llama-3.1-8b", num_blocks=0, max_num_seqs=8, max_model_len=131072), source, memory, False)


def test_defaults_of_the_device() -> None:
    for cuda, seqs, tokens in ((True, 256, 8192), (False, 64, 512)):
        found = resolved(EngineSettings(model="x"), cuda)
        assert (found.max_num_seqs, found.max_num_batched_tokens) == (seqs, tokens)
    found = resolved(EngineSettings(model="x", max_num_seqs=3, max_num_batched_tokens=9), True)
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (3, 9)


def test_settings_reach_the_engine(directory: Path) -> None:
    for mode, steps in (("auto", 0), ("off", 0), ("on", 1)):
        assert build(settings(directory, async_scheduling=mode), lambda text: None).engine.ahead == steps
    asked = settings(
        directory, max_num_seqs=3, max_num_batched_tokens=77, max_model_len=64, enable_prefix_caching=False,
        scheduling_policy="priority", kv_cache_dtype="bf16",
    )  # fmt: skip
    built = build(asked, lambda text: None)
    config = built.engine.scheduler.config
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len) == (3, 77, 64)
    assert (config.block_size, config.num_blocks) == (8, 100)
    assert (config.enable_prefix_caching, config.chunked_prefill, config.by_priority) == (False, True, True)
    runner: Any = built.engine.runner
    cache = runner._inputs.cache
    assert {tensor.dtype for tensor in cache.keys} == {torch.bfloat16}
    # A block more than the scheduler deals out.
    assert cache.keys[0].shape[:2] == (101, 8)
    assert not torch.cat([tensor.flatten() for tensor in (*cache.keys, *cache.values)]).isnan().any()


def test_without_a_machine_nothing_is_predicted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_machine", lambda name, device: None)
    built = build(settings(directory, on=""), lambda text: None)
    assert built.predictor is None and built.machine is None
    records: list[Any] = []
    built.engine.on_step = records.append
    built.engine.add(Request("a", [1, 2, 3], SamplingParams(temperature=0.0), 4))
    while built.engine.has_work:
        built.engine.step()
    assert [record.forecast for record in records] == [None] * 4
    assert all(record.seconds > 0 for record in records)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")])
def test_memory_that_others_took_is_told_in_one_line(
    directory: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(module, "TorchRunner", full)
    with pytest.raises(InvalidValue, match="used up by others") as caught:
        build(settings(directory), lambda text: None)
    assert "\n" not in str(caught.value)


def test_a_model_larger_than_the_memory_is_refused_from_its_config_alone(tmp_path: Path) -> None:
    """A directory with the config of 405 billion parameters, and not one of them."""
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    # 2 bytes a parameter: 126 · (2·16384² + 2·16384·1024 + 3·16384·53248 + 2·16384) + 2·128256·16384 + 16384.
    attention, mlp = 2 * 16384**2 + 2 * 16384 * 1024, 3 * 16384 * 53248
    size = 2 * (126 * (attention + mlp + 2 * 16384) + 2 * 128256 * 16384 + 16384)
    with pytest.raises(InvalidValue, match=f"weights take {size / GIB:.1f} GiB"):
        build(settings(tmp_path, num_blocks=0), lambda text: None)
