"""A recorder for tests: run something on fake tensors and collect the price of every operator, in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.ops import aten
from rooflight.ops.cost import Cost, Count


@dataclass
class Recording:
    calls: list[tuple[str, Cost]] = field(default_factory=list)

    def named(self, name: str) -> list[Cost]:
        return [cost for called, cost in self.calls if called.split("::")[1].split(".")[0] == name]

    def one(self, name: str) -> Cost:
        (cost,) = self.named(name)
        return cost

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.calls}

    def flops(self, precision: str | None = None) -> Count:
        return sum(c.total_flops if precision is None else c.flops.get(precision, 0) for _, c in self.calls)


class Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if aten.decomposes(func):
            with self:
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        cost = aten.price(func, args, kwargs, output)
        if cost is not None:
            self.recording.calls.append((func.name(), cost))
        return output


@contextmanager
def recording() -> Iterator[Recording]:
    """Prices of everything inside the block, which sees fake tensors only."""
    record = Recording()
    with FakeTensorMode(), Recorder(record):
        yield record


def price_call(call: Callable[..., Any], *shapes: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Recording:
    """Prices of `call` over fresh fake tensors of these shapes; what is not a tuple of sizes is passed as it is."""
    record = Recording()
    with FakeTensorMode():
        args = [torch.empty(s, dtype=dtype) if isinstance(s, tuple) else s for s in shapes]
        with Recorder(record):
            call(*args, **kwargs)
    return record


def price_module(module: nn.Module, *inputs: torch.Tensor, backward: bool = False) -> Recording:
    """Prices of a module's forward, and of the backward from a gradient of its (first) output."""
    mode = FakeTensorMode()
    module = copy.deepcopy(module)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, mode.from_tensor(buffer))
    record = Recording()
    fakes = [mode.from_tensor(x) for x in inputs]
    if backward and not any(p.requires_grad for p in module.parameters()):
        for fake in fakes:
            fake.requires_grad_()
    with mode, Recorder(record):
        out = module(*fakes)
        if backward:
            out = out[0] if isinstance(out, tuple) else out
            # A dense gradient: that of a sum is one number, expanded.
            out.backward(torch.empty_like(out))
    return record
