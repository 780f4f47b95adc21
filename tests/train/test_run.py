"""Whole runs through the command line: resume, stop, kill, damage, non-finite steps, export and what they log."""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from rooflight.train.loop import Trainer
from rooflight.workload.training import Trainee
from tests.train.runs import equal, events, process, run, text, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps without a stop."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert run(data, out, "--checkpoint-every", "0") == 0
    return out


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As a SIGTERM that comes while this step is taken."""
    taken = Trainer._one

    def one(self: Trainer, rows: Any) -> None:
        taken(self, rows)
        if self.step == step:
            self._stop = "SIGTERM"

    monkeypatch.setattr(Trainer, "_one", one)


def test_the_log_tells_what_happened(straight: Path) -> None:
    steps = events(straight, "step")
    assert [event["step"] for event in steps] == [1, 4, 8, 12]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for event in steps:
        assert event["tokens"] == event["step"] * 4 * 32
        assert event["predicted_peak_bytes"] > 0
        assert event["seconds"] > 0
    assert len(events(straight, "evaluation")) == 1
    assert len(events(straight, "sample")) == 1


@pytest.mark.parametrize("asynchronous", ["--async-checkpoint", "--no-async-checkpoint"])
def test_resume_is_exact(
    data: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        assert run(data, out, "--checkpoint-every", "2", asynchronous) == 0
    assert not equal(weights(out), weights(straight))
    assert run(data, out, "--checkpoint-every", "2", asynchronous, "--resume") == 0
    assert equal(weights(out), weights(straight))


@pytest.mark.parametrize(
    "more",
    [
        ("--dtype", "bf16", "--no-master-weights", "--rounding", "stochastic", "--optimizer-dtype", "bf16"),
        ("--dtype", "bf16", "--gradient-dtype", "fp32"),
        ("--optimizer", "muon", "--dtype", "bf16"),
        ("--recompute", "selective", "--schedule", "wsd"),
    ],
)
def test_resume_is_exact_in_every_precision(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    assert run(data, tmp_path / "a", *more) == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 7)
        assert run(data, tmp_path / "b", *more) == 0
    assert run(data, tmp_path / "b", *more, "--resume") == 0
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_micro_batches_and_recomputation_see_the_same_data(data: Path, straight: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--micro-batch-size", "4", "--checkpoint-every", "0") == 0
    ours, theirs = weights(tmp_path / "out"), weights(straight)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=1e-3)


def test_resume_without_a_checkpoint_starts_anew(data: Path, straight: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--resume") == 0
    assert equal(weights(tmp_path / "out"), weights(straight))


def test_a_resumed_run_reads_no_other_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "text"
    shutil.copytree(data, mine)
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        assert run(mine, tmp_path / "out") == 0
    (mine / "000.txt").touch()
    with monkeypatch.context() as patched:
        stop_after(patched, 7)
        assert run(mine, tmp_path / "out", "--resume") == 0, "the same text, saved again, is the same data"
    (mine / "000.txt").write_text("yield " * 40)
    assert run(mine, tmp_path / "out", "--resume") == 2
    assert "holds other tokens" in capsys.readouterr().err


def test_what_an_attempt_left_is_not_taken_up_without_resume(data: Path, tmp_path: Path) -> None:
    """An attempt that ended before its first checkpoint: the next one's tokenizer is its own."""
    out = tmp_path / "out"
    assert run(data, out, "--vocab-size", "280", "--context", "9999") == 2
    assert run(data, out, "--vocab-size", "280", "--export", str(data)) == 2
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer" / "tokenizer.json").write_text("left over")
    assert run(data, out, "--steps", "1") == 0


def test_profiling_every_step_of_a_log_line_tells_no_rate(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "out", "--steps", "3", "--log-every", "1", "--profile", "2") == 0
    assert [event["step"] for event in events(tmp_path / "out", "step")] == [1, 3]
    assert (tmp_path / "out" / "profile" / "step-2.trace.json").is_file()


def test_a_used_directory_is_refused(data: Path, straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, straight) == 2
    assert "--resume" in capsys.readouterr().err


def test_what_a_resumed_run_may_not_change(data: Path, straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, straight, "--resume", "--seed", "5") == 2
    assert "--seed 5 differs from the 0" in capsys.readouterr().err


