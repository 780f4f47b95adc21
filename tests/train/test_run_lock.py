"""One run at a time in a directory, and random states as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rooflight.errors import InvalidValue, RooflightError
from rooflight.train.checkpoint import rng_state, run_lock, set_rng_state
from tests.train.states import environment


def test_one_run_at_a_time(tmp_path: Path) -> None:
    program = f"""
import sys
from rooflight.train.checkpoint import run_lock
with run_lock({str(tmp_path / "run")!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(InvalidValue, match=f"another run works here .process {other.pid} on"),
        run_lock(tmp_path / "run"),
    ):
        pytest.fail("two runs in one directory")
    other.kill()
    other.communicate()
    with run_lock(tmp_path / "run"), pytest.raises(InvalidValue, match=str(os.getpid())), run_lock(tmp_path / "run"):
        pytest.fail("two runs in one directory")
    with run_lock(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidValue, match="cannot hold a run"), run_lock(tmp_path / "file" / "run"):
        pytest.fail("no directory")


def test_random_state_through_json() -> None:
    torch.manual_seed(5)
    torch.rand(3)
    kept = json.loads(json.dumps(rng_state()))
    first = torch.rand(100)
    torch.rand(7)
    set_rng_state(kept)
    assert torch.equal(torch.rand(100), first)
    for broken in ("zz", "00ff", 5):
        with pytest.raises(RooflightError, match="random state of cpu"):
            set_rng_state({"cpu": broken})  # pyright: ignore[reportArgumentType]
