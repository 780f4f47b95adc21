"""Bad input: one line on stderr that names the value and what to do, exit code 2, nothing on stdout, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rooflight.cli import main
from rooflight.hardware.store import dumps
from tests.workload.machines import CPU

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
FACTORIES = """
import numpy
import torch
from torch import nn


def number():
    return 42


def three():
    return nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1)


def raising():
    raise RuntimeError("no such weights here")


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


class Leaves(nn.Module):
    def forward(self, x):
        return torch.from_numpy(numpy.asarray(x) + 1)


class Wrong(nn.Module):
    def forward(self, x):
        return x @ torch.zeros(7, 7)


def item():
    return Branches(), (torch.zeros(3),)


def leaves():
    return Leaves(), (torch.zeros(3),)


def wrong():
    return Wrong(), (torch.zeros(3, 5),)


def frozen():
    return nn.Linear(3, 3).requires_grad_(False), (torch.zeros(1, 3),)


def fine():
    return nn.Linear(3, 3), (torch.zeros(1, 3),)


not_a_function = 7
"""


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cache of this machine's probe, no hub, and a directory of our own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on which a command line is refused."""
    assert main(["explain", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (text,) = err.splitlines()
    assert text.startswith("rooflight: ")
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["lama-3.1-8b"], ["'lama-3.1-8b'", "llama-3.1-8b", "--list"]),
        ([""], ["''", "--list"]),
        (["x" * 5000], ["--list"]),
        (["./nowhere"], ["./nowhere", "no such file"]),
        (["nowhere/config.json"], ["nowhere/config.json", "no such file"]),
        ([], ["MODEL", "--list"]),
        (["tiny", "--on", "h2000"], ["'h2000'", "h200"]),
        (["tiny", "--on", "missing.toml"], ["missing.toml", "h200"]),
        (["tiny", "--on", "here"], ["here", "rooflight probe"]),
        (["tiny", "--phase", "trian"], ["--phase", "'trian'", "prefill, decode, train", "did you mean train"]),
        (["tiny", "--dtype", "int3"], ["--dtype", "'int3'", "bf16"]),
        (["tiny", "--kv-cache-dtype", "fp4"], ["--kv-cache-dtype", "'fp4'", "fp8"]),
        (["tiny", "--attention", "flesh"], ["--attention", "'flesh'", "flash"]),
        (["tiny", "--recompute", "some"], ["--recompute", "'some'", "none, selective, full"]),
        (["tiny", "--optimizer", "adam"], ["--optimizer", "'adam'", "adamw"]),
        (["tiny", "--by", "colour"], ["--by", "'colour'", "component, layer, op, primitive"]),
        (["tiny", "-o", "xml"], ["-o", "'xml'", "table, json, csv, md, html"]),
        (["tiny", "--batch", "0"], ["--batch", "'0'", "from 1"]),
        (["tiny", "--batch", "-3"], ["--batch", "'-3'", "from 1"]),
        (["tiny", "--batch", "2.5"], ["--batch", "'2.5'", "whole number"]),
        (["tiny", "--batch", "99999999999999"], ["--batch", "'99999999999999'"]),
        (["tiny", "--context", "many"], ["--context", "'many'", "whole number"]),
        (["tiny", "--context", "0"], ["--context", "'0'"]),
        (["gpt-2", "--context", "1025"], ["1025", "1024"]),
        (["tiny", "--context"], ["--context", "--help"]),
        (["tiny", "--colour"], ["--colour", "--help"]),
        (["tiny", "--recompute", "full"], ["--recompute full", "prefill", "--phase train"]),
        (["tiny", "--optimizer", "sgd", "--phase", "decode"], ["--optimizer sgd", "decode", "--phase train"]),
        (["tiny", "--kv-cache-dtype", "fp8", "--phase", "train"], ["--kv-cache-dtype fp8", "prefill or decode"]),
        (["tiny", "-o", "json", "--out", "no/such/place.json"], ["no/such/place.json", "no/such"]),
        (["tiny", "--text", "missing.txt", "--measure", "--on", "h200"], ["missing.txt"]),
        (["tiny", "--text", "missing.txt"], ["--text", "--measure"]),
        # 810 GB of weights fit no machine that runs tests.
        (["llama-3.1-405b", "--measure", "--on", "h200"], ["llama-3.1-405b", "GiB"]),
        (["missing.py:make"], ["missing.py"]),
        (["no.such.module:make"], ["no.such.module"]),
    ],
)
def test_a_bad_value_is_named(argv: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, *argv)
    for word in named:
        assert word in text


