"""The shipped configs against transformers and the published sizes, and how a name is resolved."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rooflight.errors import InvalidValue
from rooflight.models import presets
from rooflight.models.config import ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.models.huggingface import config_from_hf, config_to_hf
from rooflight.models.transformer import Transformer

# As the publishers state them, on model cards and in the headers of their weights.
PUBLISHED = {
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "gpt-2": 124_439_808,
    "gpt-2-xl": 1_557_611_200,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "phi-3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
}
# Billions, as model cards round them.
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39.2,
    "qwen3-30b-a3b": 3.35,
    "qwen3-235b-a22b": 22.2,
    "deepseek-v3": 37.6,
    "llama-3.1-8b": 8.03,
}
# A port where nothing listens.
UNREACHABLE = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"


@pytest.mark.parametrize("name", presets.names())
def test_counts_equal_transformers(name: str) -> None:
    raw = {k: v for k, v in presets.raw(name).items() if k not in ("_source", "quantization_config", "auto_map")}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    counts = parameter_counts(presets.preset(name))
    assert counts["total"] == sum(p.numel() for p in theirs.parameters())
    assert counts["total"] == PUBLISHED.get(name, counts["total"])
    positions = theirs.transformer.wpe.weight.numel() if raw["model_type"] == "gpt2" else 0
    assert counts["embedding"] == theirs.get_input_embeddings().weight.numel() + positions


@pytest.mark.parametrize(("name", "billions"), ACTIVE.items())
def test_active_parameters(name: str, billions: float) -> None:
    assert parameter_counts(presets.preset(name))["active"] / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "gpt-oss-20b", "gemma-2-2b", "gpt-2"])
def test_counting_folded_layers_is_counting_all(name: str) -> None:
    config = presets.preset(name)
    with torch.device("meta"):
        whole = Transformer(config)
    assert parameter_counts(config)["total"] == sum(p.numel() for p in whole.parameters())


def test_counting_the_largest_is_quick() -> None:
    config = presets.preset("llama-3.1-405b")
    parameter_counts(config)
    start = time.perf_counter()
    parameter_counts(config)
    assert time.perf_counter() - start < 0.5


def test_presets_are_named_sourced_and_round_trip() -> None:
    configs = presets.presets()
    assert len(configs) >= 35
    assert "tiny" in configs
    assert PUBLISHED.keys() <= configs.keys()
    for name, config in configs.items():
        assert config.name == name
        assert name == name.lower()
        assert len(presets.raw(name)["_source"]) > 20
        assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config_from_hf(presets.raw(name))


def test_aliases_lead_to_presets() -> None:
    assert set(presets.ALIASES.values()) <= set(presets.names())
    assert all(alias == alias.lower() for alias in presets.ALIASES)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-405B-Instruct", "llama-3.1-405b"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("gpt2", "gpt-2"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
    ],
)
def test_resolve_names_and_hub_ids_without_network(model: str, name: str, no_hub: None) -> None:
    assert presets.resolve(model) == (name, presets.preset(name))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)


def test_a_path_goes_before_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    other = {**presets.raw("tiny"), "num_hidden_layers": 5}
    (folder / "config.json").write_text(json.dumps(other))
    monkeypatch.chdir(tmp_path)
    for model in ("tiny", "tiny/config.json", str(folder)):
        name, config = presets.resolve(model)
        assert name == "tiny"
        assert len(config.layers) == 5


def test_one_preset_reads_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = presets.read_json

    def counted(path: Path) -> dict[str, Any]:
        read.append(path)
        return original(path)

    monkeypatch.setattr(presets, "read_json", counted)
    presets.raw.cache_clear()
    presets.preset.cache_clear()
    assert isinstance(presets.resolve("qwen3-8b")[1], ModelConfig)
    assert [path.name for path in read] == ["qwen3-8b.json"]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("llama-3.1-9b", ["'llama-3.1-9b' is unknown", "llama-3.1-8b", "--list"]),
        ("qwen3-8", ["qwen3-8b"]),
        ("zzzzzz", ["'zzzzzz' is unknown", "--list"]),
        ("", ["'' is unknown"]),
        ("a/b/c", ["'a/b/c' is unknown"]),
        ("no/such/config.json", ["no such file"]),
        ("./nothing-here", ["no such file"]),
        ("bad owner!/na me", ["is unknown"]),
        ("x" * 5000, ["is unknown"]),
    ],
)
def test_unknown_names(model: str, parts: list[str]) -> None:
    with pytest.raises(InvalidValue) as caught:
        presets.resolve(model)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", UNREACHABLE)
    start = time.perf_counter()
    with pytest.raises(InvalidValue, match=r"model nobody/nothing: .*cannot be reached.*--list") as caught:
        presets.resolve("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 10


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on this machine that has one model, Somebody/Something, and answers like the real one."""
    body = json.dumps(presets.raw("tiny")).encode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, with_body: bool) -> None:
            found = self.path.startswith("/Somebody/Something/")
            self.send_response(200 if found else 404)
            if not found:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"abc"')
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.end_headers()
            if with_body and found:
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield address
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, config = presets.resolve("Somebody/Something")
    assert name == config.name == "Somebody/Something"
    assert config.width == presets.preset("tiny").width
    # Once fetched, it is there without a network.
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", UNREACHABLE)
    assert presets.resolve("Somebody/Something")[1] == config


def test_a_model_that_the_hub_does_not_have(hub: str) -> None:
    with pytest.raises(InvalidValue, match=r"model Nobody/Nothing: .* does not give its config.json") as caught:
        presets.resolve("Nobody/Nothing")
    assert "\n" not in str(caught.value)
