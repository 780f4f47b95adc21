"""Many small arrays of the host to the device in one copy, and results back, without waiting for either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# Views of the one buffer must start where every type may.
_ALIGNMENT = 16


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Each array as a tensor on the device; to a GPU they travel as one pinned buffer, asynchronously.

    The arrays must not change afterwards: on a CPU the tensors are the arrays.
    """
    if device.type != "cuda":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sizes = {name: -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for name, array in arrays.items()}
    # torch keeps pinned memory for reuse, and gives it out again only after the copy from it is through.
    host = torch.empty(sum(sizes.values()), dtype=torch.uint8, pin_memory=True)
    bytes_of_host, start = host.numpy(), 0
    starts: dict[str, int] = {}
    for name, array in arrays.items():
        bytes_of_host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        starts[name] = start
        start += sizes[name]
    there = host.to(device, non_blocking=True)
    return {
        name: there[starts[name] : starts[name] + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }


class Download:
    """Tensors on their way to the host: begun on the current stream when made, waited for by `wait`."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
