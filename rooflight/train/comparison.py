"""A step as it ran beside the step as it was predicted: two timelines, and the operations with most headroom."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rooflight.hardware.machine import Machine
from rooflight.train.accounting import Prediction
from rooflight.train.kernel_trace import Kernel, KernelTrace
from rooflight.train.whole_step import whole_step
from rooflight.workload import memory
from rooflight.workload.record import Record
from rooflight.workload.roofline import launch_times, price
from rooflight.workload.walk import general_path, layer_of

# Of the peak: memory that has changed less than this since it was last told is not told again.
_LEAST_CHANGE = 1 / 500


@dataclass(frozen=True, slots=True)
class Slice:
    """One operation on a timeline; seconds since the step began.

    bound, roof_seconds, expected_seconds: of this work on the machine; empty and None without one.
    """

    name: str
    path: str
    phase: str
    layer: int | None
    start: float
    seconds: float
    flops: float
    bytes: float
    roof_seconds: float | None = None
    expected_seconds: float | None = None
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """Predicted bytes by category from a moment on."""

    start: float
    bytes: dict[str, float]


@dataclass(slots=True)
class HeadroomRow:
    """Calls of one operation at one place: measured seconds beside expected and roof, and what binds most of them."""

    operation: str
    path: str
    phase: str
    calls: int = 0
    measured_seconds: float = 0.0
    expected_seconds: float | None = None
    roof_seconds: float | None = None
    bound: str = ""

    @property
    def headroom_seconds(self) -> float:
        """Measured less the roof; all of it where no roof is known."""
        return self.measured_seconds - (self.roof_seconds or 0.0)


@dataclass(slots=True)
class Profile:
    """A step as it ran and as it was predicted.

    seconds: the recorded step's wall time, recording included. host: operations as the host ran (on a GPU: launched)
    them. kernels: what ran on the GPU, `operation` counting in `host`. measured: seconds of each of `host`, on a GPU
    those of its kernels. rows: by falling headroom.
    """

    step: int
    device: str
    machine: str
    seconds: float
    host: list[Slice]
    kernels: list[Kernel]
    measured: list[float]
    predicted: list[Slice]
    memory: list[Held]
    rows: list[HeadroomRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def predicted_seconds(self) -> float | None:
        """The predicted step, its operations laid end to end."""
        return sum(each.seconds for each in self.predicted) if self.predicted else None

    def to_json(self) -> dict[str, Any]:
        """The table and the totals; the timelines are in the trace."""
        return {
            "step": self.step,
            "device": self.device,
            "machine": self.machine,
            "recorded_seconds": self.seconds,
            "measured_seconds": sum(self.measured),
            "predicted_seconds": self.predicted_seconds,
            "rows": [asdict(row) | {"headroom_seconds": row.headroom_seconds} for row in self.rows],
            "notes": self.notes,
        }


def compare(
    records: list[Record],
    seen: KernelTrace,
    prediction: Prediction | None,
    seconds: float,
    device: str,
    step: int,
    micro_batches: int,
) -> Profile:
    """The profile of a recorded step: `seen` holds each operation's span on the host, and a GPU's kernels.

    seconds: of the step with its recording. micro_batches: of the step, as the prediction holds two at most.
    """
    machine = prediction.machine if prediction is not None else None
    predicted, held = _predicted(prediction, micro_batches)
    measured = [seen.ranges.get(index, (0.0, 0.0))[1] for index in range(len(records))]
    notes = [seen.problem + ": times are the host's, of launching alone"] if seen.problem else []
    if seen.kernels:
        measured = [0.0] * len(records)
        for kernel in seen.kernels:
            if kernel.operation is not None and kernel.operation < len(records):
                measured[kernel.operation] += kernel.seconds
    partners, told = partners_of(records, predicted)
    notes += told
    host = _host(records, seen, machine, [predicted[at] if at is not None else None for at in partners])
    profile = Profile(
        step=step,
        device=device,
        machine=(machine.title or machine.name) if machine is not None else "",
        seconds=seconds,
        host=host,
        kernels=seen.kernels,
        measured=measured,
        predicted=predicted,
        memory=held,
        notes=notes,
    )
    profile.rows = _rows(host, measured)
    return profile


def _host(
    records: list[Record], seen: KernelTrace, machine: Machine | None, partners: list[Slice | None]
) -> list[Slice]:
    """What was recorded as slices: the roof of the work that was done, and what was expected of it.

    Expected is what was predicted; of an operation that was not, its own price.
    """
    launches = launch_times(machine) if machine is not None else {}
    found = []
    for index, (record, partner) in enumerate(zip(records, partners, strict=True)):
        start, seconds = seen.ranges.get(index, (0.0, 0.0))
        roof = expected = None
        bound = ""
        if machine is not None:
            priced = price(record, machine, launches, graph=False)
            roof, expected, bound = priced.roof_seconds, priced.kernel_seconds, priced.bound
        layer = layer_of(record.path)
        if partner is not None:
            expected, bound, layer = partner.expected_seconds, partner.bound, partner.layer
        found.append(_slice(record, record.path, layer, start, seconds, roof, expected, bound))
    return found


def _slice(record: Record, path: str, layer: int | None, start: float, seconds: float, *prices: Any) -> Slice:
    flops, size = float(record.cost.total_flops), float(record.cost.total_bytes)
    return Slice(record.name, path, record.phase, layer, start, seconds, flops, size, *prices)


def _predicted(prediction: Prediction | None, micro_batches: int) -> tuple[list[Slice], list[Held]]:
    """Expected times end to end, and memory as it changes with them."""
    if prediction is None or prediction.timed is None:
        return [], []
    timed = whole_step(prediction.timed, micro_batches)
    least = prediction.peak_bytes * _LEAST_CHANGE
    slices: list[Slice] = []
    held: list[Held] = []
    at = 0.0
    for index, (step, now) in enumerate(zip(timed.walk.steps, memory.play(timed.walk), strict=True)):
        record, priced, seconds = timed.walk.trace.records[step.record], timed.priced[step.record], timed.seconds[index]
        path = record.path
        if step.layer is not None and path:
            path = general_path(path).replace("layers.*", f"layers.{step.layer}", 1)
        bound = timed.bounds[index]
        slices.append(_slice(record, path, step.layer, at, seconds, priced.roof_seconds, seconds, bound))
        if not held or any(abs(size - held[-1].bytes.get(kind, 0.0)) > least for kind, size in now.items()):
            held.append(Held(at, dict(now)))
        at += seconds
    return slices, held


def partners_of(records: list[Record], predicted: list[Slice]) -> tuple[list[int | None], list[str]]:
    """For each recorded operation the predicted one that it is, and what is to be said where the two runs differ."""
    if not predicted:
        return [None] * len(records), []
    if [record.name for record in records] == [each.name for each in predicted]:
        return list(range(len(records))), []
    waiting: dict[tuple[str, str, str], list[int]] = {}
    for index in range(len(predicted) - 1, -1, -1):
        each = predicted[index]
        waiting.setdefault((each.name, each.phase, each.path), []).append(index)
    found: list[int | None] = []
    for record in records:
        queue = waiting.get((record.name, record.phase, record.path))
        found.append(queue.pop() if queue else None)
    only_wet = Counter(record.name for record, at in zip(records, found, strict=True) if at is None)
    only_dry = Counter(predicted[at].name for queue in waiting.values() for at in queue)
    notes = [f"the step did {len(records)} operations, {len(predicted)} were predicted; matched by name and place"]
    if only_wet:
        notes.append(f"in the step alone: {counted(only_wet)}")
    if only_dry:
        notes.append(f"predicted alone: {counted(only_dry)}")
    return found, notes


def counted(names: Counter[str], most: int = 6) -> str:
    told = ", ".join(f"{name} ×{count}" for name, count in names.most_common(most))
    return told + (f" and {len(names) - most} more" if len(names) > most else "")


def _rows(host: list[Slice], measured: list[float]) -> list[HeadroomRow]:
    """Rows by operation, place and phase, those with most headroom first."""
    rows: dict[tuple[str, str, str], HeadroomRow] = {}
    bounds: dict[tuple[str, str, str], Counter[str]] = {}
    for each, seconds in zip(host, measured, strict=True):
        key = (each.name, general_path(each.path), each.phase)
        row = rows.setdefault(key, HeadroomRow(*key))
        row.calls += 1
        row.measured_seconds += seconds
        if each.roof_seconds is not None:
            row.roof_seconds = (row.roof_seconds or 0.0) + each.roof_seconds
        if each.expected_seconds is not None:
            row.expected_seconds = (row.expected_seconds or 0.0) + each.expected_seconds
        bounds.setdefault(key, Counter())[each.bound] += 1
    for key, row in rows.items():
        row.bound = bounds[key].most_common(1)[0][0]
    return sorted(rows.values(), key=lambda row: -row.headroom_seconds)
