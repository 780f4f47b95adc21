"""What the paged kernels compile to for an H100 or H200, without one: no spills, 16-byte loads, room for programs.

`python -m pytest tests/ops/kernels/test_paged_compiled.py -s` prints the table.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.knobs
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.attention.paged_cuda import takes_attention
from rooflight.ops.kernels import kv_cache, paged_attention, paged_decode, paged_parts, paged_prefill

from . import test_ahead_of_time as ahead
from .paged_oracle import FP8

COMPILES = (
    kv_cache._write_kernel,
    paged_decode._decode_kernel,
    paged_parts._schedule_kernel,
    paged_prefill._prefill_kernel,
)
SHARED_OF_A_PROGRAM = 227 * 1024
BF16, FP32 = torch.bfloat16, torch.float32
# Heads, key heads, head dim, types of queries and cache, and the options after the scale.
MODELS: dict[str, tuple[int, int, int, torch.dtype, torch.dtype, dict[str, Any]]] = {
    "llama-3.1-8b": (32, 8, 128, BF16, BF16, {}),
    "qwen3-0.6b": (16, 8, 128, BF16, BF16, {}),
    "gpt-2": (12, 12, 64, BF16, BF16, {}),
    "phi-2": (32, 32, 80, BF16, BF16, {}),
    "phi-3": (32, 32, 96, BF16, BF16, {}),
    "falcon": (64, 1, 128, BF16, BF16, {}),
    "192 wide": (16, 2, 192, BF16, BF16, {}),
    "gemma-2": (8, 4, 256, BF16, BF16, {"window": 4096, "softcap": 50.0}),
    "gemma-2, whole": (8, 4, 256, BF16, BF16, {"softcap": 50.0}),
    "gpt-oss": (64, 8, 64, BF16, BF16, {"window": 128, "sinks": True}),
    "llama-3.1-8b, fp8 cache": (32, 8, 128, BF16, FP8, {}),
    "gemma, fp8 cache": (8, 4, 256, BF16, FP8, {}),
    "llama-3.1-8b, fp32": (32, 8, 128, FP32, FP32, {}),
    "gemma, fp32": (8, 4, 256, FP32, FP32, {}),
}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(model: str, sequences: int, tokens: int, blocks: int = 256) -> tuple[Any, ...]:
    heads, key_heads, head_dim, dtype, cache_dtype, options = MODELS[model]
    cache = meta(1000, 16, key_heads, head_dim, dtype=cache_dtype)
    table, contexts, starts = (
        meta(*shape, dtype=torch.int32) for shape in ((sequences, blocks), (sequences,), (sequences + 1,))
    )
    return (
        meta(tokens, heads, head_dim, dtype=dtype),
        *(cache, cache, table, contexts, starts),
        1 if tokens == sequences else tokens,
        head_dim,
        head_dim**-0.5,
        options.get("window", 0),
        options.get("softcap", 0.0),
        meta(heads, dtype=dtype) if options.get("sinks") else None,
    )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, tuple[ahead.Compiled, str]]]:
    """Kernels that a test launched, compiled and not run, with the machine's instructions."""
    found: dict[str, tuple[ahead.Compiled, str]] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = ahead.compile_launch(self, args, options, tmp_path)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / f"{kernel.name}.cubin"]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.setdefault(kernel.name, (kernel, sass))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setitem(ahead.POINTERS, FP8, "*fp8e4nv")
    monkeypatch.setattr(paged_parts, "processors", lambda device: 132)
    monkeypatch.setattr(paged_decode, "early_attention", lambda rows, channels: rows <= 64)
    yield found
    for kernel, _ in found.values():
        print(f"\n{kernel}", end="")


