"""What the products of few rows compile to for an H100 or H200: no spills, 16-byte loads, enough bytes on their way.

`python -m pytest tests/ops/kernels/test_skinny_compiled.py -s` prints the table.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.knobs
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import power_of_2, skinny_linear
from rooflight.ops.kernels.skinny_plan import CLASSES, Plan, plan_for, takes

from . import test_ahead_of_time as ahead
from .test_paged_compiled import SHARED_OF_A_PROGRAM, programs_of_a_multiprocessor

COMPILES = (skinny_linear._linear_kernel,)
# As much as memory of 4.8 TB/s and a latency of 0.7 µs wants of each of 132 multiprocessors.
LEAST_BYTES_ON_THEIR_WAY = 25_000
SHAPES = [(6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (4096, 1024), (1024, 2048), (1024, 3072)]


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[ahead.Compiled, str, Any]]]:
    """Kernels that a test launched, compiled and not run, with the machine's instructions and the grid."""
    found: list[tuple[ahead.Compiled, str, Any]] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = ahead.compile_launch(self, args, options, tmp_path)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / f"{kernel.name}.cubin"]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append((kernel, sass, grid))

    monkeypatch.setattr(JITFunction, "run", run)
    yield found
    for kernel, _, _ in found:
        print(f"\n{kernel}", end="")


def variants() -> set[tuple[int, Plan]]:
    """All (rows, plan) that `CLASSES` runs for the models' shapes; rows up to a power of two are one kernel."""
    found = {(rows, plan_for(rows, n, k)) for rows in (1, 2, 4) for n, k in SHAPES}
    return {(rows, plan) for rows, plan in found if plan is not None}


@pytest.mark.parametrize(("rows", "plan"), sorted(variants(), key=str), ids=str)
def test_compiles_for_hopper(rows, plan, compiled):
    skinny_linear.linear(meta(rows, 4096), meta(6144, 4096), meta(6144), plan)
    ((kernel, sass, _),) = compiled
    assert kernel.stack == 0, f"{kernel} spills"
    assert kernel.shared <= SHARED_OF_A_PROGRAM and kernel.wide_loads > 0
    resident = programs_of_a_multiprocessor(kernel)
    tile = 2 * plan.outputs * plan.inputs
    # Lanes along K share no sum before the last: x comes as the weights do, through no exchange.
    assert sass.count("FFMA") >= power_of_2(rows) * 8 * 7 // 8
    on_their_way = resident * tile * max(1, plan.stages - 1)
    assert on_their_way >= LEAST_BYTES_ON_THEIR_WAY, f"{kernel}: {on_their_way} bytes at most"


def test_every_class_can_be_reached():
    """A class that others before it hide is a mistake in the table."""
    for index, last in enumerate(CLASSES):
        for first in CLASSES[:index]:
            hidden = last.rows <= first.rows and last.inputs <= first.inputs and last.weights <= first.weights
            assert not hidden, f"{last} is hidden by {first}"


def test_a_model_without_a_gpu_is_untouched():
    x, w = torch.randn(1, 16), torch.randn(8, 16)
    assert not takes(x, w)
