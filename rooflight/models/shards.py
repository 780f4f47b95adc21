"""The safetensors files of a checkpoint directory: which tensor lies where, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rooflight.errors import InvalidValue, WeightsMismatch
from rooflight.models.huggingface import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shard_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint: `model.safetensors`, or those that its index names.

    Raises InvalidValue when there is neither, and WeightsMismatch when the index names a file that is not there.
    """
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
            raise InvalidValue(
                f"{directory / INDEX}: weight_map is missing or no mapping from tensor to file; fetch it again"
            )
        files = [directory / name for name in sorted(set(weight_map.values()))]
    elif (directory / SINGLE).is_file():
        files = [directory / SINGLE]
    else:
        raise InvalidValue(f"{directory}: holds no weights; it must have {SINGLE}, or shards with {INDEX}")
    for file in files:
        if not file.is_file():
            raise WeightsMismatch(f"{directory}: the shard {file.name} that {INDEX} names is missing; fetch it again")
    return files


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file open for reading; a truncated or corrupt one raises InvalidValue naming it."""
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidValue(
            f"{file}: is not a whole safetensors file ({reason}); it is truncated or corrupt, fetch it again"
        ) from error


def headers(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a file, from its header alone."""
    with opened(file) as handle:
        names = handle.keys()
        return {name: tuple(handle.get_slice(name).get_shape()) for name in names}


def stream(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a file in turn, on the CPU; one is held at a time."""
    with opened(file) as handle:
        names = handle.keys()
        for name in names:
            yield name, handle.get_tensor(name)
