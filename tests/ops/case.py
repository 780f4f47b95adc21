"""`Case`: one way to try an operation, with its fp64 formula and its scalar program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflight.ops import batch


class Draw:
    """Random arguments of a row, the same ones every time."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(7)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def fp32(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def distinct(self, rows: int, columns: int) -> Tensor:
        """Rows without equal values even in bf16, so that the greatest are the same in every precision."""
        order = torch.stack([torch.randperm(columns, generator=self.generator) for _ in range(rows)])
        return ((order - columns / 2) / 4).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Case:
    """name: the operation's; args(draw) its arguments, all of them; differentiable: positions that take a gradient;
    mutates: positions written in place; collective: needs a process group; without a formula or scalar program, why.
    """

    name: str
    args: Callable[[Draw], tuple[Any, ...]]
    formula: Callable[..., Any] | None = None
    scalar: Callable[..., Any] | None = None
    differentiable: tuple[int, ...] = ()
    mutates: tuple[int, ...] = ()
    label: str = ""
    batch: batch.Batch | None = None
    collective: bool = False
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name
