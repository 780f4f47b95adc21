"""Rooflight: a transformer system that can be run dry. It trains, serves and prices models from one program."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rooflight.serve.async_engine import AsyncEngine
    from rooflight.serve.llm import LLM
    from rooflight.serve.params import SamplingParams

__all__ = ["LLM", "AsyncEngine", "SamplingParams"]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "rooflight.serve.llm",
    "AsyncEngine": "rooflight.serve.async_engine",
    "SamplingParams": "rooflight.serve.params",
}


def __getattr__(name: str) -> Any:
    # At first use: a command that needs no engine must not wait for one to be imported.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rooflight' has no attribute {name!r}")
