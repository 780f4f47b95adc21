"""What `few_linear` compiles to for an H100 or H200: no spills, weights asked for before the kernel ahead is through.

`python -m pytest tests/ops/kernels/test_few_linear_compiled.py -s` prints the table.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton.knobs
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import few_linear
from rooflight.ops.kernels.few_plan import plan_for

from . import test_ahead_of_time as ahead

COMPILES = (few_linear._few_linear_kernel,)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", re.MULTILINE)


class Product(NamedTuple):
    outputs: int
    inputs: int
    gate: str | None
    normed: bool


# Of Qwen3-0.6B.
PRODUCTS = {
    "qkv": Product(4096, 1024, None, True),
    "out": Product(1024, 2048, None, False),
    "gate and up": Product(3072, 1024, "silu", True),
    "down": Product(1024, 3072, None, False),
}


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[ahead.Compiled, list[str]]]]:
    """Kernels that a test launched, compiled and not run, with the machine's instructions."""
    found: list[tuple[ahead.Compiled, list[str]]] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = ahead.compile_launch(self, args, options, tmp_path)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / f"{kernel.name}.cubin"]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append((kernel, INSTRUCTION.findall(sass)))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(few_linear, "early_launch", lambda rows: True)
    yield found
    for kernel, _ in found:
        print(f"\n{kernel}", end="")


@pytest.mark.parametrize("rows", [8, 16, 32])
@pytest.mark.parametrize("name", PRODUCTS)
def test_compiles_for_hopper(name, rows, compiled):
    outputs, inputs, gate, normed = PRODUCTS[name]
    plan = plan_for(rows, outputs, inputs, gate is not None)
    assert plan is not None
    if normed:
        weight = meta(outputs * (1 if gate is None else 2), inputs)
        few_linear.norm_linear(meta(rows, inputs), meta(inputs), weight, None, 1e-5, 0.0, gate)
    else:
        few_linear.add_linear(meta(rows, outputs), meta(rows, inputs), meta(outputs, inputs), None)
    ((kernel, instructions),) = compiled
    # A few words are stored once before the wait and read after it.
    assert kernel.stack <= 32, f"{kernel} spills"
    wait = instructions.index("ACQBULK")
    tile_bytes = 2 * plan.outputs * inputs * (1 if gate is None else 2)
    of_weights = tile_bytes // (32 * plan.warps * 16)
    before = [
        instruction for instruction in instructions[:wait] if instruction.startswith(("LDG", "LDS", "STS", "BAR"))
    ]
    wide = [instruction for instruction in before if instruction.startswith("LDG.E.128")]
    assert len(wide) >= of_weights and all("LDG" in instruction for instruction in before), before
    # No tile goes through shared memory: before the last product only sums of squares do.
    last = max(index for index, instruction in enumerate(instructions) if instruction.startswith("HMMA"))
    assert sum(instruction.startswith(("STS.128", "LDSM")) for instruction in instructions[:last]) == 0
