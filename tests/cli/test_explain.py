"""`rooflight explain` and `probe` as a user calls them: stable JSON, groupings, formats, wet runs, entry points."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rooflight.cli import main
from rooflight.hardware import catalog, load
from rooflight.hardware.store import save
from rooflight.models.presets import names
from tests.workload.machines import CPU, changed

# The keys that issue 2 promises to other programs.
TOP = {"model", "machine", "phase", "batch", "context", "params", "totals", "rows", "memory", "advice", "provenance"}
PARAMS = {"total", "active", "embedding"}
TOTALS = {"flops", "bytes_read", "bytes_written", "intensity", "roof_seconds", "expected_seconds", "measured_seconds"}
ROW = {
    "path",
    "op",
    "count",
    "flops",
    "bytes_read",
    "bytes_written",
    "intensity",
    "bound",
    "primitive",
    "access",
    "movement",
    "roof_seconds",
    "expected_seconds",
    "measured_seconds",
    "formula",
}
MEMORY = {"weights", "gradients", "optimizer", "activations_peak", "kv_cache", "total"}
ADVICE = {"change", "saves_seconds", "saves_bytes", "why"}
BOUNDS = {"compute", "memory", "launch", "communication"}

FACTORY = """
import torch
from torch import nn


def make():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)), (torch.zeros(4, 1, 8, 8),)
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FACTORY, encoding="utf-8")
    save(CPU, Path("cpu.toml"))


