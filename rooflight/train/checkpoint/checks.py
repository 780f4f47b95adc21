"""Whether tensors and meta are such as a checkpoint holds, said before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rooflight.errors import InvalidValue, WeightsMismatch
from rooflight.train.checkpoint.manifest import Manifest


def check_tensors(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsMismatch, naming the first, unless names, shapes and dtypes are those that the manifest lists."""
    for names, what in (
        (manifest.tensors.keys() - tensors.keys(), "is in the checkpoint, not in this run"),
        (tensors.keys() - manifest.tensors.keys(), "is missing from the checkpoint"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise WeightsMismatch(f"{path}: {min(names)} {what}{more}; resume with the settings that it was saved with")
    for name, (dtype, shape) in manifest.tensors.items():
        here = tensors[name]
        if tuple(here.shape) != shape or str(here.dtype) != f"torch.{dtype}":
            raise WeightsMismatch(
                f"{path}: {name} is {dtype} {list(shape)}, in this run {str(here.dtype).removeprefix('torch.')} "
                f"{list(here.shape)}; resume with the settings that it was saved with"
            )


def check_json(value: Any, where: str) -> None:
    """Raise InvalidValue where JSON would give back something else, but for a tuple, which comes back as a list."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            if not isinstance(key, str):
                raise InvalidValue(f"{where} has the key {key!r}; JSON keeps string keys only")
            check_json(held, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, held in enumerate(value):
            check_json(held, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise InvalidValue(
            f"{where} is a {type(value).__name__}; JSON keeps None, bool, int, float, str, lists and mappings"
        )
