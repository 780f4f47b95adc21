"""The manifest of a checkpoint: its files with size and sha256, its tensors, and what is wrong with a copy on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rooflight.errors import InvalidValue

NAME, META = "manifest.json", "meta.json"
FORMAT, VERSION = "rooflight-checkpoint", 1
TENSORS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint consists of.

    sequence: grows with each save into one directory; it orders checkpoints where steps repeat after a resume.
    files: name → [bytes, sha256].  tensors: name → [dtype, shape].
    """

    step: int
    sequence: int
    files: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    def write(self, directory: Path) -> None:
        """Write manifest.json, its own checksum in it, and see it onto the disk."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_synced(directory / NAME, json.dumps({**body, "sha256": _checksum(body)}, indent=1))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a checkpoint directory; InvalidValue when it is missing, damaged or of another version."""
        file = directory / NAME
        try:
            body = json.loads(file.read_bytes())
            if not isinstance(body, dict) or body.get("format") != FORMAT:
                raise ValueError("it is no manifest of a Rooflight checkpoint")
            if body.pop("sha256", None) != _checksum(body):
                raise ValueError("its text is not the one that its checksum was made of")
        except FileNotFoundError as error:
            raise InvalidValue(f"{file}: is missing, so the checkpoint is incomplete; use another one") from error
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidValue(f"{file}: is damaged ({reason}); use another checkpoint") from error
        if body["version"] != VERSION:
            raise InvalidValue(
                f"{file}: has format version {body['version']}, this Rooflight reads {VERSION}; "
                "use the Rooflight that wrote it"
            )
        return cls(
            body["step"],
            body["sequence"],
            {name: (size, digest) for name, (size, digest) in body["files"].items()},
            {name: (dtype, tuple(shape)) for name, (dtype, shape) in body["tensors"].items()},
        )

    def complete(self, directory: Path) -> bool:
        """Whether every file is there in full length; the content is not read."""
        return all(
            (directory / name).is_file() and _size(directory / name) == size for name, (size, _) in self.files.items()
        )

    def problems(self, directory: Path) -> list[str]:
        """What is wrong with the files, one line each; reads every byte."""
        found = [f"{directory / name}: {fault}" for name, fault in zip(self.files, self._faults(directory)) if fault]
        known = set(self.files)
        # The reader takes every file of tensors that it finds.
        strange = sorted(path for path in directory.glob(f"*{TENSORS}") if path.name not in known)
        return found + [f"{path}: is not in the manifest" for path in strange]

    def _faults(self, directory: Path) -> list[str | None]:
        def fault(name: str) -> str | None:
            size, digest = self.files[name]
            try:
                if (seen := _size(directory / name)) != size:
                    return f"has {seen} bytes, the manifest says {size}"
                return None if sha256(directory / name) == digest else "its sha256 is not the one in the manifest"
            except FileNotFoundError:
                return "is missing"
            except OSError as error:
                return f"cannot be read ({error.strerror})"

        return _each(fault, self.files)


def listed(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file in a directory, each seen onto the disk first."""
    names = sorted(path.name for path in directory.iterdir())

    def entry(name: str) -> tuple[int, str]:
        sync(directory / name)
        return _size(directory / name), sha256(directory / name)

    return dict(zip(names, _each(entry, names), strict=True))


def sha256(file: Path) -> str:
    """The file's sha256, hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(file: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    file.write_text(text + "\n", encoding="utf-8")
    sync(file)


def _size(file: Path) -> int:
    return file.stat().st_size


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _each(function: Any, names: Iterable[str]) -> list[Any]:
    # Hashing leaves the interpreter's lock: one thread reads about 1.5 GB/s, a large checkpoint wants several.
    with ThreadPoolExecutor(max_workers=max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        return list(pool.map(function, names))
