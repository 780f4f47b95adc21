"""Imports run one way: a room may import what stands above it in DESIGN's list, never what stands below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rooflight

PACKAGE = Path(rooflight.__file__).parent
ORDER = (
    "errors",
    "settings",
    "hardware",
    "ops",
    "models",
    "parallel",
    "workload",
    "train",
    "serve",
    "plan",
    "report",
    "cli",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """Rooms that a file imports anywhere in it, lazily too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("rooflight.")}


def wrong_way(room: str, rooms: set[str]) -> list[str]:
    return [other for other in rooms if other in ORDER and ORDER.index(other) > ORDER.index(room)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_above(path: Path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in ORDER, f"{path} is in no room; add it to DESIGN's list and to ORDER"
    assert not wrong_way(room, imported_rooms(path.read_text()))


def test_relative_imports_cannot_hide():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 0), path


def test_the_rule_can_fail():
    assert wrong_way("ops", imported_rooms("from rooflight.models.config import ModelConfig")) == ["models"]
    assert wrong_way("hardware", imported_rooms("import rooflight.workload.walk")) == ["workload"]
