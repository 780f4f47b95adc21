"""Many tensors in one launch: device tables of where tensors lie and of the chunks that they are cut into.

A table of pointers holds a row for each tensor, a column for each role (parameter, gradient …). A table of chunks holds
(tensor, start, end) for each program of a launch. Both stay on the device for the next call: sizes never change, and
pointers only where an allocation moved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
VECTOR_BYTES = 16  # the widest load of a thread, which wants its address to be a multiple of it


def _upload(table: Tensor, device: torch.device) -> Tensor:
    return table if device.type != "cuda" else table.pin_memory().to(device, non_blocking=True)


# The stream is a part of the keys: the copy to the device is ordered before what runs on its own stream only.
@functools.lru_cache(maxsize=64)
def _pointer_table(pointers: tuple[int, ...], columns: int, device: torch.device, stream: int) -> Tensor:
    return _upload(torch.tensor(pointers, dtype=torch.int64).view(columns, -1).t().contiguous(), device)


@functools.lru_cache(maxsize=16)
def _chunk_table(sizes: tuple[int, ...], chunk: int, device: torch.device, stream: int) -> Tensor:
    ends = torch.tensor(sizes, dtype=torch.int64)
    counts = (ends + chunk - 1) // chunk
    tensor = torch.repeat_interleave(counts)
    start = (torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]) * chunk
    return _upload(torch.stack([tensor, start, ends[tensor]], dim=1), device)


def tables(roles: Sequence[Sequence[Tensor]], chunk: int, extra: Sequence[int] = ()) -> tuple[Tensor, Tensor, bool]:
    """(pointers [tensors, roles], chunks [programs, 3], whether every pointer takes vector loads).

    roles: lists of tensors of the same sizes, contiguous. extra: a number of each tensor, as a column before the roles.
    """
    device = roles[0][0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    pointers = tuple(tensor.data_ptr() for tensors in roles for tensor in tensors)
    columns = len(roles) + bool(extra)
    table = _pointer_table((*extra, *pointers), columns, device, stream)
    chunks = _chunk_table(tuple(tensor.numel() for tensor in roles[0]), chunk, device, stream)
    return table, chunks, not any(pointer % VECTOR_BYTES for pointer in pointers)
