"""Every kernel of `rooflight.ops.kernels` is compiled for sm_90 by some test, and stands in docs/kernels.md.

Compiled means: registers, spills and shared memory are looked at.
A test module says which kernels its launches compile in one line beside its imports:

    COMPILES = (norm._rms_norm_kernel, norm._rms_norm_backward_kernel)

A kernel is what no other function of Triton's or Gluon's mentions: what one mentions is compiled with it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any

from triton.runtime.jit import JITFunction

import rooflight.ops.kernels
from tests.ops.cases import OPS

# Being written beside this test; they say themselves what they compile, and are asked for when they stand.
LATER = ("ahead", "few_", "schedule")


def _functions() -> set[JITFunction]:
    """Every function for a GPU that a module of kernels defines."""
    names = [info.name for info in pkgutil.iter_modules(rooflight.ops.kernels.__path__)]
    modules = [importlib.import_module(f"rooflight.ops.kernels.{name}") for name in names if not name.startswith(LATER)]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    return {function for function in found if function.fn.__module__ in {module.__name__ for module in modules}}


def _mentioned(function: JITFunction) -> set[Any]:
    """Other functions that its body names, called or handed on."""
    names = vars(inspect.getmodule(function.fn))
    body = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function.fn))))
    found = (names.get(node.id) for node in body if isinstance(node, ast.Name))
    return {value for value in found if isinstance(value, JITFunction)} - {function}


def _label(function: JITFunction) -> str:
    return f"{function.fn.__module__.removeprefix('rooflight.ops.kernels.')}.{function.fn.__name__}"


def test_every_kernel_is_compiled_ahead_of_time() -> None:
    functions = _functions()
    kernels = functions.difference(*map(_mentioned, functions))
    assert len(kernels) > 25
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    names = [file.stem for file in files if file.stem != Path(__file__).stem]
    tests = [importlib.import_module(f"tests.ops.kernels.{name}") for name in names]
    declared = {kernel for test in tests for kernel in getattr(test, "COMPILES", ())}
    missing = sorted(map(_label, kernels - declared))
    assert not missing, f"no test compiles {', '.join(missing)}: launch them ahead of time and name them in COMPILES"
    gone = sorted(_label(kernel) for kernel in declared & functions if kernel not in kernels)
    assert not gone, f"{', '.join(gone)}: not kernels of their own, others call them"


def test_the_table_of_choices_names_every_operation_with_a_kernel() -> None:
    named = set(re.findall(r"`(\w+)`", (Path(__file__).parents[3] / "docs" / "kernels.md").read_text()))
    missing = sorted(op.name for op in OPS.values() if op.kernel is not None and op.name not in named)
    assert not missing, f"docs/kernels.md does not say who computes {', '.join(missing)}"
