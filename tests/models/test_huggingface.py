"""config.json read and written: round trips, both spellings of rotary positions, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rooflight.errors import InvalidValue
from rooflight.models.config import Rope
from rooflight.models.huggingface import FAMILIES, config_from_hf, config_to_hf, load_config
from tests.models.families import CASES

LLAMA = CASES["llama3"].config()


def test_every_family_has_a_case() -> None:
    assert {case.model_type for case in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str) -> None:
    config = config_from_hf(CASES[name].config())
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize("name", CASES)
def test_spelling_of_transformers_5(name: str) -> None:
    """`rope_parameters`, for Gemma 3 nested by layer type, and every default of the class written out."""
    written = AutoConfig.for_model(**CASES[name].config()).to_dict()
    # gpt2 has no rotary positions
    assert CASES[name].model_type == "gpt2" or "rope_parameters" in written
    assert config_from_hf(written) == config_from_hf(CASES[name].config())


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_written(name: str) -> None:
    """Every setting that makes a difference survives the way through our config and back into theirs."""
    theirs = AutoConfig.for_model(**CASES[name].config()).to_dict()
    back = AutoConfig.for_model(**config_to_hf(config_from_hf(CASES[name].config()))).to_dict()
    assert config_from_hf(back) == config_from_hf(theirs)
    for key in ("vocab_size", "hidden_size", "rope_parameters", "layer_types", "sliding_window", "tie_word_embeddings"):
        if key == "rope_parameters" and key in theirs:
            assert _rope(theirs[key]) == _rope(back[key])
        elif key == "layer_types" or theirs.get(key) is None:
            continue
        else:
            assert back.get(key) == theirs[key], key


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing: values at their defaults."""
    if "full_attention" in parameters:
        return {key: _rope(value) for key, value in parameters.items()}
    silent = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}
    return {key: value for key, value in parameters.items() if key != "type" and silent.get(key) != value}


def test_multimodal_gemma3_gives_its_text_part() -> None:
    text = {key: value for key, value in CASES["gemma3"].config().items() if key != "model_type"}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}}
    assert config_from_hf(whole) == config_from_hf(CASES["gemma3"].config())
    # The published 4B names only what differs from the class.
    sparse = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = config_from_hf({"model_type": "gemma3", "text_config": sparse})
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert [kind.window for kind in config.layers[:6]] == [1024] * 5 + [0]
    assert config.layers[5].rope == Rope(1e6, 256, kind="linear", factor=8.0)
    assert config.layers[0].rope == Rope(1e4, 256)


def test_old_name_of_longrope() -> None:
    old = CASES["phi3-longrope"].config()
    scaling = {key: value for key, value in old["rope_scaling"].items() if key != "rope_type"}
    assert config_from_hf({**old, "rope_scaling": {**scaling, "type": "su"}}) == config_from_hf(old)


def test_qwen_window_begins_at_max_window_layers() -> None:
    windows = [kind.window for kind in config_from_hf(CASES["qwen2"].config()).layers]
    assert windows == [0, 0, 5, 5]
    off = {**CASES["qwen2"].config(), "use_sliding_window": False}
    assert not any(kind.window for kind in config_from_hf(off).layers)


def test_sparse_layers() -> None:
    def sparse(name: str) -> list[bool]:
        return [kind.sparse for kind in config_from_hf(CASES[name].config()).layers]

    assert sparse("qwen3_moe") == [True, False, True, True]
    assert sparse("qwen3_moe-sparse-step") == [False, True, False, True]
    assert sparse("deepseek_v3") == [False, True, True, True]


def test_what_a_file_cannot_hold_is_not_written() -> None:
    config = config_from_hf(CASES["mistral"].config())
    first, *rest = config.layers
    with pytest.raises(InvalidValue, match="one window for all layers"):
        config_to_hf(replace(config, layers=(replace(first, window=0), *rest)))
    with pytest.raises(InvalidValue, match="one kind of rotary positions"):
        config_to_hf(replace(config, layers=(replace(first, rope=None), *rest)))
    config = config_from_hf(CASES["gemma2"].config())
    first, *rest = config.layers
    with pytest.raises(InvalidValue, match=r"the model has \[3, 6\]"):
        config_to_hf(replace(config, layers=(replace(first, window=3), *rest)))
    with pytest.raises(InvalidValue, match=r"'bert' has no config.json.* gpt2"):
        config_to_hf(replace(config, family="bert"))


