"""What is found of a model before its weights are read, and what is told, in one line, when it is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rooflight.errors import RooflightError
from rooflight.models.layout import Layout
from rooflight.models.tokenizer import Tokenizer
from rooflight.models.transformer import Transformer
from rooflight.serve import load
from rooflight.serve.settings import EngineSettings
from tests.serve.checkpoints import CONTEXT, VOCAB, checkpoint, tokenizer

TOKENS = [5, 17, 300, 42, 9, 351, 0, 77]


def find(model: Path | str, **settings: Any) -> load.Source:
    return load.find(EngineSettings(model=str(model), device="cpu", **settings))


def weights(source: load.Source, **settings: Any) -> Transformer:
    return load.weights(source, EngineSettings(model=source.name, device="cpu", **settings), lambda text: None)


def logits(model: Transformer) -> torch.Tensor:
    count = len(TOKENS)
    with torch.inference_mode():
        return model(torch.tensor(TOKENS), torch.arange(count), Layout((1, count)))


def refused(words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(RooflightError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def test_a_directory(directory: Path) -> None:
    source = find(directory)
    assert (source.directory, source.name, source.dtype) == (directory, str(directory), "fp32")
    assert (source.max_model_len, source.config.vocab_size) == (CONTEXT, VOCAB)
    assert source.tokenizer is not None and source.tokenizer.vocab_size == tokenizer().vocab_size < VOCAB
    assert source.eos_ids == {tokenizer().eos_id}
    assert "chat_template.jinja" in source.tokenizer.carried
    assert not source.defaults
    assert find(directory, max_model_len=50).max_model_len == 50


@pytest.mark.parametrize("shard", [1 << 30, 20_000])
def test_weights_are_those_that_transformers_reads(tmp_path: Path, shard: int) -> None:
    directory = checkpoint(tmp_path / "model", max_shard_bytes=shard)
    assert len(list(directory.glob("*.safetensors"))) == (1 if shard > 1e6 else 6)
    model = weights(find(directory))
    assert not model.training and not any(each.requires_grad for each in model.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(torch.tensor([TOKENS])).logits[0], atol=1e-4, rtol=1e-4)


def test_types_of_weights(tmp_path: Path) -> None:
    for named, asked, dtype in (
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "fp32", torch.float32),
        ("float16", "auto", torch.float16),
        ("float32", "bf16", torch.bfloat16),
    ):
        directory = checkpoint(tmp_path / f"{named}-{asked}")
        config = json.loads((directory / "config.json").read_text()) | {"torch_dtype": named}
        (directory / "config.json").write_text(json.dumps(config))
        model = weights(find(directory, dtype=asked))
        assert {each.dtype for each in model.parameters()} == {dtype}


def test_random_weights(directory: Path) -> None:
    """Of a preset, a config.json or a directory, whose own weights are not read; of a seed always the same."""
    (directory / "model.safetensors").unlink()
    for model in ("tiny", directory / "config.json", directory):
        source = find(model, load_format="dummy")
        first, again, other = (weights(source, load_format="dummy", seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.embedding.weight, again.embedding.weight)
        assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert find(directory, load_format="dummy").tokenizer is not None
    assert find(directory / "config.json", load_format="dummy").tokenizer is None
    # A vocabulary of 256 is bytes.
    assert find("tiny", load_format="dummy").tokenizer is not None


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, 5, {0, 7, 9}),
        ({"eos_token_id": 7}, 5, {0, 7}),
        ({"eos_token_id": 0}, 5, {0}),
        ({"eos_token_id": None}, 5, {0, 5}),
        ({}, [5, 6], {0, 5, 6}),
        (None, 5, {0, 5}),
        (None, None, {0}),
    ],
)
def test_ends_of_text(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    """Those of generation_config.json, else of config.json; the tokenizer's own, 0, always."""
    directory = checkpoint(tmp_path / "model", generation=generation)
    data = json.loads((directory / "config.json").read_text()) | {"eos_token_id": config}
    (directory / "config.json").write_text(json.dumps(data))
    assert find(directory).eos_ids == expected


def test_recommended_sampling(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": None, "do_sample": True, "bos_token_id": 1}
    directory = checkpoint(tmp_path / "model", generation=given)
    assert find(directory).defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}


def cut(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: len(data) // 2])

    return spoil


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / name).write_text(text)

    return spoil


