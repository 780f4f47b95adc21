"""Numbers that count the arithmetic done with them, so that a scalar program is its own FLOP count.

Counted: + − · / negation, a comparison or maximum of two values, |x|, and one function (exp, log, tanh, erf, √, 1/√,
cos, sin). Not counted: index arithmetic (comparing token numbers, sorting integers) and scalars that the host prepares.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

VECTOR_UNIT, MATMUL_UNIT = "vector", "matmul"
_tally: Counter[str] = Counter()
_unit = VECTOR_UNIT


def _count() -> None:
    _tally[_unit] += 1


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """FLOPs by unit of what runs inside the block."""
    _tally.clear()
    result: Counter[str] = Counter()
    yield result
    result.update(_tally)


class Counted:
    __slots__ = ("value",)

    def __init__(self, value: float):
        self.value = float(value)

    def __add__(self, other: Any) -> Counted:
        _count()
        return Counted(self.value + _value(other))

    def __sub__(self, other: Any) -> Counted:
        _count()
        return Counted(self.value - _value(other))

    def __rsub__(self, other: Any) -> Counted:
        _count()
        return Counted(_value(other) - self.value)

    def __mul__(self, other: Any) -> Counted:
        _count()
        return Counted(self.value * _value(other))

    def __truediv__(self, other: Any) -> Counted:
        _count()
        return Counted(self.value / _value(other))

    def __rtruediv__(self, other: Any) -> Counted:
        _count()
        return Counted(_value(other) / self.value)

    def __neg__(self) -> Counted:
        _count()
        return Counted(-self.value)

    def __abs__(self) -> Counted:
        _count()
        return Counted(abs(self.value))

    def __lt__(self, other: Any) -> bool:
        _count()
        return self.value < _value(other)

    def __le__(self, other: Any) -> bool:
        _count()
        return self.value <= _value(other)

    def __gt__(self, other: Any) -> bool:
        _count()
        return self.value > _value(other)

    def __ge__(self, other: Any) -> bool:
        _count()
        return self.value >= _value(other)

    __radd__ = __add__
    __rmul__ = __mul__


def _value(x: Any) -> float:
    return x.value if isinstance(x, Counted) else float(x)


def _function(f: Any) -> Any:
    def apply(x: Counted) -> Counted:
        _count()
        return Counted(f(x.value))

    return apply


exp, log, tanh, erf, sqrt, cos, sin = (
    _function(f) for f in (math.exp, math.log, math.tanh, math.erf, math.sqrt, math.cos, math.sin)
)
rsqrt = _function(lambda x: 1 / math.sqrt(x))


def larger(a: Any, b: Any) -> Counted:
    _count()
    return Counted(max(_value(a), _value(b)))


def smaller(a: Any, b: Any) -> Counted:
    _count()
    return Counted(min(_value(a), _value(b)))


def total(values: Iterable[Counted]) -> Counted:
    """Sum of n values, n additions: the accumulator starts at zero."""
    result = Counted(0)
    for value in values:
        result = result + value
    return result


def maximum(values: Iterable[Counted], start: float = -math.inf) -> Counted:
    """Maximum of n values, n comparisons: the accumulator starts at −∞, or at `start`."""
    result = Counted(start)
    for value in values:
        result = larger(result, value)
    return result


def dot(a: Sequence[Counted], b: Sequence[Counted], start: Counted | None = None) -> Counted:
    """Product of length K on the matrix unit: 2K, added onto `start` where partial sums go on."""
    global _unit
    _unit = MATMUL_UNIT
    try:
        result = Counted(0) if start is None else start
        for x, y in zip(a, b, strict=True):
            result = result + x * y
        return result
    finally:
        _unit = VECTOR_UNIT


def transpose(matrix: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*matrix, strict=True)]


def matmul(a: Sequence[Sequence[Counted]], b: Sequence[Sequence[Counted]]) -> list[list[Counted]]:
    """a [M, K] times b [K, N]."""
    columns = transpose(b)
    return [[dot(row, column) for column in columns] for row in a]


def lift(x: Any) -> Any:
    """Nested lists of a tensor's values: floats counted, integers plain; anything else as it is."""
    if isinstance(x, float):
        return Counted(x)
    if isinstance(x, list):
        return [lift(item) for item in x]
    return x


def flat(x: Any) -> list[float]:
    """Every number of a nested result, in order; None holds none."""
    if x is None:
        return []
    if isinstance(x, (list, tuple)):
        return [value for item in x for value in flat(item)]
    return [_value(x)]
