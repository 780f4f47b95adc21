"""Settings of the engine and the server: their rules, and their values from the environment."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.serve.settings import EngineSettings, ServerSettings, from_environment

BAD_ENGINE: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "no model given"),
    ({"dtype": "bf61"}, "--dtype 'bf61' is unknown; use one of auto, fp32, bf16, fp16; did you mean bf16?"),
    ({"block_size": 12}, "--block-size 12 is unknown; use one of 8, 16, 32, 64, 128"),
    ({"load_format": "x"}, "--load-format 'x' is unknown"),
    ({"max_model_len": -1}, "--max-model-len -1 is out of range; it must be at least 0"),
    ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization 0.0 is out of range; it must be more than 0.0"),
    ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization 1.1 is out of range; it must be at most 1.0"),
    ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization nan is out of range"),
    ({"cpu_kv_cache_gib": -0.5}, "--cpu-kv-cache-gib -0.5 is out of range"),
    ({"num_blocks": -1}, "--num-blocks -1 is out of range"),
    ({"max_num_seqs": -1}, "--max-num-seqs -1 is out of range"),
    ({"scheduling_policy": "lifo"}, "--scheduling-policy 'lifo' is unknown; use one of fcfs, priority"),
    ({"async_scheduling": "yes"}, "--async-scheduling 'yes' is unknown"),
    (
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512, "max_model_len": 4096},
        "--max-num-batched-tokens 512 is below --max-model-len 4096 without chunked prefill",
    ),
]
BAD_SERVER: list[tuple[dict[str, Any], str]] = [
    ({"port": 65536}, "--port 65536 is out of range; it must be at most 65535"),
    ({"port": -1}, "--port -1 is out of range"),
    ({"drain_seconds": -1.0}, "--drain-seconds -1.0 is out of range"),
    ({"max_body_mib": 0.0}, "--max-body-mib 0.0 is out of range; it must be more than 0.0"),
    ({"max_prompts": 0}, "--max-prompts 0 is out of range"),
    ({"max_n": 0}, "--max-n 0 is out of range"),
    ({"max_logprobs": 21}, "--max-logprobs 21 is out of range; it must be at most 20"),
    ({"max_queue": 0}, "--max-queue 0 is out of range"),
]
BAD_ENVIRONMENT = [
    ("MAX_NUM_SEQS", "many", "ROOFLIGHT_MAX_NUM_SEQS: --max-num-seqs 'many' is not a whole number"),
    ("MAX_NUM_SEQS", "1.5", "'1.5' is not a whole number"),
    ("MAX_NUM_SEQS", "", "'' is not a whole number"),
    ("GPU_MEMORY_UTILIZATION", "most", "ROOFLIGHT_GPU_MEMORY_UTILIZATION: --gpu-memory-utilization 'most'"),
    ("GPU_MEMORY_UTILIZATION", "inf", "'inf' is not a finite number"),
    ("ENFORCE_EAGER", "yes", "ROOFLIGHT_ENFORCE_EAGER 'yes' is unknown; use 1 or 0"),
    ("ENFORCE_EAGER", "", "ROOFLIGHT_ENFORCE_EAGER '' is unknown; use 1 or 0"),
]


@pytest.mark.parametrize(("values", "words"), BAD_ENGINE, ids=[words for _, words in BAD_ENGINE])
def test_a_bad_engine_setting_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue) as error:
        EngineSettings(**{"model": "m", **values}).check()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("values", "words"), BAD_SERVER, ids=[words for _, words in BAD_SERVER])
def test_a_bad_server_setting_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue) as error:
        ServerSettings(**values).check()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_given_is_valid() -> None:
    engine, server = EngineSettings(model="m"), ServerSettings()
    assert engine.check() is engine and server.check() is server
    # A budget below the longest context is no contradiction where prompts are cut, or where either is chosen later.
    EngineSettings(model="m", max_num_batched_tokens=512, max_model_len=4096).check()
    EngineSettings(model="m", enable_chunked_prefill=False, max_model_len=4096).check()
    EngineSettings(model="m", enable_chunked_prefill=False, max_num_batched_tokens=512).check()


def test_every_setting_has_help_and_a_group() -> None:
    for settings in (EngineSettings, ServerSettings):
        for entry in fields(settings):
            assert entry.metadata["help"] and entry.metadata["group"]


def test_the_environment_gives_what_a_flag_would() -> None:
    found = from_environment(
        EngineSettings,
        {
            "ROOFLIGHT_MODEL": "some/where",
            "ROOFLIGHT_MAX_NUM_BATCHED_TOKENS": "8K",
            "ROOFLIGHT_GPU_MEMORY_UTILIZATION": "0.5",
            "ROOFLIGHT_ENFORCE_EAGER": "1",
            "ROOFLIGHT_ENABLE_PREFIX_CACHING": "False",
            "ROOFLIGHT_PORT": "9",  # the server's
            "ROOFLIGHT_NOTHING": "x",
            "MAX_MODEL_LEN": "7",
            "rooflight_seed": "7",
        },
    )
    assert found == {
        "model": "some/where",
        "max_num_batched_tokens": 8000,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    EngineSettings(**found).check()
    assert from_environment(EngineSettings, {}) == {}


@pytest.mark.parametrize(
    ("text", "names"), [("a", ("a",)), ("a,b", ("a", "b")), (" a , b,", ("a", "b")), ("", ()), (",", ())]
)
def test_names_from_the_environment_are_divided_by_commas(text: str, names: tuple[str, ...]) -> None:
    assert from_environment(ServerSettings, {"ROOFLIGHT_SERVED_MODEL_NAME": text}) == {"served_model_name": names}


@pytest.mark.parametrize(("name", "text", "words"), BAD_ENVIRONMENT)
def test_a_bad_environment_value_names_its_variable(name: str, text: str, words: str) -> None:
    with pytest.raises(InvalidValue) as error:
        from_environment(EngineSettings, {"ROOFLIGHT_" + name: text})
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("ROOFLIGHT_" + name)


def test_the_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOFLIGHT_PORT", "0")
    assert from_environment(ServerSettings)["port"] == 0
    monkeypatch.setenv("ROOFLIGHT_PORT", "8123")
    assert from_environment(ServerSettings)["port"] == 8123
