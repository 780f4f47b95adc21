"""What the Hopper attention kernel compiles to: no spills, tensor cores fed asynchronously, operands left alone.

`python -m pytest tests/ops/kernels/test_flash_hopper_compiled.py -s` prints the table.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.knobs
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import flash_hopper, flash_hopper_paged
from rooflight.ops.kernels.flash_hopper_plan import Plan, plan_for

from .test_ahead_of_time import DIVISIBLE, POINTERS
from .test_paged_compiled import SHARED_OF_A_PROGRAM

COMPILES = (flash_hopper._forward_kernel, flash_hopper_paged._prefill_kernel)


@dataclass(frozen=True, slots=True)
class Kernel:
    """As compiled: bytes of a stack (spills), shared bytes, the machine's instructions."""

    stack: int
    shared: int
    code: list[str]


def compile_launch(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], folder: Path) -> Kernel:
    """Compile for sm_90 what a launch with these arguments would run."""
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            element = POINTERS[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], DIVISIBLE
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": options["num_warps"]})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", sass, re.MULTILINE)
    stack = re.search(r"STACK:(\d+)", usage)
    return Kernel(int(stack.group(1)) if stack else -1, found.metadata.shared, code)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Kernel]]:
    """Kernels that a test launched, compiled and not run."""
    found: list[Kernel] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(compile_launch(self, args, options, tmp_path))

    monkeypatch.setattr(JITFunction, "run", run)
    yield found
    for kernel in found:
        print(f"\nshared {kernel.shared}, {len(kernel.code)} instructions", end="")


def registers(operand: str) -> int | None:
    found = re.search(r"\bR(\d+)\b", operand)
    return int(found.group(1)) if found else None


def overwritten(code: list[str]) -> list[str]:
    """Instructions that write registers which a product of tensor cores still reads: P, between issue and wait."""
    busy: set[int] = set()
    found = []
    for line in code:
        words = re.sub(r"^@!?U?P\w+ ", "", line)
        operation, _, operands = words.partition(" ")
        if operation.startswith("HGMMA"):
            first = registers(operands.split(",")[1])
            if first is not None and "gdesc" not in operands.split(",")[1]:
                busy |= set(range(first, first + 4))
        elif operands.endswith("0x0") if operation == "WARPGROUP.DEPBAR.LE" else line.startswith("BRA"):
            busy.clear()
        elif registers(operands.split(",")[0]) in busy and not operation.startswith(("ST", "SYNCS", "BAR", "UTMA")):
            found.append(line)
    return found


def qkv(
    batch: int, length: int, heads: int, key_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    fused = torch.empty(batch, length, (heads + 2 * key_heads) * head_dim, dtype=dtype, device="meta")
    q, k, v = fused.split([heads * head_dim, key_heads * head_dim, key_heads * head_dim], -1)
    return q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim)), v.unflatten(-1, (-1, head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 1000)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_hopper(head_dim, causal, window, dtype, compiled):
    flash_hopper.forward(*qkv(2, 2048, 16, 4, head_dim, dtype), head_dim**-0.5, causal, window)
    (kernel,) = compiled
    plan = plan_for(head_dim, 2048)
    assert kernel.stack == 0 and kernel.shared <= SHARED_OF_A_PROGRAM
    products = sum(line.startswith("HGMMA") for line in kernel.code)
    scores, values = head_dim // 16, plan.keys // 16
    bodies = {(True, 0): 2, (False, 0): 1, (True, 1000): 3}[causal, window]
    assert products == plan.consumers * (bodies + 1) * (scores + values)
    # Waits for tensor cores: two of each body, one of the first scores, one of the last values; more were serialized.
    waits = sum(line.startswith("WARPGROUP.DEPBAR") for line in kernel.code)
    assert waits == plan.consumers * (2 * bodies + 2)
    assert overwritten(kernel.code) == []


@pytest.mark.parametrize("plan", [Plan(64, 4, 2, False), Plan(128, 2, 2, True)], ids=str)
def test_other_plans_compile(plan, compiled):
    flash_hopper.forward(*qkv(1, 512, 4, 4, 128, torch.bfloat16), 0.1, True, 0, plan)
    assert compiled[0].stack == 0


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 1000)])
def test_long_sequences_of_narrow_heads_compile(causal, window, compiled):
    flash_hopper.forward(*qkv(1, 4096, 4, 4, 64, torch.bfloat16), 0.1, causal, window)
    assert compiled[0].stack == 0 and overwritten(compiled[0].code) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_compile_for_hopper(head_dim, page, dtype, compiled):
    q = torch.empty(3000, 16, head_dim, dtype=dtype, device="meta")
    k = torch.empty(500, page, 4, head_dim, dtype=dtype, device="meta")
    table, contexts, starts = (torch.empty(size, dtype=torch.int32, device="meta") for size in ((9, 250), 9, 10))
    flash_hopper_paged.prefill(torch.empty_like(q), q, k, k, table, contexts, starts, head_dim**-0.5, 2)
    (kernel,) = compiled
    assert kernel.stack == 0 and kernel.shared <= SHARED_OF_A_PROGRAM
    plan = flash_hopper_paged.plan_for(head_dim)
    assert sum(line.startswith("HGMMA") for line in kernel.code) == plan.consumers * 3 * (head_dim // 16 + 128 // 16)
    assert sum(line.startswith("WARPGROUP.DEPBAR") for line in kernel.code) == plan.consumers * 6
    assert overwritten(kernel.code) == []
    # Keys, and values: so many boxes of 64 channels of a page; and q.
    copies = 2 * (128 // page) * (head_dim // 64) + plan.consumers * (head_dim // 64)
    assert sum(line.startswith("UTMALDG") for line in kernel.code) == copies