def out(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command prints; it must succeed."""
    code = main(list(argv))
    printed, err = capsys.readouterr()
    assert code == 0, err
    return printed


def explained(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    return json.loads(out(capsys, "explain", *argv, "-o", "json"))


def check(found: dict[str, Any], *, measured: bool) -> None:
    """The stable keys, their kinds and units, and sums that agree with one another."""
    assert set(found) >= TOP
    assert set(found["params"]) == PARAMS
    assert set(found["totals"]) == TOTALS
    assert set(found["memory"]) >= MEMORY
    assert all(set(line) == ADVICE for line in found["advice"])
    assert isinstance(found["machine"], str) and isinstance(found["provenance"], dict)
    for row in found["rows"]:
        assert set(row) >= ROW
        assert row["bound"] in BOUNDS
        assert isinstance(row["movement"], list)
        assert isinstance(row["formula"], str)
        assert (row["measured_seconds"] is not None) == measured
        assert row["expected_seconds"] >= row["roof_seconds"] * (1 - 1e-9) >= 0
        assert row["provenance"] in ("measured", "interpolated", "extrapolated", "datasheet")
    for key in ("flops", "bytes_read", "bytes_written", "roof_seconds", "expected_seconds"):
        assert sum(row[key] for row in found["rows"]) == pytest.approx(found["totals"][key])
    assert (found["totals"]["measured_seconds"] is not None) == measured
    memory = found["memory"]
    assert memory["total"] <= sum(memory[key] for key in MEMORY - {"total"}) + memory_beside(memory)
    assert memory["total"] >= memory["weights"] + memory["kv_cache"]


def memory_beside(memory: dict[str, Any]) -> float:
    """What stands in no key of its own: inputs, and what the operation at the peak holds while it runs."""
    held = dict(memory["at_peak"])
    return held.get("inputs", 0.0) + held.get("workspace", 0.0)


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_json_of_a_decoder_has_the_stable_keys(phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "tiny", "--phase", phase, "--batch", "3", "--context", "40", "--on", "a100")
    check(found, measured=False)
    assert (found["model"], found["phase"], found["batch"], found["context"]) == ("tiny", phase, 3, 40)
    assert found["machine"] == load("a100").name
    # 256·64 tied, two layers of qkv 64·128, out 64·64, gate and up 64·256, down 128·64 and two norms, and one norm.
    wanted = 256 * 64 + 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64 + 2 * 64) + 64
    assert found["params"] == {"total": wanted, "active": wanted, "embedding": 256 * 64}
    assert found["memory"]["weights"] == 2 * wanted
    assert (found["memory"]["gradients"] > 0) == (found["memory"]["optimizer"] > 0) == (phase == "train")
    assert (found["memory"]["kv_cache"] > 0) == (phase != "train")
    assert any(row["formula"] for row in found["rows"])


@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_json_of_a_module_has_the_stable_keys(phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "mine.py:make", "--phase", phase, "--on", "cpu.toml")
    check(found, measured=False)
    assert found["model"] == "mine.py:make"
    assert found["params"]["total"] == 8 * 9 + 8 + 8 * 36 * 10 + 10
    primitives = {row["primitive"] for row in found["rows"]}
    assert "sliding window" in primitives


@pytest.mark.parametrize("by", ["component", "layer", "op", "primitive"])
def test_every_grouping_has_the_same_totals(by: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, "tiny", "--phase", "train", "--on", "cpu.toml", "--by", by)
    check(found, measured=False)
    assert found["by"] == by
    paths, ops = {row["path"] for row in found["rows"]}, {row["op"] for row in found["rows"]}
    if by == "layer":
        assert {"layers.0", "layers.1", "head", "embedding"} <= paths
    if by == "op":
        assert {"linear", "attention", "attention_backward", "adamw"} <= ops
        assert len(ops) == len(found["rows"])
    if by == "primitive":
        assert {"matrix multiply", "elementwise"} <= paths
    if by == "component":
        assert {"QKV", "scores", "feed-forward", "optimizer"} <= {row["component"] for row in found["rows"]}


@pytest.fixture
def no_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of an explanation's time and have tests of their own."""
    monkeypatch.setattr("rooflight.workload.explain._write_formulas", lambda *_: None)


@pytest.mark.usefixtures("no_formulas")
def test_options_reach_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    base = explained(capsys, "tiny", "--phase", "train", "--on", "cpu.toml")
    weights = base["memory"]["weights"]

    def train(*argv: str) -> dict[str, Any]:
        return explained(capsys, "tiny", "--phase", "train", "--on", "cpu.toml", *argv)

    wide = train("--dtype", "fp32", "--optimizer", "sgd")["memory"]
    assert (wide["weights"], wide["optimizer"]) == (2 * weights, 0)
    assert train("--optimizer", "adamw-master")["memory"]["optimizer"] == 6 * weights
    assert train("--attention", "naive")["totals"]["flops"] > base["totals"]["flops"]
    full = train("--recompute", "full")
    assert full["totals"]["flops"] > base["totals"]["flops"]
    assert full["memory"]["activations_peak"] < base["memory"]["activations_peak"]
    decode = [
        explained(capsys, "tiny", "--phase", "decode", "--on", "cpu.toml", "--kv-cache-dtype", dtype)["memory"]
        for dtype in ("bf16", "fp8")
    ]
    assert decode[0]["kv_cache"] == 2 * decode[1]["kv_cache"] > 0


@pytest.mark.usefixtures("no_formulas")
def test_a_faster_machine_has_a_lower_roof(capsys: pytest.CaptureFixture[str]) -> None:
    def roof(machine: str) -> float:
        return explained(capsys, "tiny", "--on", machine)["totals"]["roof_seconds"]

    save(replace(changed(CPU, memory_bandwidth=2e12), name="twice"), Path("twice.toml"))
    assert roof("b200") < roof("h100") < roof("laptop")
    # Nearly everything in it is bound by memory.
    assert roof("cpu.toml") / 2 <= roof("twice.toml") < 0.6 * roof("cpu.toml")


def test_csv_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(out(capsys, "explain", "tiny", "--on", "cpu.toml", "-o", "csv"))))
    found = explained(capsys, "tiny", "--on", "cpu.toml")["rows"]
    assert set(rows[0]) >= ROW
    assert [(row["component"], float(row["flops"])) for row in rows] == [(r["component"], r["flops"]) for r in found]


