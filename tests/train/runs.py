"""A tiny training run through the command line: its text, its arguments, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rooflight.cli.main import main
from rooflight.train.checkpoint import Checkpoints

WORDS = ("def", "return", "self", "class", "import", "for", "while", "if", "else", "not", "in", "is", "None", "with")


def text(directory: Path, documents: int = 24) -> Path:
    """Files of made-up text, of unequal lengths."""
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    for number in range(documents):
        count = int(torch.randint(20, 160, (1,), generator=generator))
        picked = torch.randint(0, len(WORDS), (count,), generator=generator).tolist()
        (directory / f"{number:03d}.txt").write_text(" ".join(WORDS[i] for i in picked))
    return directory


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    """A run of 12 steps of the smallest preset in fp32."""
    return [
        *("train", "--data", str(data), "--out", str(out), "--model", "tiny", "--vocab-size", "300"),
        *("--context", "32", "--batch-size", "4", "--micro-batch-size", "2", "--steps", "12", "--warmup", "2"),
        *("--lr", "1e-3", "--device", "cpu", "--log-every", "4", "--eval-rows", "2", "--sample-tokens", "4", *more),
    ]


def run(data: Path, out: Path, *more: str) -> int:
    """The run in this process; its exit code."""
    return main(arguments(data, out, *more))


def process(data: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """The run in a process of its own."""
    command = [sys.executable, "-m", "rooflight", *arguments(data, out, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def weights(out: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    checkpoints = Checkpoints(out / "checkpoints")
    newest = checkpoints.latest()
    assert newest is not None, checkpoints.problems
    return {name: x for file in sorted(newest.glob("*.safetensors")) for name, x in load_file(file).items()}


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """The run's JSON lines of one kind."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two checkpoints are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