def test_a_flipped_byte_is_named_and_the_older_checkpoint_used(
    data: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 9)
        assert run(data, out, "--checkpoint-every", "4") == 0
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    shard = max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    spoilt = bytearray(shard.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    shard.write_bytes(bytes(spoilt))
    assert run(data, out, "--checkpoint-every", "4", "--resume") == 0
    told = capsys.readouterr().out
    assert shard.name in told and "at step 8" in told
    assert equal(weights(out), weights(straight))


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_not_finite(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    """One gradient turns infinite in the sixth step."""
    calls = [0]
    computed = Trainee.gradients

    def gradients(self: Trainee, *args: Any, **kwargs: Any) -> Any:
        loss = computed(self, *args, **kwargs)
        calls[0] += not isinstance(loss, FakeTensor)  # the prediction runs the same step dry
        if calls[0] == 6 and not isinstance(loss, FakeTensor):
            self.trained[0].grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(Trainee, "gradients", gradients)
    code = run(data, tmp_path / "out", "--checkpoint-every", "3", *(["--skip-nonfinite"] if skip else []))
    told = capsys.readouterr()
    if skip:
        assert code == 0
        assert "skipped step 6" in told.out
        assert [event["step"] for event in events(tmp_path / "out", "skip")] == [6]
        assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())
    else:
        assert code == 2
        assert "step 6" in told.err and "samples 20, 21, 22, 23" in told.err
        assert "last good checkpoint" in told.err and "step-00000003" in told.err


def test_export_is_loaded_by_transformers(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rooflight.models.layout import Layout
    from rooflight.models.weights import load_pretrained

    assert run(data, tmp_path / "out", "--export", str(tmp_path / "hf")) == 0
    ours = load_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")("def self return")["input_ids"]
    tokens_T = torch.tensor(ids)
    with torch.no_grad():
        mine = ours(tokens_T, torch.arange(len(ids)), Layout((1, len(ids))))
        wanted = theirs(tokens_T.unsqueeze(0)).logits[0]
    torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)
    assert run(data, tmp_path / "more", "--model", str(tmp_path / "hf")) == 0
    first = events(tmp_path / "more", "step")[0]["loss"]
    assert first < events(tmp_path / "out", "step")[0]["loss"] - 0.5


def test_sigterm_saves_and_stops(data: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = process(data, out, "--steps", "400", "--checkpoint-every", "0")
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").is_file() or not events(out, "step"):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert events(out, "checkpoint")[-1]["step"] < 400


@pytest.mark.slow
def test_kill_at_random_moments(data: Path, tmp_path: Path) -> None:
    """Twenty SIGKILLs, half of them inside a save; the run ends bit-identical to one that nobody disturbed."""
    more = ("--steps", "700", "--checkpoint-every", "5", "--log-every", "100")
    assert run(data, tmp_path / "straight", *more) == 0
    out = tmp_path / "killed"
    dice = random.Random(7)
    in_saves = 0
    for attempt in range(20):
        job = process(data, out, *more, "--resume")
        inside = attempt % 2 == 0
        seen = {path.name for path in (out / "checkpoints").glob(".*partial*")}
        began = 0.0
        moment = dice.uniform(0.0, 0.8)
        while True:
            assert job.poll() is None, "the run ended before it was killed; give it more steps"
            fresh = {path.name for path in (out / "checkpoints").glob(".*partial*")} - seen
            # The clock of a random moment starts when the run does, which its first save shows.
            began = began or (time.monotonic() if fresh else 0.0)
            if fresh if inside else began and time.monotonic() - began > moment:
                job.kill()
                in_saves += bool(fresh)
                break
            time.sleep(0.0002)
        assert job.wait() == -signal.SIGKILL
    assert process(data, out, *more, "--resume").wait() == 0
    assert equal(weights(out), weights(tmp_path / "straight"))
    assert in_saves >= 10


def test_a_full_device_is_one_line_and_the_checkpoints_stay(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Trainer._one

    def one(self: Trainer, rows: Any) -> None:
        if self.step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        taken(self, rows)

    monkeypatch.setattr(Trainer, "_one", one)
    assert run(data, tmp_path / "out", "--checkpoint-every", "3") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "step 8 ran out of memory on cpu" in err
    assert [path.name for path in sorted((tmp_path / "out" / "checkpoints").glob("step-*"))][-1] == "step-00000006"
