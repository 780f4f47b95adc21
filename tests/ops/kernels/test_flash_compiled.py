"""What the flash attention kernels compile to for an H100 or H200, without one: spills, matrix instructions, memory.

`python -m pytest tests/ops/kernels/test_flash_compiled.py -s` prints the table.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.knobs
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import flash_backward, flash_backward_keys, flash_backward_queries, flash_forward

from . import test_ahead_of_time as ahead
from .flash_oracle import Setup, arguments, build
from .test_paged_compiled import SHARED_OF_A_PROGRAM

COMPILES = (
    flash_forward._forward_kernel,
    flash_backward._delta_kernel,
    flash_backward_keys.keys_kernel,
    flash_backward_queries.queries_kernel,
)
BF16, FP32 = torch.bfloat16, torch.float32
# Heads, key heads, head dim, value dim, type, and the options after the scale.
MODELS: dict[str, tuple[int, int, int, int, torch.dtype, dict[str, Any]]] = {
    "llama-3.1-8b": (32, 8, 128, 128, BF16, {}),
    "multi-head 128": (32, 32, 128, 128, BF16, {}),
    "gpt-2": (12, 12, 64, 64, BF16, {}),
    "phi-2": (32, 32, 80, 80, BF16, {}),
    "phi-3": (32, 32, 96, 96, BF16, {"window": 2047}),
    "gpt-oss": (64, 8, 64, 64, BF16, {"window": 128, "sinks": True}),
    "deepseek": (128, 128, 192, 128, BF16, {}),
    "gemma-2": (8, 4, 256, 256, BF16, {"window": 4096, "softcap": 50.0}),
    "fp32 64": (12, 12, 64, 64, FP32, {}),
    "fp32 128": (32, 8, 128, 128, FP32, {}),
    "fp32 256": (8, 4, 256, 256, FP32, {}),
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, tuple[ahead.Compiled, str]]]:
    """Kernels that a test launched, compiled and not run, with the machine's instructions."""
    found: dict[str, tuple[ahead.Compiled, str]] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = ahead.compile_launch(self, args, options, tmp_path)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / f"{kernel.name}.cubin"]
        found[kernel.name] = kernel, subprocess.run(command, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(JITFunction, "run", run)
    yield found
    for kernel, _ in found.values():
        print(f"\n{kernel}", end="")


def spills_of(width: int) -> int:
    """Bytes a thread that are taken: addresses that a loop reads again cost less than smaller tiles do."""
    if width <= 64:
        return 0
    return 256 if width > 128 else 128


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("model", MODELS)
def test_compiles_for_hopper(model, packed, compiled):
    heads, key_heads, head_dim, value_dim, dtype, options = MODELS[model]
    shape = (4096,) if packed else (4, 4096)
    q, k, v, grad = (
        meta(*shape, count, channels, dtype=dtype)
        for count, channels in ((heads, head_dim), (key_heads, head_dim), (key_heads, value_dim), (heads, value_dim))
    )
    sinks = meta(heads, dtype=dtype) if options.get("sinks") else None
    mask = options.get("window", 0), options.get("softcap", 0.0), None
    scale = head_dim**-0.5
    if packed:
        starts = meta(9, dtype=torch.int32)
        flash_forward.packed_attention(q, k, v, starts, 4096, scale, *mask[:2], sinks)
        lse = meta(heads, 4096, dtype=FP32)
        flash_backward.packed_attention_backward(grad, q, k, v, grad, lse, starts, 4096, scale, *mask)
    else:
        flash_forward.attention(q, k, v, scale, True, *mask[:2], sinks)
        lse = meta(4, heads, 4096, dtype=FP32)
        flash_backward.attention_backward(grad, q, k, v, grad, lse, scale, True, *mask)
    for name in ("_forward_kernel", "keys_kernel", "queries_kernel"):
        kernel, sass = compiled[name]
        assert kernel.stack <= spills_of(max(head_dim, value_dim, 128 if dtype == FP32 else 0)), f"{kernel} spills"
        assert kernel.shared <= SHARED_OF_A_PROGRAM
        assert kernel.wide_loads > 0 and kernel.wide_stores > 0, f"{kernel} moves less than 16 bytes a thread"
        assert "LDGSTS" in sass, f"{kernel} does not load ahead"
        # fp32 tiles are too small for Hopper's own.
        matrix = "HGMMA" if dtype == BF16 else "HMMA"
        assert matrix in sass, f"{kernel} does not use the matrix instructions that it should"
    assert compiled["_delta_kernel"][0].stack == 0


def layouts_of_an_address(ptx: str) -> int:
    """The most layouts, the upper halves of a matrix operand's descriptor, that are added to one address."""
    operands = set(re.findall(r"%rd\d+", " ".join(re.findall(r"wgmma\.mma_async[^;]*;", ptx))))
    layouts: dict[str, set[int]] = defaultdict(set)
    for operand, address, constant in re.findall(r"(?:or|add)\.[bs]64 \t(%rd\d+), (%rd\d+), (-?\d{15,});", ptx):
        if operand in operands:
            layouts[address].add(int(constant) >> 32)
    return max(map(len, layouts.values()), default=0)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(40, 24), (64, 64), (24, 72), (72, 8)])
def test_no_two_operands_share_an_address(head_dim, value_dim, dtype, compiled, monkeypatch):
    """Widths that are not multiples of 16 are loaded without a pipeline, whose tiles would lie apart."""
    found: list[int] = []
    compile_kernel = ahead.triton.compile

    def compile_and_look(*args: Any, **options: Any) -> Any:
        kernel = compile_kernel(*args, **options)
        found.append(layouts_of_an_address(kernel.asm["ptx"]))
        return kernel

    monkeypatch.setattr(ahead.triton, "compile", compile_and_look)
    setup = Setup(333, 333, head_dim=head_dim, value_dim=value_dim)
    tensors = build(setup, dtype)
    args: Any = arguments(setup, tensors)
    out, lse = flash_forward.attention(*args)
    given: Any = tensors.grad, *args[:3], out, lse, *args[3:]
    flash_backward.attention_backward(*given)
    assert len(compiled) == len(found) == 4
    assert max(found) <= 1
    assert dtype == FP32 or max(found) == 1
