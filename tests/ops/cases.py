"""The table of all operations: a row (or more) each, which gives every one the same tests."""

from __future__ import annotations

import importlib
import pkgutil

import rooflight.ops
from rooflight.ops.op import Op, all_ops

from . import cases_attention, cases_dense, cases_loss, cases_rest
from .case import Case

# Every file of ops/, so that an operation in a new one cannot go without a row.
for _module in pkgutil.walk_packages(rooflight.ops.__path__, "rooflight.ops."):
    importlib.import_module(_module.name)

CASES: list[Case] = [*cases_dense.cases(), *cases_attention.cases(), *cases_loss.cases(), *cases_rest.cases()]
OPS: dict[str, Op] = {op.name: op for op in all_ops()}
