"""Which products of few rows `stream_linear` takes, and how they are cut: steps, stages and programs, by shape.

Legend: M rows of x  N outputs  K inputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div, power_of_2

MOST_ROWS, MOST_TILES = 128, 1 << 14
HALF = 64  # outputs of a warpgroup's product; a tile has two of them
ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh", "relu"})
LEAST_ROWS = 16
WIDE_ROWS = 32
LEAST_UNCUT, LEAST_ALIKE = 0.8, 0.95  # of the multiprocessors, that programs must keep busy
DTYPES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Room:
    """What a program may take: warps of products (four more are with them), registers of a thread on entry, bytes."""

    warps: int
    registers: int
    shared_bytes: int


# A program leaves room for one of the next launch beside it, but not where sums want all registers.
SHARING, ALONE = Room(4, 128, 108 * 1024), Room(8, 168, 200 * 1024)


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch constants: inputs of a step, stages of its pipeline, and programs of the whole launch."""

    inputs: int
    stages: int
    programs: int


def rows_block(rows: int) -> int:
    """Rows of x for which the kernel is compiled: a power of two, of which all smaller counts are a part."""
    return max(LEAST_ROWS, power_of_2(rows))


def room_of(rows: int) -> Room:
    return ALONE if rows_block(rows) == MOST_ROWS else SHARING


def stage_bytes(rows: int, inputs: int) -> int:
    """Shared memory of one step in bf16: two half tiles of weights and all rows of x."""
    return 2 * inputs * (2 * HALF + rows_block(rows))


def tiles_of(outputs: int, gated: bool) -> int:
    """Tiles over all outputs; a gated one has a half of gates and a half of what they gate."""
    return ceil_div(outputs, HALF if gated else 2 * HALF)


def programs_of(tiles: int, total: int, multiprocessors: int) -> int:
    """Programs of a launch, so few that tiles are not cut or are cut alike, where that leaves few multiprocessors idle.

    What a program has to add up at the end is time in which memory is idle. Llama-3.1-8B, µs a layer at 32 rows: 130.5
    with 132 programs for each product, 127.2 with 112 for the 224 tiles of gates and values and 128 for 32 tiles.
    """
    uncut = next((n for n in range(min(tiles, multiprocessors), 0, -1) if tiles % n == 0), 1)
    if uncut >= LEAST_UNCUT * multiprocessors:
        return uncut
    alike = multiprocessors // tiles * tiles if tiles <= multiprocessors else 0
    return min(total, alike if alike >= LEAST_ALIKE * multiprocessors else multiprocessors)


def plan_for(rows: int, outputs: int, inputs: int, gated: bool, multiprocessors: int) -> Plan:
    """The cut of a product of these sizes; outputs are those of the activation where there is one.

    Up to 32 rows as much as fits is on its way, with no room for the next launch's programs: a layer of Llama-3.1-8B
    took 120.2 µs at 16 rows where half as much, beside them, took 128.3 (130.6, 138.9 at 32; cuBLAS 127.2, 133.5).
    """
    width, stages = 128, 5
    if rows > WIDE_ROWS:
        width = 64
        stages = max(2, min(6, room_of(rows).shared_bytes // stage_bytes(rows, width)))
    tiles = tiles_of(outputs, gated)
    return Plan(width, stages, programs_of(tiles, tiles * ceil_div(inputs, width), multiprocessors))


def check(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    norm_weight_K: Tensor | None,
    residual_MN: Tensor | None,
    activation: str | None,
    name: str = "stream_linear",
) -> None:
    """Raise InvalidValue, with what is wrong, for arguments that neither `stream_linear` nor `wide_linear` can run."""
    if x_MK.dim() != 2 or not 0 < x_MK.shape[0] <= MOST_ROWS:
        raise InvalidValue(f"{name} takes 1 to {MOST_ROWS} rows of a matrix, not x of {tuple(x_MK.shape)}")
    rows, inputs = x_MK.shape
    if weight_NK.dim() != 2 or weight_NK.shape[1] != inputs:
        raise InvalidValue(f"weight of {tuple(weight_NK.shape)} does not take the {inputs} columns of x")
    if activation is not None and (activation not in ACTIVATIONS or weight_NK.shape[0] % 2):
        raise InvalidValue(
            f"activation {activation!r} over {weight_NK.shape[0]} gates and values; known: {ACTIVATIONS}"
        )
    outputs = weight_NK.shape[0] // (1 if activation is None else 2)
    if (tiles := tiles_of(outputs, activation is not None)) > MOST_TILES:
        raise InvalidValue(f"{outputs} outputs are {tiles} tiles; at most {MOST_TILES} are counted")
    vectors = {"bias": (bias_N, weight_NK.shape[0]), "norm weight": (norm_weight_K, inputs)}
    for label, (vector, size) in vectors.items():
        if vector is not None and (vector.shape != (size,) or not vector.is_contiguous()):
            raise InvalidValue(f"{label} of {tuple(vector.shape)} is not a vector of {size}")
    if residual_MN is not None and (residual_MN.shape != (rows, outputs) or residual_MN.stride(1) != 1):
        raise InvalidValue(f"residual of {tuple(residual_MN.shape)} is not rows of {(rows, outputs)}")
    tensors = [x_MK, weight_NK, *(t for t in (bias_N, norm_weight_K, residual_MN) if t is not None)]
    if x_MK.dtype not in DTYPES or any(tensor.dtype != x_MK.dtype for tensor in tensors):
        raise InvalidValue(f"{name} takes bf16 or fp16 throughout, not {[tensor.dtype for tensor in tensors]}")
    for label, matrix in (("x", x_MK), ("weight", weight_NK)):
        if matrix.stride(1) != 1 or matrix.stride(0) % 8 or matrix.data_ptr() % 16:
            raise InvalidValue(f"rows of {label} begin at multiples of 16 bytes, not with strides {matrix.stride()}")
