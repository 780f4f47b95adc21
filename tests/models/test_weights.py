"""Checkpoints on disk: shards, ties, dtypes, foreign names, and every way in which they can be broken."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rooflight.errors import InvalidValue, RooflightError, WeightsMismatch
from rooflight.models import weights
from rooflight.models.naming import tensors
from rooflight.models.presets import preset
from rooflight.models.shards import INDEX, SINGLE
from rooflight.models.transformer import Transformer
from rooflight.models.weights import load, load_pretrained, save
from tests.models.families import checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Transformer, Path]:
    """The tiny preset with random weights, and its checkpoint in one file."""
    model = Transformer(preset("tiny")).initialize(seed=1, std=0.3)
    save(model, tmp_path / "tiny")
    return model, tmp_path / "tiny"


def empty() -> Transformer:
    with torch.device("meta"):
        return Transformer(preset("tiny"))


def same(a: Transformer, b: Transformer) -> bool:
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    held = load_file(folder / SINGLE)
    change(held)
    save_file(held, folder / SINGLE)


def test_save_and_load(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    back = load(empty(), folder, "cpu", torch.float32)
    assert same(model, back)
    assert back.head.weight is back.embedding.weight, "a tied head stays tied"
    assert same(model, load_pretrained(folder))


@pytest.mark.parametrize("limit", [1, 10_000, 1 << 40])
def test_shards_keep_to_their_size(limit: int, saved: tuple[Transformer, Path], tmp_path: Path) -> None:
    model, _ = saved
    files = save(model, tmp_path / "sharded", max_shard_bytes=limit)
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= limit
    assert (tmp_path / "sharded" / INDEX).exists() == (len(files) > 1)
    assert same(model, load(empty(), tmp_path / "sharded", "cpu", torch.float32))


def test_saving_again_in_one_file_leaves_no_stale_index(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    save(model, folder, max_shard_bytes=10_000)
    assert (folder / INDEX).exists()
    save(model.initialize(seed=2), folder)
    assert same(model, load(empty(), folder, "cpu", torch.float32))


def test_dtype_is_cast_and_frequencies_are_not(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    back = load(empty(), folder, "cpu", torch.bfloat16)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert torch.equal(back.norm.norm.weight, model.norm.norm.weight.bfloat16())
    wanted = Transformer(preset("tiny")).get_buffer("frequencies_0")
    for other in (back, model.to(torch.bfloat16), empty().to_empty(device="cpu")):
        assert torch.equal(other.get_buffer("frequencies_0"), wanted)


def test_config_says_the_dtype_that_was_stored(saved: tuple[Transformer, Path], tmp_path: Path) -> None:
    save(saved[0].to(torch.bfloat16), tmp_path / "half")
    assert load_pretrained(tmp_path / "half").config.dtype == "bfloat16"
    assert next(load_pretrained(tmp_path / "half").parameters()).dtype == torch.bfloat16


def test_one_tensor_is_held_at_a_time(saved: tuple[Transformer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, count = 0, 0
    original = weights.stream

    def watched(file: Path) -> Iterator[tuple[str, Tensor]]:
        nonlocal most, count
        for name, tensor in original(file):
            alive.add(tensor)
            most, count = max(most, len(alive)), count + 1
            yield name, tensor

    monkeypatch.setattr(weights, "stream", watched)
    load(empty(), saved[1], "cpu", torch.float32)
    assert count > 10
    assert most <= 2


def test_a_bias_on_the_choice_stays_fp32(tmp_path: Path) -> None:
    _, folder = checkpoint("deepseek_v3", tmp_path)
    model = load_pretrained(folder, dtype=torch.bfloat16)
    biases = [t for name, t in tensors(model).items() if name.endswith("choice_bias_X")]
    assert len(biases) == 3
    assert all(b.dtype == torch.float32 and b.abs().max() > 0 for b in biases)


def test_names_of_other_publications(tmp_path: Path) -> None:
    """GPT-2 as on the hub, Gemma 3 inside a multimodal model, a further-ahead layer of DeepSeek-V3."""

    def unprefixed(held: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.zeros(1)}
        return {name.removeprefix("transformer."): t for name, t in held.items()} | masks

    def multimodal(held: dict[str, Tensor]) -> dict[str, Tensor]:
        tower = {"vision_tower.vision_model.head.weight": torch.ones(3), "multi_modal_projector.x": torch.ones(2)}
        return {f"language_model.{name}": t for name, t in held.items()} | tower

    def further(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return held | {"model.layers.4.eh_proj.weight": torch.ones(3, 3)}

    def frequencies(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    cases = {"gpt2": unprefixed, "gemma3": multimodal, "deepseek_v3": further, "llama2": frequencies}
    for name, rename in cases.items():
        _, folder = checkpoint(name, tmp_path / name)
        plain = load_pretrained(folder, dtype=torch.float32)
        save_file(rename(load_file(folder / SINGLE)), folder / SINGLE)
        assert same(plain, load_pretrained(folder, dtype=torch.float32)), name


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda held: held.pop(name))


def put(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda held: held.update({name: torch.zeros(shape)}))


def cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])


def garbage(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"\x07" * 400)


def vanish(folder: Path) -> None:
    (folder / SINGLE).unlink()


def bad_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}}))


def lost_shard(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00007-of-00009.safetensors"}}))


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "parts"),
    [
        (drop(K_PROJ), WeightsMismatch, [K_PROJ, "missing"]),
        (put("model.layers.1.mlp.gate.weight", 4, 64), WeightsMismatch, ["mlp.gate.weight", "not in the model"]),
        (put("model.layers.9.mlp.up_proj.weight", 4, 64), WeightsMismatch, ["layers.9", "not in the model"]),
        (put(K_PROJ, 64, 64), WeightsMismatch, [K_PROJ, "[64, 64]", "[32, 64]"]),
        (put(K_PROJ, 64, 32), WeightsMismatch, [K_PROJ, "[64, 32]", "[32, 64]"]),
        (put(f"{K_PROJ}_scale_inv", 1, 1), WeightsMismatch, ["quantized", "bfloat16"]),
        (cut, InvalidValue, [SINGLE, "truncated or corrupt"]),
        (garbage, InvalidValue, [SINGLE, "truncated or corrupt"]),
        (vanish, InvalidValue, ["holds no weights", SINGLE]),
        (bad_index, InvalidValue, [INDEX, "weight_map"]),
        (lost_shard, WeightsMismatch, ["model-00007-of-00009.safetensors", "missing"]),
    ],
)
def test_broken_checkpoints_are_refused_in_one_line(
    damage: Callable[[Path], None], error: type[RooflightError], parts: list[str], saved: tuple[Transformer, Path]
) -> None:
    _, folder = saved
    damage(folder)
    model = empty()
    with pytest.raises(error) as caught:
        load(model, folder, "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert all(p.is_meta for p in model.parameters()), "nothing is allocated before the checkpoint has been checked"


def test_a_shard_must_have_room(saved: tuple[Transformer, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="max_shard_bytes is 0"):
        save(saved[0], tmp_path, max_shard_bytes=0)
