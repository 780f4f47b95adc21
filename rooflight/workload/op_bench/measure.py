"""Time an operation and its peers at a shape, price it, and check what each of them gives."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from rooflight.hardware import host
from rooflight.hardware.ceilings import cache_bytes, copies_beyond
from rooflight.hardware.figures import Figure
from rooflight.hardware.machine import Machine
from rooflight.hardware.store import match_device
from rooflight.hardware.timing import Timing
from rooflight.ops import batch
from rooflight.ops.cost import PRECISIONS, Cost
from rooflight.workload.op_bench import installed
from rooflight.workload.op_bench.case import Absent, Args, Draw, Operation, Peer, Sizes
from rooflight.workload.op_bench.check import Check, pass_of
from rooflight.workload.op_bench.result import BACKWARD, FORWARD, WHOLE, Measured, Result, Row
from rooflight.workload.op_bench.table import SHAPES
from rooflight.workload.record import Recorder

BUDGET_SECONDS = 0.1  # of one candidate's timing
BUSY = 0.5  # of the cores: so much load from others and a CPU's times are not its own
_CHECKED = 10_000  # seed of the inputs that are checked; those that are timed count up from 0

TimeCalls = Callable[..., Timing]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how to measure.

    machine: whose roof. peers: the names of those that are wanted, all for None.
    """

    device: torch.device
    dtype: torch.dtype
    machine: Machine | None = None
    backward: bool = True
    sweep: bool = False
    peers: frozenset[str] | None = None

    def draw(self, seed: int) -> Draw:
        return Draw(self.device, self.dtype, seed)


def machine_for(name: str, device: torch.device) -> Machine | None:
    """The machine of that name; for none this one as probed, else this GPU's of the catalog, else none."""
    machine = host.find_machine(name, device)
    if name or machine is None or (machine.kind == "cpu") == (device.type == "cpu"):
        return machine
    # What was probed here is the other of this host's two devices.
    return match_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _at_ceilings(machine: Machine) -> Machine | None:
    """The machine with what was reached in practice in place of what its datasheet says."""
    measured = machine.measured
    rates = [measured[name].value for name in ("copy", "read") if name in measured]
    if not rates:
        return None
    peaks = {name: measured.get(f"matmul.{name}", peak) for name, peak in machine.peaks.items()}
    return replace(machine, peaks=peaks, memory_bandwidth=Figure(max(rates), "measured"))


def _least(machine: Machine | None, costs: Sequence[Cost]) -> tuple[float | None, str | None]:
    """Seconds that the operations of a pass take at least, one after the other, and what binds the longest of them."""
    if machine is None or not costs:
        return None, None
    roofs = [machine.roof_seconds(cost.flops, cost.total_bytes) for cost in costs]
    return sum(seconds for seconds, _ in roofs), max(roofs)[1]


@contextlib.contextmanager
def _on_capture_stream(device: torch.device) -> Iterator[None]:
    """Make autograd's nodes on the stream that CUDA graphs are captured on: a backward runs where its forward ran."""
    if device.type != "cuda":
        yield
        return
    graph = torch.cuda.graph
    if graph.default_capture_stream is None:
        graph.default_capture_stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(graph.default_capture_stream):
        yield
    torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class Bench:
    """Rows of one run; `timer` times calls that take turns, as `hardware.timing.Timer` does."""

    def __init__(self, setting: Setting, timer: TimeCalls) -> None:
        self._setting, self._timer = setting, timer
        self._ceilings = _at_ceilings(setting.machine) if setting.machine else None
        self._cache = cache_bytes(setting.device, {}) if setting.device.type == "cuda" else 0.0

    def row(self, operation: Operation, sizes: Sizes, which: str) -> Row:
        """One pass of an operation at one shape, with every candidate timed and then checked."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # Of somebody else's code: nobody can do anything about them here.
            warnings.simplefilter("ignore")
            stack.enter_context(torch.set_grad_enabled(which != FORWARD))
            if operation.batch is not None:
                stack.enter_context(batch.use(operation.batch(*sizes)))
            row = Row(operation.name, operation.label(*sizes), which, Measured("ours"))
            ours = Peer("ours", operation.ours)
            try:
                first = operation.make(self._setting.draw(0), *sizes)
                costs = self._priced(ours, first, operation, which)
                sets = [first, *(operation.make(self._setting.draw(i), *sizes) for i in range(1, self._copies(costs)))]
            except Exception as error:
                return replace(row, ours=Measured("ours", failure=_first_line(error)))
            candidates = [ours, *self._peers(operation)]
            timed = [self._timed(peer, sets, operation, which) for peer in candidates]
            del first, sets
            found = self._checked(candidates, timed, operation, sizes, which)
        roof, bound = _least(self._setting.machine, costs)
        flops: dict[str, float] = {}
        for cost in costs:
            for precision, count in cost.flops.items():
                flops[precision] = flops.get(precision, 0.0) + float(count)
        return replace(
            row,
            ours=found[0] or row.ours,
            peers=tuple(measured for measured in found[1:] if measured is not None),
            flops=flops,
            bytes=float(sum(cost.total_bytes for cost in costs)),
            roof_seconds=roof,
            bound=bound,
            ceiling_seconds=_least(self._ceilings, costs)[0],
        )

    def _priced(self, ours: Peer, args: Args, operation: Operation, which: str) -> list[Cost]:
        """The prices of all that a pass runs; one run that also makes kernels and their workspaces."""
        call = pass_of(ours, args, operation.wrt, which, self._setting.draw(0))
        with Recorder() as recorder:
            call()
        return [record.cost for record in recorder.records]

    def _copies(self, costs: Sequence[Cost]) -> int:
        # On a CPU a repeat finds small data in a cache, and the roof is that cache's.
        return copies_beyond(self._cache, float(sum(cost.bytes_read for cost in costs))) if self._cache else 1

    def _peers(self, operation: Operation) -> list[Peer]:
        device, plain = self._setting.device, operation.plain
        found: list[Peer] = []
        if plain is not None and not (operation.plain_runs_here and device.type == "cpu"):
            found.append(Peer("eager", plain))
        if operation.compiles and device.type == "cuda":
            found.append(Peer("compile", installed.compiled(plain or operation.ours)))
        found += operation.peers(device)
        wanted = self._setting.peers
        return [peer for peer in found if wanted is None or peer.name in wanted]

    def _timed(self, peer: Peer, sets: Sequence[Args], operation: Operation, which: str) -> Measured | None:
        """A candidate's time without a verdict; None where it does not compute such a call."""
        with _compiling(peer):
            try:
                with _on_capture_stream(self._setting.device):
                    draw = self._setting.draw(len(sets))
                    calls = [pass_of(peer, args, operation.wrt, which, draw) for args in sets]
                    # Compiles, tunes and refuses outside of the timing.
                    calls[0]()
                timing = self._timer(calls, budget_seconds=BUDGET_SECONDS)
            except Absent:
                return None
            except Exception as error:
                return Measured(peer.name, failure=_first_line(error))
        return Measured(peer.name, timing.seconds, timing.spread, timing.captured)

    def _checked(
        self, peers: Sequence[Peer], timed: Sequence[Measured | None], operation: Operation, sizes: Sizes, which: str
    ) -> list[Measured | None]:
        """The same with verdicts; inputs are drawn that no timing has seen."""
        try:
            check = Check(operation, sizes, which, lambda: self._setting.draw(_CHECKED))
        except Exception as error:
            told = f"not checked, for the reference failed: {_first_line(error)}"
            return [one and replace(one, failure=one.failure or told) for one in timed]
        found: list[Measured | None] = []
        for peer, one in zip(peers, timed, strict=True):
            if one is None or one.seconds is None:
                found.append(one)
                continue
            with _compiling(peer):
                try:
                    found.append(replace(one, verdict=check.verdict(peer)))
                except Exception as error:
                    found.append(replace(one, seconds=None, failure=_first_line(error)))
        return found


