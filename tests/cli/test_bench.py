"""`rooflight bench` from the command line: its flags, its formats, bad input in one line."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from rooflight.cli import bench, main

DRY = ("--model", "tiny", "--dry", "--on", "h200", "--num-blocks", "1024", "--seed", "3")
SHORT = ("--num-prompts", "5", "--input-len", "8:16", "--output-len", "4")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(import_module("rooflight.cli.main").COMMANDS, "bench", bench)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad command says."""
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


def test_serve_dry(capsys: pytest.CaptureFixture[str]) -> None:
    run = ("bench", "serve", *DRY, *SHORT, "--request-rate", "2", "--goodput", "ttft:200", "tpot:50")
    assert main([*run, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert (found["completed"], found["total_output_tokens"]) == (5, 20)
    assert 40 <= found["total_input_tokens"] <= 80
    assert found["duration"] >= 5 / 2
    assert found["request_goodput"] == pytest.approx(5 / found["duration"])
    assert 0 < found["share_of_roof"]["mean_tpot_ms"] <= 1
    assert main(list(run)) == 0
    told = capsys.readouterr().out
    assert "Time to first token" in told and "of the roof" in told and "H200" in told and "2 a second" in told
    assert main([*run, "-o", "md"]) == 0
    assert "| Goodput |" in capsys.readouterr().out


def test_figures_to_tell_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9")
    assert main(["bench", "serve", *DRY, *SHORT, *chosen, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert {"p50_ttft_ms", "p99.9_ttft_ms", "p99.9_e2el_ms"} <= set(found)
    assert not any("itl" in key or "tpot" in key for key in found)


def test_throughput_and_latency_dry(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert main(["bench", "throughput", *DRY, *SHORT, "--result", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "Output tokens" in out and str(file) in err
    kept = json.loads(file.read_text())
    assert [each["output_tokens"] for each in kept["runs"][0]["requests"]] == [4] * 5
    assert "prefix cache off" in kept["facts"]
    assert main(["bench", "throughput", *DRY, *SHORT, "--enable-prefix-caching"]) == 0
    assert "prefix cache on" in capsys.readouterr().out
    batch = ("--batch-size", "2", "--input-len", "9", "--output-len", "3")
    assert main(["bench", "latency", *DRY, *batch, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert found["mean_latency_ms"] == pytest.approx(found["mean_ttft_ms"] + 2 * found["mean_tpot_ms"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("BENCHMARK",)),
        (("server",), ("server",)),
        (("serve", *DRY, "--compare"), ("--dry", "--compare")),
        (("serve", *DRY, "--base-url", "http://127.0.0.1:9"), ("--dry sends nothing",)),
        (("serve", *DRY, "--request-rate", "-1"), ("--request-rate '-1'",)),
        (("serve", *DRY, "--goodput", "tbt:3"), ("tbt:3", "ttft")),
        (("serve", *DRY, "-o", "html"), ("'html'", "table", "json", "md")),
        (("serve", *DRY, "--result", "nowhere/x.json"), ("nowhere",)),
        (("serve", *DRY, "--dataset-name", "sharegpt"), ("--dataset-path",)),
        (("serve", "--model", "tinny", "--dry"), ("tinny", "tiny")),
        (("serve", "--model", "tiny", "--dry", "--on", "h2000"), ("h2000", "h200")),
        (("serve", "--dry"), ("no model",)),
        (("throughput", *DRY, "--request-rate", "2"), ("--request-rate",)),
        (("throughput", *DRY, "--num-prompts", "ten"), ("--num-prompts 'ten'",)),
        (("throughput", *DRY, "--input-len", "9:3"), ("use 3:9",)),
        (("throughput", *DRY, "--max-model-len", "9999"), ("--max-model-len 9999", "256")),
        (("latency", *DRY, "--batch-size", "0"), ("--batch-size 0", "at least 1")),
        (("throughput", "--model", "tiny", "--device", "cpu"), ("--load-format dummy",)),
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


def test_the_environment_sets_what_flags_leave_open(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOFLIGHT_MAX_NUM_SEQS", "17")
    assert main(["bench", "throughput", *DRY, *SHORT]) == 0
    assert "17 sequences" in capsys.readouterr().out
    assert main(["bench", "throughput", *DRY, *SHORT, "--max-num-seqs", "9"]) == 0
    assert "9 sequences" in capsys.readouterr().out
