"""What the kernels compile to for an H100 or H200, without one: registers, no spills, 16-byte accesses, occupancy.

The operations' own launchers run on meta tensors of real shapes; what would be launched is compiled for sm_90 instead.
`python -m pytest tests/ops/kernels/test_ahead_of_time.py -s` prints the table.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.knobs
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import (
    activation,
    layer_norm,
    norm,
    norm_rows,
    norm_wide,
    rope,
    rotary_table,
    softmax,
)

# What `test_every_kernel` asks for.
COMPILES = (
    activation._activation_kernel,
    activation._activation_backward_kernel,
    activation._gated_kernel,
    activation._gated_backward_kernel,
    layer_norm._layer_norm_kernel,
    layer_norm._layer_norm_backward_kernel,
    norm._rms_norm_kernel,
    norm._rms_norm_backward_kernel,
    norm_rows._column_sum_kernel,
    norm_wide._forward_kernel,
    norm_wide._statistics_kernel,
    norm_wide._columns_kernel,
    rope._rotary_kernel,
    rotary_table._table_kernel,
    softmax._softmax_kernel,
    softmax._softmax_backward_kernel,
)
REGISTERS_OF_A_MULTIPROCESSOR, THREADS_OF_A_MULTIPROCESSOR, SHARED_OF_A_MULTIPROCESSOR = 65536, 2048, 228 * 1024
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as compiled: registers of a thread, stack bytes (spills), shared bytes, warps; accesses of 16 bytes."""

    name: str
    registers: int
    stack: int
    shared: int
    warps: int
    wide_loads: int
    wide_stores: int

    @property
    def resident_threads(self) -> int:
        """Threads of this kernel that a multiprocessor's registers hold; allocated by eights a thread."""
        a_program = 32 * self.warps * -(-self.registers // 8) * 8
        return min(THREADS_OF_A_MULTIPROCESSOR, REGISTERS_OF_A_MULTIPROCESSOR // a_program * 32 * self.warps)

    @property
    def resident_shared(self) -> int:
        """Shared bytes, with 1 KiB that each program costs, of as many programs as keep 512 threads resident."""
        return (self.shared + 1024) * max(1, 16 // self.warps)


def _type_of(value: Any) -> tuple[str, list[list[Any]]]:
    """Signature and attributes by which the launcher would specialize an argument."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], DIVISIBLE
    if isinstance(value, float):
        return "fp32", []
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), DIVISIBLE if value % 16 == 0 else []


def compile_launch(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any], folder: Path) -> Compiled:
    """Compile for sm_90 what a launch with these arguments would run."""
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name], attributes[(index,)] = _type_of(value)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    flags = {name: value for name, value in options.items() if name not in kernel.arg_names}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=flags)
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return Compiled(
        kernel.__name__,
        found["REG"],
        found["STACK"],
        compiled.metadata.shared,
        flags.get("num_warps", 4),
        len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.\w+\.shared\.global[^;]*, 0x10,", ptx)),
        len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
    )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Compiled]]:
    """Kernels that a test launched, compiled and not run."""
    found: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(compile_launch(self, args, options, tmp_path))

    monkeypatch.setattr(JITFunction, "run", run)
    # As many multiprocessors as an H200 has, for the grid's and the partial sums' sizes.
    for module in (layer_norm, norm, norm_wide):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    yield found
    for kernel in found:
        print(f"\n{kernel} resident threads {kernel.resident_threads}", end="")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def qkv_slices(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    qkv = meta(tokens, (heads + 2 * kv_heads) * head_dim)
    q, k, _ = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    return q.unflatten(-1, (heads, head_dim)), k.unflatten(-1, (kv_heads, head_dim))


def _norm_forward(rows: int, width: int, residual: bool) -> Callable[[], Any]:
    x, weight = meta(rows, width), meta(width)
    return lambda: norm.add_rms_norm(x, x, weight, 1e-5) if residual else norm.rms_norm(x, weight, 1e-5)


def _norm_backward(rows: int, width: int, residual: bool, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
    x, weight = meta(rows, width, dtype=dtype), meta(width, dtype=dtype)
    return lambda: norm.rms_norm_backward(x, x if residual else None, x, weight, 1e-5, 0.0)


def _layer_norm(rows: int, width: int, residual: bool) -> Callable[[], Any]:
    x, weight = meta(rows, width), meta(width)
    if residual:
        return lambda: layer_norm.add_layer_norm(x, x, weight, weight, 1e-5)
    return lambda: layer_norm.layer_norm(x, weight, weight, 1e-5)


def _layer_norm_backward(
    rows: int, width: int, residual: bool, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Any]:
    x, weight = meta(rows, width, dtype=dtype), meta(width, dtype=dtype)
    return lambda: layer_norm.layer_norm_backward(x, x if residual else None, x, weight, 1e-5)


def _gated(rows: int, width: int, kind: str) -> Callable[[], Any]:
    gate_up, grad = meta(rows, 2 * width), meta(rows, width)

    def both() -> None:
        activation.gated_activation(gate_up, kind)
        activation.gated_activation_backward(grad, gate_up, kind)

    return both


def _plain(rows: int, width: int, kind: str) -> Callable[[], Any]:
    x = meta(rows, width)

    def both() -> None:
        activation.activation(x, kind)
        activation.activation_backward(x, x, kind)

    return both


def _rotary(tokens: int, heads: int, kv_heads: int, head_dim: int, interleaved: bool) -> Callable[[], Any]:
    q, k = qkv_slices(tokens, heads, kv_heads, head_dim)
    table = meta(tokens, head_dim // 2, dtype=torch.float32)
    return lambda: rope.rotary(q, k, table, table, interleaved)


def _rotary_qkv(tokens: int, heads: int, kv_heads: int, head_dim: int, interleaved: bool) -> Callable[[], Any]:
    table = meta(tokens, head_dim // 2, dtype=torch.float32)
    qkv = meta(tokens, (heads + 2 * kv_heads) * head_dim)

    def both() -> None:
        parts = rope.rotary_qkv(qkv, table, table, heads, kv_heads, interleaved)
        rope.rotary_qkv_backward(*parts, table, table, interleaved)

    return both


def _softmax(rows: int, keys: int, causal: bool, softcap: float = 0.0) -> Callable[[], Any]:
    scores, sinks = meta(1, 1, rows, keys), meta(1) if softcap else None

    def both() -> None:
        softmax.attention_softmax(scores, causal, 0, softcap, sinks)
        softmax.attention_softmax_backward(scores, scores, scores if softcap else None, softcap, bool(softcap))

    return both


BACKWARDS = (768, 1600, 2048, 3072, 4096, 5120, 8192, 16384)
# The launches, and the least threads that a multiprocessor must hold to keep enough bytes of memory in flight.
LAUNCHES: dict[str, tuple[Callable[[], Any], int]] = {
    **{f"norm {d}": (_norm_forward(16384, d, False), 1024) for d in (768, 2048, 3072, 4096, 8192, 16384)},
    **{f"add and norm {d}": (_norm_forward(16384, d, True), 1024) for d in (768, 2048, 3072, 4096, 8192, 16384)},
    **{f"norm backward {d}": (_norm_backward(16384, d, False), 512) for d in BACKWARDS},
    **{f"add and norm backward {d}": (_norm_backward(16384, d, True), 512) for d in BACKWARDS},
    **{f"fp32 norm backward {d}": (_norm_backward(16384, d, True, torch.float32), 512) for d in BACKWARDS},
    **{f"layer norm {d}": (_layer_norm(16384, d, False), 1024) for d in (768, 1024, 4096, 16384, 20480)},
    **{f"add and layer norm {d}": (_layer_norm(16384, d, True), 1024) for d in (768, 1024, 4096, 16384)},
    "add and layer norm 20480": (_layer_norm(16384, 20480, True), 768),
    **{f"layer norm backward {d}": (_layer_norm_backward(32768, d, False), 512) for d in BACKWARDS},
    **{f"add and layer norm backward {d}": (_layer_norm_backward(32768, d, True), 512) for d in BACKWARDS[:-1]},
    **{
        f"fp32 layer norm backward {d}": (_layer_norm_backward(32768, d, True, torch.float32), 512)
        for d in BACKWARDS[:-1]
    },
    "wide norm 32768": (_norm_forward(4096, 32768, False), 1024),
    "wide add and norm 32768": (_norm_forward(4096, 32768, True), 1024),
    "wide norm backwards 32768": (_norm_backward(4096, 32768, True), 512),
    "wide layer norm backwards 32768": (_layer_norm_backward(4096, 32768, True), 512),
    **{f"softmax {d}": (_softmax(16384, d, False), 1024) for d in (1024, 4096, 16384)},
    "softmax causal": (_softmax(4096, 4096, True), 1024),
    "softmax with softcap and sinks": (_softmax(4096, 4096, True, 20.0), 512),
    "softmax of rows read twice": (_softmax(8192, 32768, False), 512),
    "norm of heads": (lambda: norm.rms_norm(qkv_slices(16384, 16, 8, 128)[0], meta(128), 1e-6), 1024),
    "norm of heads backward": (
        lambda: norm.rms_norm_backward(
            meta(16384, 16, 128), None, qkv_slices(16384, 16, 8, 128)[0], meta(128), 1e-6, 0.0
        ),
        512,
    ),
    **{f"gated {kind}": (_gated(16384, 8192, kind), 1024) for kind in ("silu", "gelu", "gelu_tanh", "relu")},
    "gated clamped": (_gated(16384, 2880, "clamped_swiglu"), 1024),
    "gated narrow": (_gated(16384, 3072, "silu"), 1024),
    "plain gelu": (_plain(32768, 3072, "gelu"), 1024),
    "rotary 64": (_rotary(16384, 32, 8, 64, False), 1024),
    "rotary 128": (_rotary(16384, 24, 8, 128, False), 1024),
    "rotary interleaved": (_rotary(16384, 32, 8, 64, True), 1024),
    "rotary and back of qkv 64": (_rotary_qkv(16384, 32, 8, 64, False), 1024),
    "rotary and back of qkv 128": (_rotary_qkv(16384, 24, 8, 128, False), 1024),
    "rotary and back of qkv interleaved": (_rotary_qkv(16384, 32, 8, 64, True), 1024),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for_hopper(name: str, compiled: list[Compiled]):
    launch, threads = LAUNCHES[name]
    launch()
    assert compiled
    # The backward of a row of 16,384 has 64 registers a thread, some short; shared memory is not short.
    spills = 256 if name.endswith("backward 16384") else 0
    for kernel in compiled:
        assert kernel.stack <= spills, f"{kernel} spills"
        assert kernel.resident_shared <= SHARED_OF_A_MULTIPROCESSOR, f"{kernel} wants more shared memory than there is"
        assert kernel.resident_threads >= threads, f"{kernel} leaves room for {kernel.resident_threads} threads"
    assert compiled[0].wide_loads > 0, f"{compiled[0]} loads less than 16 bytes a thread"
    assert any(kernel.wide_stores > 0 for kernel in compiled), f"{compiled} stores less than 16 bytes a thread"


@pytest.mark.parametrize("tokens", [1, 8192])
def test_the_rotary_table_compiles(tokens: int, compiled: list[Compiled]):
    rotary_table.rotary_table(meta(tokens, dtype=torch.int64), meta(64, dtype=torch.float32), 1.0)
    (kernel,) = compiled
    # A large angle is reduced in a loop with a table on the stack, not with spilled registers.
    assert kernel.stack <= 64 and kernel.resident_threads >= 512 and kernel.wide_stores > 0
