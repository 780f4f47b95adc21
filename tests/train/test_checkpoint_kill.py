"""Processes killed while they save: the old checkpoint or the new one is whole, and the next save succeeds."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rooflight.train.checkpoint import Checkpoints
from tests.train.states import environment, names


class Forking:
    """The forking process, tests/train/killed.py, spoken to by lines."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.killed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def fork(self, directory: Path, moment: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{directory} {moment}\n")
        self.process.stdin.flush()
        return self.number()


@pytest.fixture
def forking() -> Iterator[Forking]:
    made = Forking()
    yield made
    made.process.communicate()


def consistent(directory: Path) -> int:
    """The step of the newest whole checkpoint, all of whose content must be of that step; 0 when there is none."""
    store = Checkpoints(directory)
    newest = store.latest()
    assert not [problem for problem in store.problems if "not finished" not in problem], store.problems
    if newest is None:
        return 0
    target = {f"t{i}": torch.zeros(200 + i) for i in range(8)}
    step = store.load(newest, target)["step"]
    assert newest.name == f"step-{step:08d}"
    assert all(torch.all(tensor == step) for tensor in target.values())
    return step


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_kill_at_random_moments(mode: str, tmp_path: Path, forking: Forking) -> None:
    """Whatever `save` has finished is still there after a SIGKILL, and the next process goes on from it."""
    moments = random.Random(0)
    reached = 0
    for _ in range(20):
        child = forking.fork(tmp_path, mode)
        time.sleep(moments.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        assert forking.number() == -signal.SIGKILL
        told = (tmp_path / "finished").read_text() if (tmp_path / "finished").exists() else "0"
        # An asynchronous save has returned before it is complete: the one before it must be.
        promised = max(reached, int(told or 0) - (mode == "async"))
        reached = consistent(tmp_path)
        assert reached >= promised
    assert reached > 20


def test_kill_before_every_file_operation(tmp_path: Path, forking: Forking) -> None:
    """At each point of a save that also removes the oldest: the old or the new is whole, and the next save succeeds."""
    value = {f"t{i}": torch.zeros(200 + i) for i in range(8)}
    start = Checkpoints(tmp_path / "start", keep=2)
    for step in (1, 2):
        start.save(step, {name: tensor.fill_(step) for name, tensor in value.items()}, {"step": step})
    seen: list[int] = []
    code, moment = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        moment += 1
        shutil.copytree(tmp_path / "start", tmp_path / "run")
        forking.fork(tmp_path / "run", str(moment))
        code = forking.number()
        seen.append(consistent(tmp_path / "run"))
        Checkpoints(tmp_path / "run").save(4, {name: tensor.fill_(4) for name, tensor in value.items()}, {"step": 4})
        assert consistent(tmp_path / "run") == 4
        assert len(names(tmp_path / "run")) == 2
        shutil.rmtree(tmp_path / "run")
    assert code == 0
    assert seen == sorted(seen), "from one moment on it is the new one"
    assert seen.count(2) > 10
    assert seen.count(3) > 3
