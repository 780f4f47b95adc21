"""The table of prices: how a rule is added, found and asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue, UnpricedOp
from rooflight.ops.aten.views import VIEWS
from rooflight.ops.cost import Cost

Operator = str | torch._ops.OpOverload | torch._ops.OpOverloadPacket


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator, its arguments bound to the names in its schema.

    reads: every tensor that goes in, once, without those that are only written.
    writes: every tensor that comes out or is changed in place, once.
    """

    func: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    output: Any
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """The operator's name without namespace, overload or the underscore that marks it as in place."""
        return base_name(self.func).split("::")[1]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, *names: str) -> Any:
        """The first of these arguments that the schema has and the caller gave; None when there is none."""
        for name in names:
            value = self.arguments.get(name)
            if value is not None:
                return value
        return None

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.output))

    def first_output(self) -> Tensor:
        for tensor in tensors_in(self.output):
            return tensor
        raise InvalidValue(f"{self.func} returned no tensor; a price for it must not read its output")


Rule = Callable[[Call], Cost | None]
_rules: dict[str, Rule] = {}
_fallbacks: list[Callable[[torch._ops.OpOverload], Rule | None]] = []


def prices(*operators: Operator) -> Callable[[Rule], Rule]:
    """Register the decorated rule, `Call -> Cost`, as the price of these operators.

    A packet (`torch.ops.aten.mm`) or a name ("aten::mm") covers every overload and the in-place form; an overload only
    itself. Names serve for operators that not every version or build of torch has.
    """

    def register(rule: Rule) -> Rule:
        for operator in operators:
            _rules[_key(operator)] = rule
        rule_of.cache_clear()
        return rule

    return register


def fallback(finder: Callable[[torch._ops.OpOverload], Rule | None]) -> Callable[[torch._ops.OpOverload], Rule | None]:
    """Register a finder that gives a rule to whole families of operators that have none by name."""
    _fallbacks.append(finder)
    return finder


def priced_names() -> tuple[str, ...]:
    """The names that have a rule of their own, as they were registered."""
    return tuple(_rules)


def _key(operator: Operator) -> str:
    if isinstance(operator, str):
        return operator
    if isinstance(operator, torch._ops.OpOverload):
        return operator.name()
    return operator._qualified_op_name


def base_name(func: torch._ops.OpOverload) -> str:
    """`aten::add` for `aten::add_.Tensor`."""
    name = func._schema.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


@cache
def rule_of(func: torch._ops.OpOverload) -> Rule | None:
    """The price of one of PyTorch's operators, or None where nobody gave it one."""
    for name in (func.name(), func._schema.name, base_name(func)):
        if name in _rules:
            return _rules[name]
    for finder in _fallbacks:
        rule = finder(func)
        if rule is not None:
            return rule
    return None


def decomposes(func: torch._ops.OpOverload) -> bool:
    """Whether this operator has no price of its own but falls apart into operators that a recorder can see.

    Under `torch.inference_mode` a dispatch mode is handed composites such as aten::layer_norm whole; the recorder then
    returns `func.decompose(*args, **kwargs)` from inside itself instead of pricing the call.
    """
    return func._schema.name not in VIEWS and rule_of(func) is None and func._can_decompose()


def price(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Cost | None:
    """Price of one call as a TorchDispatchMode sees it, below autograd; None for a view, which moves nothing.

    Raises UnpricedOp for an operator that has neither a rule nor a place in VIEWS, and for sparse layouts.
    """
    if func._schema.name in VIEWS:
        return None
    rule = rule_of(func)
    if rule is None:
        raise UnpricedOp(_unpriced(func, args, kwargs))
    call = _bind(func, args, kwargs, output)
    if any(t.layout is not torch.strided for t in (*call.reads, *call.writes)):
        raise UnpricedOp(
            f"{func.name()} was called with a sparse tensor, and what that costs no shape tells; use dense (strided) "
            "tensors, or declare the operation as a rooflight.ops.op.Op"
        )
    return rule(call)


@dataclass(frozen=True, slots=True)
class _Signature:
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    mutated: tuple[str, ...]
    overwritten: tuple[str, ...]
    fresh_returns: tuple[int, ...]
    returns: int


@cache
def _signature(func: torch._ops.OpOverload) -> _Signature:
    schema = func._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    fresh = (i for i, r in enumerate(schema.returns) if r.alias_info is None or not r.alias_info.is_write)
    return _Signature(
        names=tuple(a.name for a in schema.arguments),
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        mutated=tuple(a.name for a in written),
        overwritten=tuple(a.name for a in written if a.kwarg_only or a.name == "out"),
        fresh_returns=tuple(fresh),
        returns=len(schema.returns),
    )


def _bind(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Call:
    signature = _signature(func)
    given = {**signature.defaults, **dict(zip(signature.names, args, strict=False)), **kwargs}
    arguments = {name: given[name] for name in signature.names if name in given}
    reads = [v for name, v in arguments.items() if name not in signature.overwritten]
    writes = [arguments.get(name) for name in signature.mutated]
    if signature.returns == 1:
        writes.extend([output] if signature.fresh_returns else [])
    elif output is not None:
        writes.extend(output[i] for i in signature.fresh_returns)
    return Call(func, arguments, output, _once(reads), _once(writes))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of an argument or a result, lists within lists included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _once(values: Any) -> tuple[Tensor, ...]:
    return tuple({id(t): t for t in tensors_in(values)}.values())


def _unpriced(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    shapes = ", ".join(
        f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in((*args, *kwargs.values()))
    )
    namespace, operator = func._schema.name.split("::")
    return (
        f"{func.name()} has no price; it was called with {shapes or 'no tensors'}; add one with "
        f"`@rooflight.ops.aten.prices(torch.ops.{namespace}.{operator})` on a function from Call to Cost, "
        f"or declare the operation as a rooflight.ops.op.Op"
    )
