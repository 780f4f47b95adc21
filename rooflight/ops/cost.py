"""What one operation costs: arithmetic, bytes, and how it touches memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

# A count is an int, or a torch.SymInt when the program is traced with symbolic sizes.
Count = Any


class Primitive(StrEnum):
    """The computational primitive that does an operation's arithmetic."""

    MATMUL = "matrix multiply"
    SLIDING_WINDOW = "sliding window"
    DYNAMIC = "dynamic computation"  # which elements meet depends on the data or on the context: attention, routing
    SEQUENTIAL_STATE = "sequential state"  # every step needs the state that the last one left: RNN, scan
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    DATA_MOVEMENT = "data movement"  # no arithmetic: copies, gathers, collectives


class Access(StrEnum):
    """The order in which an operation's bytes are touched."""

    SEQUENTIAL = "sequential"
    STRIDED = "strided"
    RANDOM = "random"


class Movement(StrEnum):
    """How data is spread or brought together."""

    BROADCAST = "broadcast"
    SCATTER = "scatter"
    GATHER = "gather"
    REDUCTION = "reduction"


PRECISIONS: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.int8: "int8",
    torch.uint8: "int8",
    torch.complex64: "fp32",
    torch.complex128: "fp64",
}
# Elementwise arithmetic happens in fp32 registers whatever the storage type is.
VECTOR = "fp32"


def precision_of(tensor: Tensor) -> str:
    """Name of the arithmetic that a matrix multiply over this tensor uses; integers count on the vector units."""
    return PRECISIONS.get(tensor.dtype, VECTOR)


def unique_elements(tensor: Tensor) -> Count:
    """Elements of storage that a tensor touches: an expanded (stride 0) dimension counts once."""
    elements: Count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if isinstance(stride, int) and stride == 0:
            continue
        elements = elements * size
    return elements


def tensor_bytes(tensors: Tensor | Iterable[Tensor | None] | None) -> Count:
    """Unique bytes of one tensor or of several; None is nothing."""
    if tensors is None:
        return 0
    if isinstance(tensors, Tensor):
        return unique_elements(tensors) * tensors.element_size()
    total: Count = 0
    for tensor in tensors:
        total = total + tensor_bytes(tensor)
    return total


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a fused operation that a report shows in its own row: the scores inside flash attention.

    component: empty for the component of the module that the operation runs in.
    """

    component: str
    flops: Mapping[str, Count]
    bytes_read: Count = 0
    bytes_written: Count = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one call of one operation.

    flops: arithmetic by precision, a multiply-add counted as 2; elementwise arithmetic under VECTOR.
    bytes_read, bytes_written: unique bytes, what an ideal kernel must move once.
    traffic: bytes that this kernel moves, re-reads included; None when it is the unique bytes.
    size: the numbers by which measured efficiency is looked up, (M, N, K) for a linear, else (rows, columns …).
    curve: name of the measured efficiency curve; the operation's own name when None.
    serial_steps: launches that wait for one another inside the operation (an RNN's time steps).
    link_bytes, group_size: for a collective, bytes a rank sends over the link and the number of ranks.
    parts: how a fused operation divides over report components; must sum to the whole.
    workspace: bytes that the kernel on a GPU holds while it runs beyond its inputs and outputs, and has freed when it
        returns.
    """

    flops: Mapping[str, Count] = field(default_factory=dict)
    bytes_read: Count = 0
    bytes_written: Count = 0
    primitive: Primitive = Primitive.ELEMENTWISE
    access: Access = Access.SEQUENTIAL
    movement: tuple[Movement, ...] = ()
    traffic: Count | None = None
    size: tuple[Count, ...] = ()
    precision: str | None = None
    curve: str | None = None
    serial_steps: Count = 1
    link_bytes: Count = 0
    group_size: int = 1
    parts: tuple[Part, ...] = ()
    workspace: Count = 0

    @property
    def total_flops(self) -> Count:
        total: Count = 0
        for count in self.flops.values():
            total = total + count
        return total

    @property
    def total_bytes(self) -> Count:
        return self.bytes_read + self.bytes_written

    def named(self, curve: str) -> Cost:
        return replace(self, curve=curve)


ALIGNMENT = 8  # elements: 16 bytes of bf16, what a tensor core's loads want


def curve_of(cost: Cost, name: str) -> str:
    """Name of the measured curve of a call; products whose N or K is no multiple of 8 run on other kernels.

    Sizes must be concrete. (GPT-2's vocabulary of 50,257 on an H200: a third of the speed of 50,304.)
    """
    curve = cost.curve or name
    product = cost.primitive == Primitive.MATMUL and len(cost.size) == 3
    return f"{curve}.unaligned" if product and any(int(n) % ALIGNMENT for n in cost.size[1:]) else curve


def matmul_cost(
    m: Count,
    n: Count,
    k: Count,
    *,
    precision: str,
    reads: Iterable[Tensor | None],
    writes: Iterable[Tensor | None],
    epilogue_flops: Count = 0,
    access: Access = Access.SEQUENTIAL,
) -> Cost:
    """2·M·N·K FLOPs; every operand moved once. Broadcast: each weight meets M rows; reduction: over K."""
    flops: dict[str, Count] = {precision: 2 * m * n * k}
    if not (isinstance(epilogue_flops, int) and epilogue_flops == 0):
        flops[VECTOR] = flops.get(VECTOR, 0) + epilogue_flops
    return Cost(
        flops=flops,
        bytes_read=tensor_bytes(reads),
        bytes_written=tensor_bytes(writes),
        primitive=Primitive.MATMUL,
        access=access,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=(m, n, k),
        precision=precision,
    )


def elementwise_cost(
    flops: Count,
    reads: Iterable[Tensor | None],
    writes: Iterable[Tensor | None],
    *,
    size: tuple[Count, ...] = (),
    primitive: Primitive = Primitive.ELEMENTWISE,
    access: Access = Access.SEQUENTIAL,
    movement: tuple[Movement, ...] = (),
    parts: tuple[Part, ...] = (),
) -> Cost:
    """Arithmetic on the vector units over tensors that are each moved once."""
    reads, writes = tuple(reads), tuple(writes)
    tensors = [t for t in (*writes, *reads) if t is not None and t.is_floating_point()]
    return Cost(
        flops={VECTOR: flops},
        bytes_read=tensor_bytes(reads),
        bytes_written=tensor_bytes(writes),
        primitive=primitive,
        access=access,
        movement=movement,
        size=size,
        precision=precision_of(tensors[0]) if tensors else VECTOR,
        parts=parts,
    )
