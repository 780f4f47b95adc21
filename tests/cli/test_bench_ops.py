"""`rooflight bench ops` from the command line: a real run of small shapes, its formats, bad input in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rooflight.cli import main
from rooflight.hardware.store import dumps
from rooflight.workload.op_bench import OPERATIONS, measure, table
from rooflight.workload.op_bench.shapes import SHAPES
from tests.workload.machines import CPU


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small shapes, short timings, and a host that was never probed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "BUDGET_SECONDS", 0.005)
    monkeypatch.setitem(SHAPES, "rms_norm", replace(SHAPES["rms_norm"], cpu=((256, 16),), cpu_grid=((1, 16),)))
    monkeypatch.setitem(SHAPES, "greedy", replace(SHAPES["greedy"], cpu=((2, 64),), cpu_grid=()))


def test_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine, file = tmp_path / "round.toml", tmp_path / "out.json"
    machine.write_text(dumps(CPU))
    told = ("--device", "cpu", "--dtype", "fp32", "--on", str(machine), "--result", str(file))
    assert main(["bench", "ops", "rms_norm", "greedy", *told]) == 0
    out, err = capsys.readouterr()
    assert "A CPU of round figures" in out and "rms_norm 256×16" in out and "eager" in out
    assert "rms_norm 256×16 backward" in err and str(file) in err
    kept = json.loads(file.read_text())
    assert [(row["operation"], row["pass"]) for row in kept["rows"]] == [
        ("rms_norm", "forward"),
        ("rms_norm", "backward"),
        ("greedy", "forward"),
    ]
    for row in kept["rows"]:
        assert row["state"] == "right" and row["seconds"] > 0 and row["peers"]["eager"]["seconds"] > 0
        assert row["share_of_roof"] == pytest.approx(row["roof_seconds"] / row["seconds"])


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    run = ("bench", "ops", "rms-norm", "--device", "cpu")
    assert main([*run, "--sweep", "--no-backward", "--peers", "none", "--dtype", "bf16", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["shape"], row["pass"], row["peers"]) for row in found["rows"]] == [
        ("256×16", "forward", {}),
        ("1×16", "forward", {}),
    ]
    assert (found["dtype"], found["machine"], found["rows"][0]["share_of_roof"]) == ("bf16", "", None)
    assert main([*run, "--no-backward", "-o", "md"]) == 0
    out = capsys.readouterr().out
    assert "| rms\\_norm 256×16 | fwd |" in out and "rooflight probe" in out and "of the roof" not in out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--list", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert all(f"{name}" in out for name in OPERATIONS) and not err
    assert main(["bench", "ops", "swiglu", "--list", "--sweep", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("gated_activation (also swiglu, geglu)")


def test_a_wrong_kernel_ends_in_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    off = replace(OPERATIONS["greedy"], ours=lambda logits: logits.argmin(-1))
    monkeypatch.setitem(table.OPERATIONS, "greedy", off)
    assert main(["bench", "ops", "greedy", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "WRONG" in out
    assert err.endswith("rooflight: 1 of 1 rows are no good: greedy 2×64 forward (wrong)\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rms_nrm",), ("'rms_nrm'", "rms_norm")),
        (("zzz",), ("'zzz'", "paged_attention")),
        (("--dtype", "fp64"), ("--dtype 'fp64'", "bf16")),
        (("--device", "tpu"), ("--device 'tpu'", "cpu, cuda")),
        (("--on", "h2000", "--device", "cpu"), ("h2000", "h200")),
        (("--peers", "eagre"), ("--peers 'eagre'", "eager")),
        (("--peers", "eager,none"), ("none",)),
        (("-o", "html"), ("'html'", "table", "md")),
        (("--result", "nowhere/x.json"), ("nowhere",)),
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
    assert main(["bench", "ops", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out
    assert all(word in err for word in words), err


def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "ops", "--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
