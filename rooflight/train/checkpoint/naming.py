"""The names in a directory of checkpoints: whole ones, ones under way, and those that a process left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rooflight.errors import InvalidValue
from rooflight.train.checkpoint.manifest import Manifest

_NAME = re.compile(r"step-\d{8,}(\.\d+)?")
_HIDDEN = re.compile(r"\.step-[\d.]+\.(partial|removed)-(\d+)")


def free_name(directory: Path, step: int) -> Path:
    """step-00000100, or step-00000100.2 where that is taken: the old one stays whole until the new one is."""
    name, count = f"step-{step:08d}", 1
    path = directory / name
    while path.exists():
        count += 1
        path = directory / f"{name}.{count}"
    return path


def partial_name(path: Path) -> Path:
    """Where this process writes the checkpoint that will be `path`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def removed_name(path: Path) -> Path:
    """Where this process puts the checkpoint `path` to remove it."""
    return path.with_name(f".{path.name}.removed-{os.getpid()}")


def readable(directory: Path) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """Checkpoints with a readable manifest, the one saved last first; and what is wrong with the other manifests."""
    found: list[tuple[Path, Manifest]] = []
    problems: list[str] = []
    for path in _entries(directory):
        if path.is_dir() and _NAME.fullmatch(path.name):
            try:
                found.append((path, Manifest.read(path)))
            except InvalidValue as error:
                problems.append(str(error))
    return sorted(found, key=lambda entry: -entry[1].sequence), problems


def abandoned(directory: Path) -> list[tuple[Path, str]]:
    """Hidden directories (partial | removed) of ended processes, and of this one: ask while it writes nothing."""
    matches = ((path, _HIDDEN.fullmatch(path.name)) for path in _entries(directory))
    return [(path, match[1]) for path, match in matches if match and not _another_lives(int(match[2]))]


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _another_lives(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
