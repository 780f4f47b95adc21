"""Checkpoints on a disk that is full, and copies that are damaged: the older one is whole, the damage is named."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.train.checkpoint import CheckpointNotSaved, Checkpoints, checkpoints
from rooflight.train.checkpoint import storage as storage_module
from tests.train.states import assert_same, blank, environment, names, state


def a_shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def damage_cases() -> dict[str, tuple]:
    return {
        "flipped byte": (lambda p: flip(a_shard(p)), "sha256", ".safetensors"),
        "truncated shard": (lambda p: cut(a_shard(p)), "the manifest says", ".safetensors"),
        "missing shard": (lambda p: a_shard(p).unlink(), "is missing", ".safetensors"),
        "strange shard": (
            lambda p: shutil.copy(a_shard(p), p / "x.safetensors"),
            "not in the manifest",
            "x.safetensors",
        ),
        "flipped meta": (lambda p: flip(p / "meta.json"), "sha256", "meta.json"),
        "missing manifest": (lambda p: (p / "manifest.json").unlink(), "is missing", "manifest.json"),
        "flipped manifest": (lambda p: flip(p / "manifest.json"), "is damaged", "manifest.json"),
        "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "is damaged", "manifest.json"),
        "other manifest": (lambda p: (p / "manifest.json").write_text("[1]"), "no manifest", "manifest.json"),
    }


@pytest.mark.parametrize("case", damage_cases())
def test_damage_is_named_and_the_older_is_taken(case: str, tmp_path: Path) -> None:
    damage, what, where = damage_cases()[case]
    store = Checkpoints(tmp_path)
    older = store.save(1, state(1), {"step": 1})
    newer = store.save(2, state(2), {"step": 2})
    damage(newer)
    store = Checkpoints(tmp_path)
    assert store.latest() == older
    (problem,) = store.problems
    assert str(newer) in problem
    assert what in problem
    assert where in problem
    target = blank(state())
    assert store.load(older, target) == {"step": 1}
    assert_same(target, state(1))
    with pytest.raises(InvalidValue) as caught:
        store.load(newer, target)
    assert "\n" not in str(caught.value)
    assert where in str(caught.value)
    assert_same(target, state(1))


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    """With the newest damaged, the next save must not push the last whole one out."""
    store = Checkpoints(tmp_path, keep=2)
    store.save(1, state(1), {})
    flip(a_shard(store.save(2, state(2), {})))
    store = Checkpoints(tmp_path, keep=2)
    assert store.latest() == tmp_path / "step-00000001"
    assert store.save(2, state(3), {}).name == "step-00000002.2"
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000002.2"]
    store.save(3, state(3), {})
    assert names(tmp_path) == ["step-00000002.2", "step-00000003"]


def test_a_later_format_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rooflight.train.checkpoint.manifest.VERSION", 2)
    Checkpoints(tmp_path).save(9, state(), {})
    monkeypatch.undo()
    store = Checkpoints(tmp_path, keep=1)
    assert store.latest() is None
    assert "format version 2" in store.problems[0]
    store.save(1, state(), {})
    store.save(2, state(), {})
    assert names(tmp_path) == ["step-00000002", "step-00000009"]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["write", "write_synced", "listed", "sync"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_full_in_the_middle(where: str, asynchronous: bool, tmp_path: Path, monkeypatch) -> None:
    with Checkpoints(tmp_path, asynchronous=asynchronous) as store:
        older = store.save(1, state(1), {"step": 1})
        store.wait()
        monkeypatch.setattr(storage_module if where == "write" else checkpoints, where, full)
        with pytest.raises(CheckpointNotSaved) as caught:
            store.save(2, state(2), {})
            store.wait()
        for part in ("step 2", "needs 0.001 GiB", str(tmp_path), "GiB free", "make room", "--out"):
            assert part in str(caught.value)
        monkeypatch.undo()
        assert names(tmp_path) == [older.name]
        assert store.latest() == older
        assert store.problems == []
        store.save(2, state(2), {})
    assert names(tmp_path) == [older.name, "step-00000002"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow in the middle of a shard, as it does when the disk or the quota is full."""
    program = f"""
import resource, signal, torch
from rooflight.train.checkpoint import Checkpoints, CheckpointNotSaved
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Checkpoints({str(tmp_path)!r})
store.save(1, {{"x": torch.ones(10)}}, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    store.save(2, {{"x": torch.ones(1 << 20)}}, {{}})
except CheckpointNotSaved as error:
    print("refused:", error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert ran.stdout.startswith("refused: step 2"), ran.stdout + ran.stderr
    store = Checkpoints(tmp_path)
    target = {"x": torch.zeros(10)}
    store.load(tmp_path / "step-00000001", target)
    assert target["x"].tolist() == [1.0] * 10
    assert names(tmp_path) == ["step-00000001"]


def test_no_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "write", lambda *_: pytest.fail("nothing may be written"))
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    huge = {"x": torch.empty(1, dtype=torch.uint8).expand(5 << 30)}
    with pytest.raises(CheckpointNotSaved, match=r"needs 5\.001 GiB, .* has 3\.000 GiB free"):
        Checkpoints(tmp_path).save(1, huge, {})
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotSaved, match="cannot be written to"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, {}, {})


def test_an_asynchronous_error_is_raised_once_at_the_next_call(tmp_path: Path, monkeypatch) -> None:
    store = Checkpoints(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(storage_module, "write", full)
        store.save(1, state(), {})
        assert store.latest() is None
    with pytest.raises(CheckpointNotSaved, match="step 1"):
        store.save(2, state(), {})
    store.save(3, state(), {})
    store.close()
    assert names(tmp_path) == ["step-00000003"]
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, asynchronous=True) as store:
        monkeypatch.setattr(storage_module, "write", full)
        store.save(4, state(), {})
        raise ZeroDivisionError


def test_only_dead_processes_are_cleaned_up_after(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = tmp_path / f".step-00000001.partial-{ended.pid}", tmp_path / f".step-00000002.partial-{os.getppid()}"
    trash = tmp_path / f".step-00000003.removed-{ended.pid}"
    for path in (dead, alive, trash):
        path.mkdir()
        (path / "x.safetensors").write_bytes(b"1")
    (tmp_path / "notes").mkdir()
    store = Checkpoints(tmp_path)
    assert store.latest() is None
    assert store.problems == [f"{dead}: was not finished, the process that wrote it is gone; the next save removes it"]
    store.save(1, state(), {})
    assert names(tmp_path) == sorted([alive.name, "notes", "step-00000001"])
