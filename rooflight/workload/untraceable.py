"""Why a program cannot be run dry, in one line: what was raised, in which line of the user's, and what to do."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

_ROOFLIGHT = Path(__file__).resolve().parent.parent
_TORCH = Path(torch.__file__).resolve().parent
_LONGEST = 200
_VALUES = ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")
_ADVICE = (
    (
        ("CUDA", "NVIDIA driver", "cuda"),
        "leave the module on the CPU: --on says which machine is predicted, whatever this one has",
    ),
    (
        ("Expected inputs of BF16",),
        "torch's fake tensors know this product in bf16 alone: make the module in bf16, or give --dtype bf16",
    ),
    ((".numpy()", "numpy"), "a forward that leaves torch cannot be priced: use torch's own functions"),
)


def cause(error: BaseException) -> str:
    """`ValueError: text (file.py:12 in forward)`, of the deepest frame that is neither torch's nor ours."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1]}…"
    place = _place(error)
    return f"{text} ({place})" if place else text


def advice(error: BaseException) -> str:
    """What to do about it."""
    if type(error).__name__ in _VALUES:
        return (
            "it asks for a tensor's values (.item(), an if on a tensor, a shape that depends on data), which a dry run "
            "does not have: take that branch or size as an argument, or give it a fixed one"
        )
    for marks, way_out in _ADVICE:
        if any(mark in str(error) for mark in marks):
            return way_out
    return "check that the module runs on these arguments outside of Rooflight"


def _place(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        generated = frame.filename.startswith("<")
        if not generated and _ROOFLIGHT not in file.parents and _TORCH not in file.parents and file.suffix == ".py":
            return f"{file.name}:{frame.lineno} in {frame.name}"
    return ""
