"""`rooflight train` from the command line: where settings come from, the dry report, bad input in one line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from rooflight.cli import main

TINY = ("--model", "tiny", "--context", "32", "--batch-size", "4")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad command says."""
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["train", *arguments, "--print-config"]) == 0
    tables = tomllib.loads(capsys.readouterr().out)
    return {key: value for table in tables.values() for key, value in table.items()}


def test_flags_come_before_the_file_and_the_file_before_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('lr = 1e-3\ntokens = "2M"\n[optimizer]\nweight-decay = 0\nbeta2 = 0.99\n')
    found = printed(capsys, "--config", str(file), "--lr", "5e-4", "--data", "a", "b")
    assert (found["lr"], found["tokens"], found["weight_decay"], found["beta2"]) == (5e-4, 2_000_000, 0.0, 0.99)
    assert (found["data"], found["beta1"]) == (["a", "b"], 0.9)


def test_what_print_config_prints_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--sample-prompt", 'a "b" \\n', "--print-config"]) == 0
    file = tmp_path / "run.toml"
    file.write_text(capsys.readouterr().out)
    assert printed(capsys, "--config", str(file)) == printed(capsys, *TINY, "--sample-prompt", 'a "b" \\n')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no --out",)),
        (("--out", "x", "--model", "tiny", "--steps", "1"), ("no --data",)),
        (("--out", "x", "--data", "y", "--steps", "1"), ("no --model",)),
        (("--out", "x", *TINY, "--data", "y"), ("--steps", "--tokens")),
        (("--steps", "ten"), ("--steps 'ten'", "whole number")),
        (("--tokens", "1.5"), ("--tokens '1.5'", "whole number")),
        (("--lr", "nan"), ("--lr 'nan'", "finite")),
        (("--lr", "0"), ("--lr 0.0", "more than 0")),
        (("--beta1", "1"), ("--beta1 1.0", "less than 1")),
        (("--steps", "3", "--tokens", "5"), ("--steps 3", "--tokens 5")),
        (("--optimizer", "adam"), ("--optimizer 'adam'", "adamw", "muon")),
        (("--batch-size", "6", "--micro-batch-size", "4"), ("--micro-batch-size 4", "1, 2, 3, 6")),
        (("--rounding", "stochastic"), ("--no-master-weights",)),
        (("--activation-gib", "2"), ("--activation-gib 2.0", "selective")),
        (("--usd-per-hour", "3", "--out", "x"), ("--usd-per-hour", "--dry")),
        (("--config", "absent.toml"), ("absent.toml",)),
        (("--dry", "--model", "tiny", "--context", "9999"), ("--context 9999", "256")),
        (("--dry", "--model", "tinny"), ("tinny", "tiny")),
        (("--dry", "--model", "tiny", "--on", "h2000"), ("h2000", "h200")),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = fails(capsys, *arguments)
    for word in words:
        assert word in said


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, word in (("lr = [", "not TOML"), ("learning-rate = 1", "learning-rate"), ("keep = true", "keep")):
        (tmp_path / "bad.toml").write_text(text)
        assert word in fails(capsys, "--config", str(tmp_path / "bad.toml"))
    binary = tmp_path / "weights.bin"
    binary.write_bytes(bytes(range(256)) * 4)
    out = str(tmp_path / "out")
    assert "none.txt" in fails(capsys, *TINY, "--steps", "1", "--out", out, "--data", str(tmp_path / "none.txt"))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "tokens" in fails(capsys, *TINY, "--steps", "1", "--out", out, "--data", str(short), "--tokenizer", "bytes")


def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "text.txt"
    data.write_text("words " * 100)
    out = tmp_path / "out"
    said = fails(
        capsys,
        *("--model", "llama-3.1-405b", "--batch-size", "1", "--context", "128", "--steps", "1", "--device", "cpu"),
        *("--data", str(data), "--out", str(out)),
    )
    assert "does not fit" in said
    assert not (out / "data").exists()


def test_dry_says_time_memory_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    run = ("train", *TINY, "--tokens", "1M", "--dry", "--on", "h200", "--usd-per-hour", "3")
    assert main([*run, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["expected_seconds"] > found["totals"]["roof_seconds"] > 0
    assert found["memory"]["total"] > 0
    assert main(list(run)) == 0
    told = capsys.readouterr().out
    assert "tokens a day" in told and "GPU-hours" in told and "$" in told


def test_activations_within_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """Dropping by FLOPs a byte: less memory, more time, and never more than the budget."""

    def peak(*more: str) -> tuple[float, float]:
        assert main(["train", "--model", "train-152m", "--batch-size", "8", "--dry", "-o", "json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["memory"]["activations_peak"] / 2**30, found["totals"]["roof_seconds"]

    plain, plain_seconds = peak()
    budget = round(plain * 0.6, 2)
    less, seconds = peak("--recompute", "selective", "--activation-gib", str(budget))
    assert less <= budget < plain
    assert seconds > plain_seconds
    said = fails(
        capsys,
        *("--model", "train-152m", "--batch-size", "8", "--dry"),
        *("--recompute", "selective", "--activation-gib", "0.001"),
    )
    assert "cannot be met" in said