def change(**keys: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        data = json.loads((directory / "config.json").read_text()) | keys
        (directory / "config.json").write_text(json.dumps(data))

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "config.json: cannot be read"),
    "half a config": (cut("config.json"), "config.json: is not valid JSON"),
    "a list as config": (write("config.json", "[1]"), "config.json: holds [1]"),
    "an unknown family": (change(model_type="mamba"), "mamba"),
    "a missing size": (change(hidden_size=None), "hidden_size"),
    "half a tokenizer": (cut("tokenizer.json"), "tokenizer.json: is no tokenizer.json"),
    "a foreign tokenizer": (write("tokenizer.json", "{}"), "tokenizer.json: is no tokenizer.json"),
    "half a generation config": (write("generation_config.json", '{"eos_'), "generation_config.json: is not valid"),
    "a list as generation config": (write("generation_config.json", "[]"), "generation_config.json: holds []"),
    "a vocabulary below the tokenizer's": (
        change(vocab_size=300),
        f"the tokenizer has {tokenizer().vocab_size} tokens",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_is_known_before_weights_are_read(directory: Path, name: str) -> None:
    spoil, words = SPOILED[name]
    spoil(directory)
    refused(words, lambda: find(directory))


WEIGHTLESS: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (without("model-00002-of-00006.safetensors"), "the shard model-00002-of-00006.safetensors"),
    "half": (cut("model-00002-of-00006.safetensors"), "is truncated or corrupt, fetch it again"),
    "half an index": (cut("model.safetensors.index.json"), "index.json: is not valid JSON"),
    "no index": (without("model.safetensors.index.json"), "holds no weights"),
    "other sizes": (change(intermediate_size=64), "the llama config asks for"),
    "more layers": (change(num_hidden_layers=3), "is missing from the checkpoint"),
    "fewer layers": (change(num_hidden_layers=1), "is in the checkpoint, not in the model"),
}


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_weights_that_are_not_the_models(tmp_path: Path, name: str) -> None:
    spoil, words = WEIGHTLESS[name]
    directory = checkpoint(tmp_path / "model", max_shard_bytes=20_000)
    spoil(directory)
    source = find(directory)
    refused(words, lambda: weights(source))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("tiny", "'tiny' is a preset without weights; give a checkpoint directory or a hub id, or add --load-format"),
        ("qwen3-0.6", "did you mean qwen3-0.6b"),
        ("no such thing", "'no such thing' is unknown"),
        ("a/b/c", "'a/b/c' is unknown"),
        ("/no/such/folder", "there is no such file or directory"),
        ("./nothing", "there is no such file or directory"),
        ("../nothing", "there is no such file or directory"),
        ("~nobody-at-all/x", "there is no such file or directory"),
        ("nothing.json", "there is no such file or directory"),
        ("own er/x", "neither a directory here nor a hub id"),
        ("x" * 5000, "is unknown"),
        ("a\0b", "is unknown"),
        ("", "no model given"),
    ],
)
def test_models_that_are_not_there(model: str, words: str) -> None:
    refused(words, lambda: find(model))


def test_a_file_is_no_checkpoint(directory: Path) -> None:
    refused("is a file; give its directory, or add --load-format dummy", lambda: find(directory / "config.json"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that cannot be reached, and its cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_the_hub_that_cannot_be_reached(offline: Path) -> None:
    refused(
        "model some/model: no such directory, and the Hugging Face hub does not give it", lambda: find("some/model")
    )


def test_the_hubs_cache_serves_without_it(offline: Path) -> None:
    folder = offline / "models--some--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    checkpoint(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    source = find("some/model")
    assert (source.name, source.directory) == ("some/model", folder / "snapshots" / commit)
    assert weights(source).config.vocab_size == VOCAB


def test_settings_that_contradict_the_model(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        f"--max-model-len {CONTEXT + 1} is beyond the model's {CONTEXT} positions; use 1 to {CONTEXT}",
        lambda: find(directory, max_model_len=CONTEXT + 1),
    )
    refused("--tokenizer /nowhere", lambda: find(directory, tokenizer="/nowhere"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("--device cuda", lambda: load.find(EngineSettings(model=str(directory), device="cuda")))


def test_a_tokenizer_of_another_place(directory: Path, tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path / "bytes")
    source = find(directory, tokenizer=str(tmp_path / "bytes"))
    assert source.tokenizer is not None and source.tokenizer.vocab_size == 256
    assert source.eos_ids == {255}
    Tokenizer.train(["aa bb cc dd ee" * 9], 300).save(tmp_path / "large")
    large = Tokenizer.load(tmp_path / "large").vocab_size
    refused(
        f"the tokenizer has {large} tokens, tiny a vocabulary of 256",
        lambda: find("tiny", load_format="dummy", tokenizer=str(tmp_path / "large")),
    )


def test_a_checkpoint_without_a_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    source = find(directory)
    assert source.tokenizer is None and not source.eos_ids
