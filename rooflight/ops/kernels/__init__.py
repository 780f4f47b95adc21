"""Triton kernels of the operations; a file of them is imported when one of its kernels first runs on a GPU.

Every kernel loads, widens to fp32, computes, and rounds once at the store. Block sizes follow from widths by a rule.
"""

from __future__ import annotations

import functools

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


# Launches for more rows take so long that what lies between two of them does not count.
EARLY_ROWS = 64


@functools.lru_cache
def _launches_early() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def early_launch(rows: int) -> bool:
    """Whether a launch for so many rows may begin before the one ahead of it ends (programmatic dependent launch).

    A kernel launched so lets its successor begin at once, and before `gdc_wait` touches nothing that another kernel
    writes or reads: weights at most. On an H200 a link of two such kernels in a CUDA graph is 0.4–0.5 µs shorter.
    """
    return rows <= EARLY_ROWS and _launches_early()


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
