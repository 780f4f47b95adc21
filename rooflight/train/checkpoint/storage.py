"""Tensors to and from safetensors files through torch.distributed.checkpoint, without a process group.

Its planners cut DTensors into shards on saving and put them together anew on loading; its safetensors storage runs no
pickle and lets a full disk come through as an OSError. The planners are called directly because
`torch.distributed.checkpoint.save` and `load` warn in every single process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 1 << 30
FILE_BYTES = 1 << 28


def write(directory: Path, tensors: Mapping[str, Tensor], file_bytes: int = FILE_BYTES) -> None:
    """Write the tensors into new files of `directory`, at most `file_bytes` each unless one tensor is larger.

    Beyond the tensors themselves at most twice the largest file is held in host memory.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter

    state = _separate(tensors)
    writer = HuggingFaceStorageWriter(
        str(directory), fqn_to_index_mapping=_files(state, file_bytes), save_distributed=True
    )
    # Copying ahead on a CUDA stream would wait for the training step that runs meanwhile.
    writer.per_thread_copy_ahead = 0
    planner = DefaultSavePlanner(flatten_state_dict=False)
    writer.reset()
    planner.set_up_planner(state, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    results = writer.write_data(planner.finish_plan(writer.prepare_global_plan(plans)[0]), planner)
    writer.finish(metadata, [results.wait()])


def read(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors in place from the files of `directory`; one is held beside them at a time.

    Names, shapes and dtypes must have been compared before: this would cast.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader

    if not tensors:
        return
    state: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
    reader = HuggingFaceStorageReader(str(directory))
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plans = reader.prepare_global_plan(
        planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    )
    reader.read_data(planner.finish_plan(plans[0]), planner).wait()


class Stager:
    """One copy of the tensors in host memory, pinned when they are on a GPU, its buffers used again by each save.

    Not torch's DefaultStager: that of torch 2.11 fails on CUDA tensors (KeyError: type).
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the CPU that later writes to the given ones do not change."""
        staged = {name: self._copied(name, tensor.detach()) for name, tensor in tensors.items()}
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return staged

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        # By its method, for importing DTensor takes half a second that most programs need not spend.
        to_local = getattr(tensor, "to_local", None)
        if to_local is not None:
            return _with_local(tensor, self._copied(name, to_local()))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)

    def close(self) -> None:
        """Give the buffers back."""
        self._buffers.clear()


def _with_local(tensor: Any, local: Tensor) -> Tensor:
    """A DTensor that lies as `tensor` does, with another local part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def size_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors, contiguous, those that share memory apart: safetensors takes no others."""
    seen: set[int] = set()
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        held = tensor.detach().contiguous()
        # On a GPU each gets a copy of its own on the way to the host; a DTensor has no address.
        address = held.data_ptr() if held.device.type == "cpu" else 0
        out[name] = held.clone() if address and address in seen else held
        seen.add(address)
    return out


def _files(tensors: Mapping[str, Tensor], limit: int) -> dict[str, int]:
    """For each tensor the number of its file, from 1."""
    numbers: dict[str, int] = {}
    number, used = 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > limit:
            number, used = number + 1, 0
        numbers[name] = number
        used += size
    return numbers