def test_published_quantization_is_no_part_of_the_model() -> None:
    assert config_from_hf({**LLAMA, "quantization_config": {"quant_method": "fp8"}}) == config_from_hf(LLAMA)


def without(key: str, data: dict[str, Any] = LLAMA) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != key}


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (without("hidden_size"), ["'hidden_size' is missing", "positive integer"]),
        (without("model_type"), ["'model_type' is missing", "llama", "deepseek_v3"]),
        ({**LLAMA, "model_type": "bert"}, ["'bert'", "gpt2", "deepseek_v3"]),
        ({**LLAMA, "hidden_size": "4096"}, ["hidden_size is '4096'", "positive integer"]),
        ({**LLAMA, "hidden_size": 32.5}, ["hidden_size is 32.5"]),
        ({**LLAMA, "hidden_size": True}, ["hidden_size is True"]),
        ({**LLAMA, "num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({**LLAMA, "num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "at most 10000"]),
        ({**LLAMA, "num_attention_heads": -4}, ["num_attention_heads is -4"]),
        ({**LLAMA, "num_key_value_heads": 3}, ["3 key heads", "4 query heads", "1, 2, 4"]),
        ({**without("head_dim"), "num_attention_heads": 5}, ["5 attention heads", "hidden size 32"]),
        ({**LLAMA, "rms_norm_eps": "1e-5"}, ["rms_norm_eps is '1e-5'", "finite number"]),
        ({**LLAMA, "rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        ({**LLAMA, "tie_word_embeddings": "no"}, ["tie_word_embeddings is 'no'", "true or false"]),
        ({**LLAMA, "hidden_act": "mish"}, ["hidden_act is 'mish'", "silu"]),
        ({**LLAMA, "torch_dtype": "int3"}, ["torch_dtype is 'int3'", "bfloat16"]),
        ({**LLAMA, "rope_scaling": 8}, ["rope_scaling is 8", "JSON object"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "dynamic"}}, ["rope_scaling.rope_type is 'dynamic'", "yarn"]),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3"}}, ["'rope_scaling.factor' is missing"]),
        ({**CASES["phi3-longrope"].config(), "partial_rotary_factor": 1.0}, ["short_factor", "list of 4 numbers"]),
        ({**CASES["gemma2"].config(), "layer_types": ["full"] * 4}, ["layer_types", "4 entries"]),
        ({**CASES["gemma2"].config(), "layer_types": ["full_attention"]}, ["layer_types", "4 entries"]),
        ({**CASES["qwen3_moe"].config(), "mlp_only_layers": [9]}, ["mlp_only_layers is [9]", "0 to 3"]),
        ({**CASES["mixtral"].config(), "num_experts_per_tok": 7}, ["7 experts a token", "6 there are"]),
        ({**CASES["gpt_oss"].config(), "swiglu_limit": 9.0}, ["swiglu_limit is 9.0", "7.0"]),
        ({**CASES["gpt2"].config(), "scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse", "false"]),
        ({**CASES["deepseek_v2"].config(), "norm_topk_prob": True}, ["norm_topk_prob is True", "false"]),
        ({**CASES["deepseek_v3"].config(), "scoring_func": "softmax"}, ["scoring_func", "sigmoid"]),
        (without("kv_lora_rank", CASES["deepseek_v3"].config()), ["'kv_lora_rank' is missing"]),
        (["not", "a", "mapping"], ["list", "JSON object"]),
    ],
)
def test_refusals_name_file_key_and_what_is_allowed(data: Any, parts: list[str]) -> None:
    with pytest.raises(InvalidValue) as caught:
        config_from_hf(data, "some/config.json")
    text = str(caught.value)
    assert text.startswith("some/config.json: ")
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (json.dumps(LLAMA)[:50].encode(), "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"\xff\xfe\x00\x81", "not a text file"),
    ],
)
def test_corrupt_files(content: bytes, part: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InvalidValue) as caught:
        load_config(tmp_path)
    assert str(file) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_name_of_the_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"cannot be read .*No such file"):
        load_config(tmp_path)
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert load_config(folder).name == load_config(folder / "config.json").name == "my-model"
