"""Fixtures of the kernels' tests: Triton's interpreter in a process of its own, where fresh memory holds NaN."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CHILD = Path(__file__).with_name("interpreter_child.py")
ROOT = Path(__file__).parents[3]


class Interpreter:
    """Calls functions of `rooflight.ops.kernels` on CPU tensors in a child with TRITON_INTERPRET=1."""

    def __init__(self) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(filter(None, paths)))
        self._child = subprocess.Popen(
            [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT
        )

    def call(self, name: str, *args: Any) -> tuple[Any, tuple[Any, ...]]:
        """(result, arguments as the call left them) of `name`, "norm.rms_norm"; views keep their strides."""
        module, function = name.rsplit(".", 1)
        payload = io.BytesIO()
        torch.save((f"rooflight.ops.kernels.{module}", function, args), payload)
        pipe_in, pipe_out = self._child.stdin, self._child.stdout
        if pipe_in is None or pipe_out is None:
            raise RuntimeError("the interpreter's pipes are closed")
        pipe_in.write(struct.pack("<q", payload.tell()) + payload.getvalue())
        pipe_in.flush()
        header = pipe_out.read(8)
        if len(header) < 8:
            raise RuntimeError(f"the interpreter died with exit code {self._child.wait()}")
        kind, result, left = torch.load(io.BytesIO(pipe_out.read(struct.unpack("<q", header)[0])), weights_only=False)
        if kind == "error":
            raise RuntimeError(result)
        return result, left

    def __call__(self, name: str, *args: Any) -> Any:
        return self.call(name, *args)[0]

    def close(self) -> None:
        self._child.communicate()


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
