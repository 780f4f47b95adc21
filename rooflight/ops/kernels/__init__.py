"""Triton kernels of the operations; a file of them is imported when one of its kernels first runs on a GPU.

Every kernel loads, widens to fp32, computes, and rounds once at the store. Block sizes follow from widths by a rule.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

# Where there is no GPU (the interpreter, ahead-of-time compilation): few, so that small tests fill several programs.
_PROCESSORS_WITHOUT_GPU = 1


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device, by which persistent kernels size their grid."""
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


# Of more rows cuBLAS makes most products, and a launch beside its own gains nothing.
EARLY_ROWS = 32


@functools.lru_cache
def _launches_early() -> bool:
    # Triton's interpreter knows no launches.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return not interpreted and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


# Channels of all query heads beyond which one row's attention is launched plainly: 4.17 ms a token of Llama-3.1-8B
# against 4.58, 1.12 against 0.72 of Qwen3-0.6B, in two runs between which attention's kernel changed too. In one
# run of a chain of layers, with tiles of 16 keys, it adds 10.0 µs to the 8B's launched plainly, 12.0 early. The likely
# cause: programs with much shared memory leave little L1, through which the next product reads x again and again, and
# only an empty multiprocessor is divided anew.
LONE_CHANNELS = 2048


def early_attention(rows: int, channels: int) -> bool:
    """Whether attention, and what stands before it, may be launched early for so many rows and query channels."""
    return early_launch(rows) and (rows > 1 or channels <= LONE_CHANNELS)


def early_launch(rows: int) -> bool:
    """Whether a launch for so many rows may begin before the one ahead of it ends (programmatic dependent launch).

    A kernel launched so lets its successor begin at once, and before `gdc_wait` touches nothing that another kernel
    writes or reads: weights at most. On an H200 a link of two such kernels in a CUDA graph is 0.4–0.5 µs shorter.
    """
    return rows <= EARLY_ROWS and _launches_early()


# By device, use and size: none is given up, for a captured launch knows the address of its own.
_counters: dict[tuple[torch.device, str, int], Tensor] = {}


def counters_of(device: torch.device, use: str, count: int) -> Tensor:
    """Zeros that a launch leaves as zeros, shared by a device's launches of one use, which must follow one another.

    use: the kernels that share them. A call outside of a graph's capture comes first.
    """
    key = (device, use, power_of_2(max(count, 1)))
    found = _counters.get(key)
    if found is None:
        found = torch.zeros((key[2],), dtype=torch.int32, device=device)
        # Memory of a graph's own pool, cleared by the graph itself, is nothing that others may use.
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            _counters[key] = found
    return found


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """(x, rows, inner, outer stride, inner stride): row r begins at (r // inner)·outer + (r % inner)·inner stride.

    The last dimension is contiguous. A slice of a wider tensor, as q of fused QKV is, stays as it lies; what two
    strides cannot describe is copied.
    """
    shape = x.shape
    if x.is_contiguous():
        return x, x.numel() // shape[-1], 1, shape[-1], 0
    if x.stride(-1) == 1 and x.dim() == 2:
        return x, shape[0], 1, x.stride(0), 0
    if x.stride(-1) == 1 and x.dim() == 3:
        outer, inner = x.stride(0), x.stride(1)
        if outer == shape[1] * inner:
            return x, shape[0] * shape[1], 1, inner, 0
        return x, shape[0] * shape[1], shape[1], outer, inner
    return rows_of(x.contiguous())