@pytest.mark.parametrize(("form", "start"), [("md", "#"), ("html", "<!doctype html>"), ("json", "{"), ("csv", "path,")])
def test_a_report_goes_to_a_file(form: str, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(f"report.{form}")
    assert main(["explain", "tiny", "--on", "cpu.toml", "-o", form, "--out", str(path)]) == 0
    printed, err = capsys.readouterr()
    assert printed == "" and str(path) in err
    text = path.read_text(encoding="utf-8")
    assert text.lower().lstrip().startswith(start)
    assert "feed-forward" in text
    # And to the screen without a file, the same.
    assert out(capsys, "explain", "tiny", "--on", "cpu.toml", "-o", form).strip() == text.strip() or form == "html"


def test_a_piped_table_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "explain", "tiny", "--on", "cpu.toml")
    assert "\x1b" not in text
    for word in ("QKV", "scores", "feed-forward", "roof", "expected", "KV cache", "sequential", "broadcast"):
        assert word in text
    Path("table.txt").unlink(missing_ok=True)
    assert main(["explain", "tiny", "--on", "cpu.toml", "--out", "table.txt"]) == 0
    assert "\x1b" not in Path("table.txt").read_text(encoding="utf-8")


def test_the_list_names_every_preset_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    words = set(out(capsys, "explain", "--list").split())
    assert set(names()) | set(catalog()) | {"here"} <= words
    assert len(names()) >= 25 and len(catalog()) >= 14


def test_help_and_version_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "explain" in out(capsys)
    for argv in (["--help"], ["explain", "--help"], ["probe", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 0
        assert "rooflight" in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_a_wet_run_stands_beside_the_prediction(
    phase: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wet run is over the CPU here, whatever the host has: the machine file is a CPU's.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = ("tiny", "--phase", phase, "--on", "cpu.toml", "--batch", "2", "--context", "24", "--measure")
    found = explained(capsys, *argv)
    check(found, measured=True)
    assert all(row["measured_seconds"] > 0 for row in found["rows"])
    assert 0 < found["totals"]["measured_seconds"] < 10
    # Operation by operation, as many calls as were predicted.
    dry = explained(capsys, *argv[:-1])
    assert [(r["path"], r["count"], r["flops"]) for r in found["rows"]] == [
        (r["path"], r["count"], r["flops"]) for r in dry["rows"]
    ]
    # The error is said, and not hidden.
    assert any(re.search(r"off by [+-]\d", note) for note in found["notes"])


def test_a_wet_run_of_a_module_and_of_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check(explained(capsys, "mine.py:make", "--on", "cpu.toml", "--phase", "train", "--measure"), measured=True)
    Path("text.txt").write_text("a text that is shorter than the context", encoding="utf-8")
    argv = ("tiny", "--on", "cpu.toml", "--context", "64", "--measure", "--text", "text.txt")
    check(explained(capsys, *argv), measured=True)


def test_probe_writes_the_machine_that_here_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["probe", "--budget", "1", "--device", "cpu"]) == 0
    printed, err = capsys.readouterr()
    assert "copy" in printed and "wrote" in err
    found = explained(capsys, "tiny", "--on", "here", "--context", "32")
    check(found, measured=False)
    assert found["machine"] == "here"
    assert "measured" in " ".join(found["provenance"].values())


CONSOLE = Path(sys.executable).with_name("rooflight")


@pytest.mark.parametrize("command", [[sys.executable, "-m", "rooflight"], [str(CONSOLE)]])
def test_entry_points(command: list[str]) -> None:
    good = subprocess.run([*command, "explain", "--list"], capture_output=True, text=True, check=False, timeout=60)
    assert good.returncode == 0 and "llama-3.1-8b" in good.stdout and good.stderr == ""
    bad = subprocess.run([*command, "explain", "nowhere"], capture_output=True, text=True, check=False, timeout=60)
    assert bad.returncode == 2 and bad.stdout == ""
    (line,) = bad.stderr.splitlines()
    assert "'nowhere'" in line


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m rooflight explain tiny --on a100 -o json | head -c 10"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("{") and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["train", "decode"])
def test_the_largest_model_is_explained_in_little_memory(phase: str) -> None:
    script = (
        "import resource, sys; from rooflight.cli import main; "
        f"code = main(['explain', 'llama-3.1-405b', '--phase', '{phase}', '-o', 'json']); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0
    assert int(done.stderr.split()[-1]) * 1024 < 1.5e9
    assert json.loads(done.stdout)["params"]["total"] > 4e11
