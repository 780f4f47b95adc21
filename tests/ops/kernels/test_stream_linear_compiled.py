"""What `stream_linear` compiles to for an H100 or H200: no spills, tensor cores, room for the next launch.

`python -m pytest tests/ops/kernels/test_stream_linear_compiled.py -s` prints the table.
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

from rooflight.ops.kernels import stream_kernel, stream_linear
from rooflight.ops.kernels.stream_plan import WIDE_ROWS, plan_for, room_of

from .test_ahead_of_time import REGISTERS_OF_A_MULTIPROCESSOR, SHARED_OF_A_MULTIPROCESSOR, _type_of

COMPILES = (stream_kernel.stream_linear_kernel,)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """The kernel as compiled: registers of a thread, stack bytes (spills), shared bytes, machine code."""

    registers: int
    stack: int
    shared: int
    sass: str


def _signature_of(value: Any) -> tuple[str, list[list[Any]]]:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>", []
    return _type_of(value)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Compiled]]:
    """Kernels that a test launched, compiled and not run."""
    found: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(self.arg_names, args)) | {k: v for k, v in options.items() if k in self.arg_names}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name], attribute = _signature_of(value)
                attributes[(index,)] = [] if parameter.do_not_specialize else attribute
        source = GluonASTSource(self, signature, constants, attributes)
        flags = {name: value for name, value in options.items() if name not in self.arg_names}
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=flags)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, flag, cubin], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
        sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
        found.append(Compiled(sizes["REG"], sizes["STACK"], kernel.metadata.shared, sass))

    monkeypatch.setattr(JITFunction, "run", run)
    yield found
    for kernel in found:
        print(f"\nregisters {kernel.registers} stack {kernel.stack} shared {kernel.shared}", end="")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def case(rows: int, form: str, dtype: torch.dtype = torch.bfloat16) -> None:
    x, weight, vector = meta(rows, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype), meta(4096, dtype=dtype)
    plan = plan_for(rows, 4096, 4096, False, 132)
    options: dict[str, Any] = {
        "plain": {"bias_N": vector},
        "norm": {"norm_weight_K": vector},
        "residual": {"residual_MN": meta(rows, 4096, dtype=dtype)},
        "gated": {"norm_weight_K": vector, "activation": "silu"},
        "gelu": {"activation": "gelu", "bias_N": vector},
        "gelu_tanh": {"activation": "gelu_tanh"},
        "relu": {"activation": "relu"},
    }[form]
    stream_linear.stream_linear(x, weight, plan=plan, **options)


@pytest.mark.parametrize("form", ["plain", "norm", "residual", "gated"])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_compiles_for_hopper(rows, form, compiled):
    case(rows, form)
    (kernel,) = compiled
    assert kernel.stack == 0
    # In registers the next launch's program finds its place beside this one; in shared memory where that is not all
    # filled. A group of four warps more than the products' is there.
    beside = 2 if rows < 128 else 1
    assert (beside if rows > WIDE_ROWS else 1) * (kernel.shared + 2048) <= SHARED_OF_A_MULTIPROCESSOR
    assert beside * kernel.registers * 32 * (room_of(rows).warps + 4) <= REGISTERS_OF_A_MULTIPROCESSOR
    # Products, copies, the start of the next launch, and the wait for the one before.
    for instruction in ("HGMMA", "UTMALDG", "PREEXIT", "ACQBULK"):
        assert instruction in kernel.sass, f"no {instruction}"


@pytest.mark.parametrize("form", ["gelu", "gelu_tanh", "relu"])
def test_other_activations_compile(form, compiled):
    case(20, form, torch.float16)
    assert compiled[0].stack == 0
