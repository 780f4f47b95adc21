"""The recorder: run anything under it, on fake tensors or real ones, and every operation leaves a priced `Record`."""

from __future__ import annotations

import bisect
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rooflight.ops import aten
from rooflight.ops.cost import Cost
from rooflight.ops.op import find

FORWARD, BACKWARD, RECOMPUTE, OPTIMIZER, COMMUNICATION = (
    "forward",
    "backward",
    "recompute",
    "optimizer",
    "communication",
)
_OUTSIDE = ("", "")  # path and component of what runs in no module


@dataclass(slots=True)
class Record:
    """One operation as it ran.

    changes: (storage, ±bytes) that it made, then those freed before the next record: memory over time is laid out from
        them, and what a layer leaves behind is freed within that layer's records.
    inputs, outputs: the storages that it read and wrote.
    seconds: measured time of the call when the run was wet, else None.
    """

    name: str
    path: str
    component: str
    phase: str
    cost: Cost
    shapes: tuple[tuple[Any, ...], ...] = ()
    changes: list[tuple[int, Any]] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    seconds: float | None = None


@dataclass(slots=True)
class Trace:
    """Everything one run left: records in order, each storage's bytes, and what a storage turned out to be.

    A storage without a kind is one that the run made for itself.
    """

    records: list[Record]
    sizes: list[Any]
    kinds: dict[int, str]


def _sequence_number() -> int:
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


class Recorder(TorchDispatchMode):
    """Records every operation of `module`, forward and backward, with the module path it belongs to.

    A backward operation belongs to the module whose forward made its autograd node: node numbers grow while the
    forward runs, so the numbers at which modules were entered and left tell them apart.
    clock: called around each operation when given; its difference becomes Record.seconds.
    around: wraps each call (a profiler range, say).
    keep: is handed each record with the call that made it, to run it again.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        clock: Callable[[], float] | None = None,
        around: Callable[[int], Any] | None = None,
        keep: Callable[[Record, Any, tuple[Any, ...], dict[str, Any]], None] | None = None,
    ):
        super().__init__()
        self.records: list[Record] = []
        self._clock, self._around, self._keep = clock, around, keep
        self._phase: str | None = None
        self._paths: dict[nn.Module, str] = {}
        if module is not None:
            self._paths = {child: path for path, child in module.named_modules(remove_duplicate=False)}
        self._stack: list[tuple[str, str]] = []
        self._marks: list[int] = [-1]
        self._mark_places: list[tuple[str, str]] = [_OUTSIDE]
        self._hooks: list[Any] = []
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._ids: dict[int, int] = {}
        self._sizes: list[Any] = []
        self._pending: list[tuple[int, Any]] = []
        self._kinds: dict[int, str] = {}

    def __enter__(self) -> Recorder:
        hooks = nn.modules.module
        self._hooks = [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Record what a composite operator falls apart into; the module hooks are in place already."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the phase `name`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def know(self, tree: Any, kind: str) -> None:
        """Storages that stand before the run begins: they are `kind`, and not something that the run made."""
        for tensor in tensors_in(tree):
            self._track(tensor, announce=False)
            self._kinds[self._ids[self._key(tensor)]] = kind

    def label(self, tree: Any, kind: str) -> None:
        """Say what storages made by the run turned out to be, gradients for example."""
        for tensor in tensors_in(tree):
            number = self._ids.get(self._key(tensor))
            if number is not None:
                self._kinds[number] = kind

    def trace(self) -> Trace:
        """The records so far."""
        return Trace(self.records, self._sizes, self._kinds)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        # A module that is not below the recorded one (a loss made in place, say) keeps its caller's place.
        outer = self._stack[-1] if self._stack else _OUTSIDE
        path = self._paths.get(module, outer[0])
        component = getattr(module, "component", None)
        self._stack.append((path, component if isinstance(component, str) and component else outer[1]))
        self._mark()

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        self._marks.append(_sequence_number())
        self._mark_places.append(self._stack[-1] if self._stack else _OUTSIDE)

    def _place(self) -> tuple[tuple[str, str], str]:
        """(path, component) and phase of the operation that is running."""
        node = torch._C._current_autograd_node()
        if node is None:
            return (self._stack[-1] if self._stack else _OUTSIDE), self._phase or FORWARD
        if self._stack:
            return self._stack[-1], RECOMPUTE
        number = node._sequence_nr()
        return self._mark_places[bisect.bisect_right(self._marks, number) - 1], BACKWARD

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _track(self, tensor: Tensor, announce: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        number, size = len(self._sizes), storage.nbytes()
        self._ids[key] = number
        self._sizes.append(size)

        def freed(_: Any, key: int = key, number: int = number) -> None:
            self._alive.pop(key, None)
            if announce:
                # Its maker is recorded by now, so there is a record to free it after.
                self.records[-1].changes.append((number, -self._sizes[number]))

        self._alive[key] = weakref.ref(storage, freed)
        if announce:
            self._pending.append((number, size))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = find(func)
        if op is None and aten.decomposes(func):
            with self._inside():
                return func.decompose(*args, **kwargs)
        seconds = None
        if self._around is not None:
            with self._around(len(self.records)):
                output = func(*args, **kwargs)
        elif self._clock is not None:
            start = self._clock()
            output = func(*args, **kwargs)
            seconds = self._clock() - start
        else:
            output = func(*args, **kwargs)
        if op is not None:
            name, cost = op.name, op.price(output, *args, **kwargs)
        else:
            name, cost = str(func.overloadpacket), aten.price(func, args, kwargs, output)
            if cost is None or _is_nothing(output):
                return output
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(output))
        for tensor in made:
            self._track(tensor)
        for tensor in given:
            self._track(tensor, announce=False)
        (path, component), phase = self._place()
        if cost.group_size > 1:
            phase = COMMUNICATION
        shapes = tuple(tuple(tensor.shape) for tensor in given)
        if op is not None:
            made += tensors_in(op.mutated(*args, **kwargs))
        inputs, outputs = (tuple(self._ids[self._key(t)] for t in tensors) for tensors in (given, made))
        changes, self._pending = self._pending, []
        record = Record(name, path, component, phase, cost, shapes, changes, inputs, outputs, seconds)
        self.records.append(record)
        if self._keep is not None:
            self._keep(record, func, args, kwargs)
        return output


def _is_nothing(output: Any) -> bool:
    """Whether a call made tensors without elements alone: torch 2.11's checkpoint makes one for each layer."""
    made = list(tensors_in(output))
    return bool(made) and all(any(isinstance(size, int) and size == 0 for size in tensor.shape) for tensor in made)


def wall_clock() -> float:
    """Seconds, for recording a run on the CPU, where an operation is over when its call returns."""
    return time.perf_counter()
