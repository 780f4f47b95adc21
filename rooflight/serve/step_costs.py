"""Costs of the operations of an engine step as functions of the step's sizes, from one walk with symbolic sizes.

What depends on context lengths, which no size tells, is priced by the operation's own cost function on empty tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils._sympy.printers import PythonPrinter

from rooflight.models.config import ModelConfig
from rooflight.ops import batch as batches
from rooflight.ops.batch import Batch, Group
from rooflight.ops.cost import Cost
from rooflight.ops.op import Op, find
from rooflight.serve.step_program import Choose, StepSizes, step_program
from rooflight.workload import walk as walks
from rooflight.workload.record import FORWARD, Record

# Values that torch may reason with in the walk: different from one another, so that no two sizes look equal.
_HINTS = StepSizes(tokens=5003, sequences=211, rows=97, longest=509, columns=67)._asdict()
_GROUP_HINTS = {"group_count": 13, "group_query": 53, "group_context": 1009}


class _Symbols:
    """Sizes as torch's symbolic integers, and values made of them as Python functions."""

    def __init__(self) -> None:
        self.env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        self._names: dict[Any, str] = {}
        made = {name: self._make(name, hint) for name, hint in {**_HINTS, **_GROUP_HINTS}.items()}
        self.sizes = StepSizes(*(made[name] for name in StepSizes._fields))
        self.facts = Batch((Group(*(made[name] for name in _GROUP_HINTS)),))

    def _make(self, name: str, hint: int) -> Any:
        source = ConstantSource(name)
        symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        self._names[symbol] = name
        return self.env.create_symintnode(symbol, hint=hint, source=source)

    def used(self, values: Sequence[Any]) -> set[str]:
        """Names of the sizes that any of the values depends on."""
        return {self._names[s] for value in values for s in getattr(_expression(value), "free_symbols", ())}

    def source(self, values: Sequence[Any]) -> str:
        """A tuple of values as Python, with the sizes by their names."""
        printer = PythonPrinter()
        texts = []
        for value in map(_expression, values):
            symbols = getattr(value, "free_symbols", ())
            named = (
                value.xreplace({s: type(s)(self._names[s], **s.assumptions0) for s in symbols}) if symbols else value
            )
            texts.append(printer.doprint(named) if hasattr(value, "free_symbols") else repr(value))
        return f"({''.join(f'{text}, ' for text in texts)})"

    def function(self, values: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """The values as a function of the sizes, in the order of StepSizes."""
        names = {"math": math, "torch": torch}
        return eval(f"lambda {', '.join(StepSizes._fields)}: {self.source(values)}", names)


def _expression(value: Any) -> Any:
    node = getattr(value, "node", None)
    return value if node is None else node.expr


class SizedCost:
    """A record whose cost follows from the step's sizes alone.

    depends: indices of the sizes that matter; steps that have them in common have the record in common.
    """

    def __init__(self, record: Record, symbols: _Symbols):
        cost = record.cost
        self._name, self._cost, self._precisions = record.name, cost, tuple(cost.flops)
        values = [cost.bytes_read, cost.bytes_written, cost.serial_steps, *cost.flops.values(), *cost.size]
        used = symbols.used(values)
        self.depends: tuple[int, ...] | None = tuple(i for i, name in enumerate(StepSizes._fields) if name in used)
        self._function = symbols.function(values)
        constant = (cost.curve, cost.precision, cost.primitive, cost.group_size, cost.link_bytes, self._precisions)
        self.key = (record.name, *constant, symbols.source(values))

    def record(self, sizes: StepSizes, facts: Batch) -> Record:
        """The record of a step of these sizes; it holds what `roofline.price` asks for."""
        read, written, serial, *rest = self._function(*sizes)
        count = len(self._precisions)
        cost = replace(
            self._cost,
            flops=dict(zip(self._precisions, rest[:count], strict=True)),
            bytes_read=read,
            bytes_written=written,
            serial_steps=serial,
            size=tuple(rest[count:]),
            parts=(),
        )
        return _bare(self._name, cost)


class ContextCost:
    """A record whose cost depends on the contexts of the step's sequences, and so on every step anew."""

    depends: tuple[int, ...] | None = None

    def __init__(self, op: Op, output: Any, args: Any, kwargs: Any, symbols: _Symbols):
        self._op = op
        leaves, self._spec = tree_flatten((output, args, kwargs))
        made = [_leaf(leaf, symbols) for leaf in leaves]
        self._leaves = [make for _, make in made]
        self.key = (op.name, str(self._spec), tuple(key for key, _ in made))

    def record(self, sizes: StepSizes, facts: Batch) -> Record:
        """The record of a step of these sizes and contexts; it holds what `roofline.price` asks for."""
        output, args, kwargs = tree_unflatten([make(*sizes) for make in self._leaves], self._spec)
        with batches.use(facts):
            return _bare(self._op.name, self._op.price(output, *args, **kwargs))


def _leaf(leaf: Any, symbols: _Symbols) -> tuple[Any, Callable[..., Any]]:
    """What tells an argument from others, and the argument as a function of the sizes; a tensor comes without data."""
    if isinstance(leaf, Tensor):
        dtype, rank, values = leaf.dtype, leaf.dim(), [*leaf.shape, *leaf.stride()]
        at = symbols.function(values)

        def empty(*sizes: int) -> Tensor:
            found = at(*sizes)
            return torch.empty_strided(found[:rank], found[rank:], dtype=dtype, device="meta")

        if symbols.used(values):
            return (dtype, symbols.source(values)), empty
        constant = empty(*_HINTS.values())
        return (dtype, symbols.source(values)), lambda *_: constant
    if symbols.used([leaf]):
        number = symbols.function([leaf])
        return symbols.source([leaf]), lambda *sizes: number(*sizes)[0]
    return repr(leaf), lambda *_: leaf


def _bare(name: str, cost: Cost) -> Record:
    return Record(name, "", "", FORWARD, cost)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """A symbolic walk, the distinct costs among its records, and for each record the number of its cost."""

    walk: walks.Walk
    costs: list[SizedCost | ContextCost]
    numbers: list[int]


def step_costs(config: ModelConfig, dtype: str, kv_dtype: str, block_size: int, choose: Choose) -> StepCosts:
    """Walk an engine step once with symbolic sizes; what follows the layers is recorded in phases of its own."""
    symbols = _Symbols()
    costs: list[SizedCost | ContextCost] = []
    numbers: list[int] = []
    known: dict[Any, int] = {}

    def keep(record: Record, func: Any, args: Any, kwargs: Any) -> None:
        cost = record.cost
        values = [cost.bytes_read, cost.bytes_written, *cost.flops.values(), *cost.size]
        op = find(func)
        # Of one group's sizes nothing can be told of a step of many: such a cost is a sum over all of them.
        if op is not None and symbols.used(values) & _GROUP_HINTS.keys():
            found: SizedCost | ContextCost = ContextCost(op, func(*args, **kwargs), args, kwargs, symbols)
        else:
            found = SizedCost(record, symbols)
        if found.key not in known:
            known[found.key] = len(costs)
            costs.append(found)
        numbers.append(known[found.key])

    with walks.fake_tensors(symbols.env):
        program = step_program(config, dtype, kv_dtype, block_size, symbols.sizes, symbols.facts, choose)
        walk = walks.record(program, keep=keep)
    return StepCosts(walk, costs, numbers)