def programs_of_a_multiprocessor(kernel: ahead.Compiled) -> int:
    """How many its registers and its shared memory, with 1 KiB that each program costs, hold."""
    by_registers = kernel.resident_threads // (32 * kernel.warps)
    return min(by_registers, ahead.SHARED_OF_A_MULTIPROCESSOR // (kernel.shared + 1024))


@pytest.mark.parametrize("model", MODELS)
def test_compiles_for_hopper(model, compiled):
    args = arguments(model, 32, 8192)
    assert takes_attention(*args)
    paged_attention.paged_attention(*args)
    decode, prefill = compiled["_decode_kernel"], compiled["_prefill_kernel"]
    # Output and scores of these leave no register.
    spills = 64 if MODELS[model][2] == 256 else 0
    for kernel, sass in (decode, prefill):
        assert kernel.stack <= spills, f"{kernel} spills"
        assert kernel.shared <= SHARED_OF_A_PROGRAM
        assert kernel.wide_loads > 0 and kernel.wide_stores > 0, f"{kernel} moves less than 16 bytes a thread"
        assert "LDGSTS" in sass, f"{kernel} does not load ahead"
    # So that one loads while the other computes.
    assert programs_of_a_multiprocessor(decode[0]) >= 2
    if MODELS[model][3] == BF16:
        assert re.search(r"\bHGMMA", prefill[1]), "the prefill does not use Hopper's matrix instructions"
        assert re.search(r"\bHG?MMA", decode[1])


def test_the_counter_is_read_after_every_warps_stores(compiled):
    """In the machine's code: stores of the parts, barrier, atomic count, loads from L2."""
    args = arguments("llama-3.1-8b", 1, 1)
    paged_attention.paged_attention(*args)
    sass = compiled["_decode_kernel"][1]
    atomic = sass.index("ATOMG")
    assert sass.rindex("BAR.SYNC", 0, atomic) > sass.rindex("STG", 0, sass.rindex("BAR.SYNC", 0, atomic))
    assert "STG" not in sass[sass.rindex("BAR.SYNC", 0, atomic) : atomic]
    # What this multiprocessor's own cache holds of them is older.
    assert sass.index("CCTL.IVALL", atomic) < sass.index("LDG", atomic)


def test_nothing_of_the_kernel_before_is_read_before_waiting(compiled):
    """Before the wait: no load and no store."""
    paged_attention.paged_attention(*arguments("qwen3-0.6b", 64, 64))
    sass = compiled["_decode_kernel"][1]
    ahead_of_wait, behind = sass.split("ACQBULK")
    assert not re.search(r"LDG|STG|ATOM", ahead_of_wait) and "PREEXIT" in ahead_of_wait and "LDGSTS" in behind


def test_parts_fill_the_machine():
    """A wave of programs for one sequence, several for many; never parts of fewer keys than pay."""
    assert paged_parts.cut_of(1, 8, 132) == paged_parts.Cut(33, 32, 32)
    assert paged_parts.cut_of(64, 8, 132) == paged_parts.Cut(99, 256, 32)


@pytest.mark.parametrize("sequences", [1, 256])
def test_the_schedule_compiles_for_hopper(sequences, compiled):
    contexts, starts = meta(sequences, dtype=torch.int32), meta(sequences + 1, dtype=torch.int32)
    assert paged_parts.attention_schedule(contexts, starts, 40960, 8, 0).shape == (
        (34, 8) if sequences == 1 else (355, 8)
    )
    kernel, _ = compiled["_schedule_kernel"]
    assert kernel.stack == 0


@pytest.mark.parametrize("cache_dtype", [BF16, FP8], ids=str)
def test_the_scatter_compiles_for_hopper(cache_dtype, compiled):
    new, cache = meta(8192, 8, 128, dtype=BF16), meta(100, 16, 8, 128, dtype=cache_dtype)
    kv_cache.write_kv(new, new, cache, cache, meta(8192, dtype=torch.int64))
    kernel, _ = compiled["_write_kernel"]
    assert kernel.stack == 0 and kernel.wide_loads > 0
    assert kernel.resident_threads == ahead.THREADS_OF_A_MULTIPROCESSOR
    # A thread's 8 numbers are 8 bytes of fp8.
    assert kernel.wide_stores > 0 or cache_dtype == FP8
