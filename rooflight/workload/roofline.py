"""Records × Machine → time: what physics allows, what this machine's measured efficiency allows, and what binds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rooflight.hardware.machine import Machine
from rooflight.ops.cost import Cost, curve_of
from rooflight.workload.record import BACKWARD, Record
from rooflight.workload.walk import Walk

BETWEEN_INFERENCE, BETWEEN_TRAINING = "between.inference", "between.training"
# From the surest to the least sure.
PROVENANCES = ("measured", "interpolated", "extrapolated", "datasheet")


@dataclass(frozen=True, slots=True)
class Priced:
    """Times of one record on a machine: the roof, the expected device time, and the host's time to launch it."""

    roof_seconds: float
    bound: str
    kernel_seconds: float
    host_seconds: float
    provenance: str


def launch_times(machine: Machine) -> dict[str, float]:
    """Least seconds that the host needed to launch each operation eagerly, where that was measured (GPUs).

    The least, for a launch does not grow with the work, but a full queue makes the host wait for the device.
    """
    seen: dict[str, float] = {}
    for sample in machine.samples:
        if sample.host_seconds is not None:
            seen[sample.curve] = min(sample.host_seconds, seen.get(sample.curve, sample.host_seconds))
    return seen


def between_seconds(walk: Walk, machine: Machine) -> float:
    """Seconds of Python between two operations, module calls and autograd, where this machine was probed for it."""
    training = any(record.phase == BACKWARD for record in walk.trace.records)
    curve = BETWEEN_TRAINING if training else BETWEEN_INFERENCE
    return next((sample.seconds for sample in machine.samples if sample.curve == curve), 0.0)


def _curve(cost: Cost, name: str, machine: Machine) -> str:
    """The measured curve that fits a call best: its own, or that of a linear over as odd a width, or the plain one."""
    plain, own = cost.curve or name, curve_of(cost, name)
    if own == plain or own in machine.curves:
        return own
    odd_linear = "linear.unaligned"
    return odd_linear if plain not in machine.curves and odd_linear in machine.curves else plain


def price(record: Record, machine: Machine, launches: Mapping[str, float], *, graph: bool) -> Priced:
    """Roof and expected time of one record; `graph` when launches are nodes of a captured CUDA graph."""
    cost = record.cost
    flops = {name: float(count) for name, count in cost.flops.items()}
    total_bytes = float(cost.total_bytes)
    if not total_bytes and not any(flops.values()) and not cost.link_bytes:
        return Priced(0.0, "launch", 0.0, 0.0, "datasheet")
    link = machine.link_for(cost.group_size).name if cost.group_size > 1 else None
    roof, bound = machine.roof_seconds(flops, total_bytes, float(cost.link_bytes), link)
    curve = _curve(cost, record.name, machine)
    estimate = machine.estimate(
        curve,
        cost.precision,
        tuple(int(n) for n in cost.size),
        flops,
        total_bytes,
        str(cost.primitive),
        link_bytes=float(cost.link_bytes),
        link=link,
    )
    # Steps that wait for one another each pay the device's floor, however small they are.
    kernel = max(estimate.seconds, float(cost.serial_steps) * machine.floor_seconds)
    # The host must launch before the device may start; on a CPU that is part of the call itself.
    host = 0.0
    if machine.kind != "cpu":
        eager = launches.get(curve, machine.launch_eager_seconds.value)
        host = machine.launch_graph_seconds.value if graph else eager
    return Priced(roof, bound, kernel, host, estimate.provenance)


@dataclass(slots=True)
class Timed:
    """A walk with times: for each step of the whole run, seconds that it adds to the end of the run."""

    walk: Walk
    priced: list[Priced]
    seconds: list[float]
    bounds: list[str]
    graph: bool

    @property
    def expected_seconds(self) -> float:
        return sum(self.seconds)

    @property
    def roof_seconds(self) -> float:
        return sum(self.priced[step.record].roof_seconds for step in self.walk.steps)


def time_walk(walk: Walk, machine: Machine, *, graph: bool) -> Timed:
    """Lay the run on two lanes: the host launches in order, the device works in order and waits for a late launch.

    What a step adds to the device lane, waiting included, is its time; a step that mostly waited is bound by launch.
    Python between operations delays the next launch; on a CPU, where both lanes are one, it is part of the step.
    """
    launches = launch_times(machine)
    priced = [price(record, machine, launches, graph=graph) for record in walk.trace.records]
    between = 0.0 if graph else between_seconds(walk, machine)
    seconds, bounds = [], []
    host = device = 0.0
    for step in walk.steps:
        item = priced[step.record]
        host += item.host_seconds + between
        before = device
        device = device + between if machine.kind == "cpu" else max(device, host)
        device += item.kernel_seconds
        seconds.append(device - before)
        waited = device - before - item.kernel_seconds
        floor = item.kernel_seconds <= 2 * machine.floor_seconds and item.roof_seconds < item.kernel_seconds / 2
        bounds.append("launch" if waited > item.kernel_seconds or floor else item.bound)
    return Timed(walk, priced, seconds, bounds, graph)


def weights_of_parts(record: Record, machine: Machine) -> list[tuple[Any, float]]:
    """Parts of a fused record with the share of its time that each gets: in proportion to each part's own roof."""
    roofs = []
    for part in record.cost.parts:
        flops: Mapping[str, float] = {name: float(count) for name, count in part.flops.items()}
        roofs.append(machine.roof_seconds(flops, float(part.bytes_read + part.bytes_written))[0])
    total = sum(roofs)
    if not total:
        return [(part, 1 / len(roofs)) for part in record.cost.parts]
    return [(part, roof / total) for part, roof in zip(record.cost.parts, roofs, strict=True)]


def least_sure(provenances: set[str]) -> str:
    """The least sure of several provenances: a sum is no surer than its parts."""
    return max(provenances, key=PROVENANCES.index) if provenances else "datasheet"
