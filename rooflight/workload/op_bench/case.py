"""What `bench ops` measures: an operation, how its inputs are drawn from sizes, and who else computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.batch import Batch

Args = tuple[Any, ...]
Sizes = tuple[Any, ...]


class Draw:
    """Random inputs on a device, floating ones in `dtype`; equal seeds draw equal numbers."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        """fp64 numbers in [0, 1)."""
        return torch.rand(shape, device=self.device, dtype=torch.float64, generator=self._generator)

    def tokens(self, count: int, vocabulary: int) -> Tensor:
        """Token ids that fall off as 1/rank, as those of text do."""
        return (vocabulary ** self.uniform(count)).long().clamp_(max=vocabulary - 1)

    def order(self, count: int) -> Tensor:
        """The numbers below `count` in a random order."""
        return torch.randperm(count, device=self.device, generator=self._generator)


def as_is(*args: Any) -> Args:
    """The arguments themselves."""
    return args


class Absent(Exception):
    """A peer that is installed does not compute this call: it is left out, not reported as failed."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody else's way to the same result.

    call(*prepare(*args)): what the operation makes of `args`; `prepare` is not timed. It raises Absent where the peer
        does not compute such a call.
    wrt: the prepared arguments that want gradients, the operation's own places when None.
    gradients: those gradients in the form of the operation's.
    """

    name: str
    call: Callable[..., Any]
    prepare: Callable[..., Args] = as_is
    wrt: tuple[int, ...] | None = None
    gradients: Callable[..., Args] = as_is


def no_peers(device: torch.device) -> list[Peer]:
    """Nobody but torch."""
    return []


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes that are run on a GPU and on a CPU: one or two by default, with --sweep those of the grid too."""

    gpu: tuple[Sizes, ...]
    gpu_grid: tuple[Sizes, ...]
    cpu: tuple[Sizes, ...]
    cpu_grid: tuple[Sizes, ...] = ()

    def on(self, device: torch.device, sweep: bool) -> tuple[Sizes, ...]:
        default, grid = (self.gpu, self.gpu_grid) if device.type == "cuda" else (self.cpu, self.cpu_grid)
        return tuple(dict.fromkeys((*default, *grid))) if sweep else default


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: what it is called, its inputs, and everything that a row of the report needs to know of it.

    make(draw, *sizes): the arguments of `ours` and `plain`, drawn afresh.
    ours(*args): the operation; returns all that it makes or changes in place, gradients apart.
    plain(*args): what one writes in torch, eager; the measure of how much error there may be. None where ours is it.
    label(*sizes): the sizes as a row shows them.
    reference(*args): the meaning, run in a wider type; `plain` (or `ours`) when None.
    peers(device): who else is here.
    wrt: places of the arguments that want gradients; none where the operation has no backward.
    whole: the gradients are made in the forward, so that only both passes together can be timed.
    trains(*sizes): whether a training step makes calls of these sizes, whose backward is then timed.
    batch(*sizes): what shapes cannot tell of the call.
    compiles: whether torch.compile of `plain` is a peer.
    plain_runs_here: `plain` is the operation's own reference, which is what a CPU runs: no peer there.
    tokens: results are choices; rows that differ count, not distances. The first size is the number of rows.
    wide: the reference's type, the next wider one than that of the inputs when None.
    also: other names that it answers to.
    """

    name: str
    about: str
    make: Callable[..., Args]
    ours: Callable[..., Any]
    plain: Callable[..., Any] | None
    label: Callable[..., str]
    reference: Callable[..., Any] | None = None
    peers: Callable[[torch.device], list[Peer]] = no_peers
    wrt: tuple[int, ...] = ()
    whole: bool = False
    trains: Callable[..., bool] = lambda *sizes: True
    batch: Callable[..., Batch] | None = None
    compiles: bool = True
    plain_runs_here: bool = False
    tokens: bool = False
    wide: torch.dtype | None = None
    also: tuple[str, ...] = ()
