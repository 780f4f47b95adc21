"""What a module's output holds: the tensors that a backward can start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from rooflight.workload.record import tensors_in


def differentiable(output: Any) -> list[Tensor]:
    """The loss where an output names one that carries a gradient, else every tensor in it that does."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return [loss]
    return [tensor for tensor in _tensors(output) if tensor.requires_grad]


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors at any depth, also in dataclasses and in mappings of a library's own kind, which torch does not open."""
    if isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from _tensors(getattr(output, name))
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
    else:
        yield from tensors_in(output)