@pytest.mark.parametrize("command", [["explian"], ["explian", "tiny"]])
def test_an_unknown_command_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert "explian" in text and "explain" in text


def write(content: Any, path: Path = Path("config.json")) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_the_config_that_the_tests_break_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    write(CONFIG, Path("model/config.json"))
    for name in ("model", "model/config.json"):
        assert main(["explain", name, "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["context"] == 128


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("not json at all", ["config.json"]),
        (json.dumps(CONFIG)[:-40], ["config.json"]),
        ("", ["config.json"]),
        ("[1, 2, 3]", ["config.json"]),
        ("\x00\x01\x02", ["config.json"]),
        ({**CONFIG, "model_type": "mamba"}, ["mamba", "llama"]),
        ({**CONFIG, "hidden_size": -32}, ["-32"]),
        ({**CONFIG, "hidden_size": "wide"}, ["wide"]),
        ({**CONFIG, "num_key_value_heads": 3}, ["3", "4"]),
        ({**CONFIG, "num_hidden_layers": 0}, ["0"]),
        *[
            ({k: v for k, v in CONFIG.items() if k != key}, [key])
            for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        ],
    ],
)
def test_a_bad_config_is_named(content: Any, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, write(content))
    for word in named:
        assert word in text


def test_a_config_that_is_not_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    assert "config.json" in refused(capsys, "config.json")


def test_a_directory_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    text = refused(capsys, "empty")
    assert "empty" in text and "config.json" in text


@pytest.mark.parametrize(
    ("factory", "phase", "named"),
    [
        ("missing", "prefill", ["'missing'", "fine"]),
        ("not_a_function", "prefill", ["not_a_function"]),
        ("number", "prefill", ["int", "(module, example_args)"]),
        ("three", "prefill", ["tuple", "(module, example_args)"]),
        ("raising", "prefill", ["RuntimeError", "no such weights here"]),
        ("item", "prefill", ["item"]),
        ("leaves", "prefill", ["numpy"]),
        ("wrong", "prefill", ["RuntimeError"]),
        ("frozen", "train", ["gradient", "prefill"]),
        ("fine", "decode", ["decode", "prefill"]),
    ],
)
def test_a_bad_factory_is_named(factory: str, phase: str, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(FACTORIES, encoding="utf-8")
    text = refused(capsys, f"mine.py:{factory}", "--phase", phase)
    for word in named:
        assert word in text


def test_the_file_of_factories_that_the_tests_break_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(FACTORIES, encoding="utf-8")
    assert main(["explain", "mine.py:fine", "-o", "json"]) == 0


@pytest.mark.parametrize("source", ["def make(:\n", "import nothing_of_that_name\n", "1 / 0\n"])
def test_a_factory_file_that_does_not_import(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text(source, encoding="utf-8")
    assert "broken.py" in refused(capsys, "broken.py:make")


MACHINE = dumps(CPU)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("this is = not [toml", ["machine.toml", "TOML"]),
        (MACHINE[: len(MACHINE) // 2], ["machine.toml"]),
        ("", ["machine.toml"]),
        (MACHINE.replace('kind = "cpu"', 'kind = "abacus"'), ["abacus", "cpu"]),
        (MACHINE.replace('"bandwidth" = { value = 1000000000000', '"bandwidth" = { value = -5'), ["bandwidth", "-5"]),
        ("colour = 3\n" + MACHINE, ["machine.toml", "colour"]),
    ],
)
def test_a_bad_machine_file_is_named(content: str, named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert content != MACHINE
    text = refused(capsys, "tiny", "--on", write(content, Path("machine.toml")))
    for word in named:
        assert word in text


def test_the_machine_file_that_the_tests_break_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tiny", "--on", write(MACHINE, Path("machine.toml")), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == CPU.name


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--budget", "0"], ["--budget", "'0'"]),
        (["--budget", "long"], ["--budget", "'long'"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cpu, cuda"]),
    ],
)
def test_bad_values_of_probe_are_named(argv: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *argv]) == 2
    (text,) = capsys.readouterr().err.splitlines()
    for word in named:
        assert word in text