@contextlib.contextmanager
def _compiling(peer: Peer) -> Iterator[None]:
    """Let torch.compile make a backward that can run again and again."""
    if peer.name not in ("compile", "flex"):
        yield
        return
    import torch._functorch.config as functorch

    with functorch.patch(donated_buffer=False):
        yield


def _passes(operation: Operation, sizes: Sizes, backward: bool) -> list[str]:
    trained = backward and operation.wrt and operation.trains(*sizes)
    return [FORWARD, *([WHOLE if operation.whole else BACKWARD] if trained else [])]


def run(operations: Iterable[Operation], setting: Setting, timer: TimeCalls, say: Say = lambda line: None) -> Result:
    """Every pass of the operations at the setting's shapes."""
    bench = Bench(setting, timer)
    busy = _busy(setting.device)
    rows: list[Row] = []
    for operation in operations:
        for sizes in SHAPES[operation.name].on(setting.device, setting.sweep):
            for which in _passes(operation, sizes, setting.backward):
                say(f"{operation.name} {operation.label(*sizes)} {which}")
                rows.append(bench.row(operation, sizes, which))
                if setting.device.type == "cuda":
                    _forget()
    return Result(
        host.device_title(setting.device),
        setting.machine.title or setting.machine.name if setting.machine else "",
        PRECISIONS[setting.dtype],
        _facts(setting),
        tuple(rows),
        (*busy, *_notes(setting, rows)),
    )


def _busy(device: torch.device) -> list[str]:
    """A note where others keep a CPU's cores busy: two threads that wait for each other then wait for a time slice."""
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    if device.type != "cpu" or load < BUSY * cores:
        return []
    return [f"load {load:.1f} on {cores} cores in the minute before: what else runs here is in these times"]


def _forget() -> None:
    """Give back what a row held: the next one may want all of the memory."""
    import torch._dynamo

    torch._dynamo.reset()
    torch.cuda.empty_cache()


def _facts(setting: Setting) -> tuple[str, ...]:
    gpu = setting.device.type == "cuda"
    return (
        PRECISIONS[setting.dtype],
        host.versions(setting.device),
        "CUDA graph replays, up to 256 sets of inputs take turns, beyond the L2 cache"
        if gpu
        else "inputs as a repeat leaves them",
        "median device time" if gpu else "median wall time",
    )


def _notes(setting: Setting, rows: Sequence[Row]) -> Iterator[str]:
    if setting.machine is None:
        yield "no roof: nothing is known of this machine; run `rooflight probe`, or name one with --on"
    for row in rows:
        for one in (row.ours, *row.peers):
            if one.state == "wrong" and one.verdict is not None:
                yield (
                    f"{row.label}: {one.name} is WRONG: error {one.verdict.error:.2g} where {one.verdict.allowed:.2g} "
                    "is allowed"
                )
            elif one.failure:
                yield f"{row.label}: {one.name} {one.state}: {one.failure}"
    if setting.device.type == "cuda":
        measured = [(row, one) for row in rows for one in (row.ours, *row.peers)]
        eager = [f"{row.label} ({one.name})" for row, one in measured if one.seconds and not one.captured]
        if eager:
            yield f"launched one by one, not from a CUDA graph, so that launching may show: {', '.join(eager)}"
