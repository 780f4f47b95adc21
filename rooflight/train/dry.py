"""`dry_run`: a training step on fake tensors, with its time, memory, rates and the cost of a token budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.hardware.machine import Machine
from rooflight.models.config import ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.train.accounting import Prediction, predict, utilisation
from rooflight.train.fit import Alternative, fit_sentence
from rooflight.train.settings import TrainSettings
from rooflight.train.whole_step import whole_step
from rooflight.workload import explain, memory, rows
from rooflight.workload.explanation import MachineFacts, Memory, Moment, Row, Totals
from rooflight.workload.record import BACKWARD, FORWARD, Record
from rooflight.workload.roofline import Timed

SECONDS_A_DAY = 86400.0
MOMENTS = 240
GRADIENTS = "gradient sums"
# Settings that say how the step is taken, and so belong above its figures.
_SHOWN = (
    "recompute",
    "optimizer",
    "optimizer_dtype",
    "gradient_dtype",
    "master_weights",
    "rounding",
    "clip",
    "activation_gib",
)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a number of tokens takes: steps, days, GPU-hours and, where the machine has a price, dollars.

    source: where the price comes from.
    """

    tokens: int
    steps: int
    days: float
    gpu_hours: float
    usd: float | None
    usd_per_hour: float | None
    source: str


@dataclass(frozen=True, slots=True)
class DryRun:
    """A training step as the dry run found it; bytes are bytes, times seconds.

    kind: gpu or cpu. mfu: causal attention counted half; mfu_full: counted whole. of_ceiling: share of the measured
        GEMM ceiling.
    memory.timeline: moments evenly spaced over the `timeline_seconds` of the walked micro-batches, in each slice the
        one with most bytes. walked_micro_batches: how many of them the timeline shows; all others are like the last.
    components, points: every micro-batch counted.
    """

    model: str
    machine: MachineFacts
    kind: str
    batch_size: int
    micro_batch_size: int
    micro_batches: int
    context: int
    dtype: str
    settings: dict[str, Any]
    params: dict[str, int]
    totals: Totals
    tokens_per_step: int
    tokens_per_second: float
    tokens_per_day: float
    mfu: float | None
    mfu_full: float | None
    of_ceiling: float | None
    memory: Memory
    timeline_seconds: float
    walked_micro_batches: int
    components: list[Row]
    points: list[Row]
    budget: Budget | None
    fits: bool
    verdict: str
    alternatives: list[Alternative]
    provenance: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The stable keys: the fields, as plain data."""
        return asdict(self)


def dry_run(
    name: str,
    config: ModelConfig,
    settings: TrainSettings,
    machine: Machine,
    *,
    tokens: int = 0,
    usd_per_hour: float | None = None,
) -> DryRun:
    """Predict a step of resolved settings on a machine, and what a budget of tokens takes.

    tokens: the budget; 0 for that of the settings, steps · batch · context. usd_per_hour: of the machine; None for the
        price in its file, where that has one.
    """
    prediction = predict(config, settings, machine)
    timed, seconds = prediction.timed, prediction.seconds
    if timed is None or seconds is None:
        raise InvalidValue(f"machine {machine.name!r} gives no time for a step; name one of `rooflight explain --list`")
    whole = whole_step(timed, settings.micro_batches)
    _name_gradients(whole)
    pieces = rows.pieces(whole, machine, None)
    points = rows.site_rows(pieces)
    per_step = settings.batch_size * settings.context
    rate = per_step / seconds
    shares = utilisation(config, settings.context, rate, machine, settings.dtype)
    capacity = machine.memory_bytes.value
    verdict, alternatives = fit_sentence(config, settings, prediction, capacity, machine.title or machine.name)
    return DryRun(
        model=name,
        machine=explain.machine_facts(machine),
        kind=machine.kind,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro,
        micro_batches=settings.micro_batches,
        context=settings.context,
        dtype=settings.dtype,
        settings={key: getattr(settings, key) for key in _SHOWN if _worth_saying(settings, key)},
        params=parameter_counts(config),
        totals=_totals(points, prediction),
        tokens_per_step=per_step,
        tokens_per_second=rate,
        tokens_per_day=rate * SECONDS_A_DAY,
        mfu=shares.mfu,
        mfu_full=shares.mfu_full,
        of_ceiling=shares.of_ceiling,
        memory=replace(prediction.memory, timeline=list(evenly(timed, MOMENTS))),
        timeline_seconds=timed.expected_seconds,
        walked_micro_batches=min(settings.micro_batches, 2),
        components=_components(pieces),
        points=points,
        budget=_budget(tokens or settings.steps * per_step, per_step, rate, machine, usd_per_hour),
        fits=prediction.memory.fits,
        verdict=verdict,
        alternatives=alternatives,
        provenance=explain.provenance(machine, whole, points),
        notes=_notes(settings),
    )


def _worth_saying(settings: TrainSettings, name: str) -> bool:
    """Whether a setting says more than that something is left as it is."""
    value = getattr(settings, name)
    if name in ("master_weights", "gradient_dtype", "rounding"):
        return settings.dtype != "fp32" and value not in ("auto", "nearest")
    return bool(value)


def _totals(points: list[Row], prediction: Prediction) -> Totals:
    flops = sum(row.flops for row in points)
    read, written = sum(row.bytes_read for row in points), sum(row.bytes_written for row in points)
    return Totals(
        flops=flops,
        bytes_read=read,
        bytes_written=written,
        intensity=flops / (read + written) if read + written else 0.0,
        roof_seconds=prediction.roof_seconds or 0.0,
        expected_seconds=prediction.seconds or 0.0,
    )


def _name_gradients(timed: Timed) -> None:
    """Name what adds up gradients: it runs as autograd's own node, in no module."""
    for record in timed.walk.trace.records:
        if not record.component and not record.path and record.phase in (BACKWARD, FORWARD):
            record.component = "loss" if _of_loss(record) else GRADIENTS


def _of_loss(record: Record) -> bool:
    return record.phase == FORWARD or record.name == "aten.ones_like"


def _components(pieces: list[rows.Piece]) -> list[Row]:
    """Rows by component in the order of a decoder, the gradient sums before the optimizer."""
    order = {name: index for index, name in enumerate(rows.COMPONENTS)}
    order[GRADIENTS] = order["optimizer"] - 0.5  # pyright: ignore[reportArgumentType]
    return sorted(rows.component_rows(pieces), key=lambda row: order.get(row.component, len(order)))


def _budget(tokens: int, per_step: int, rate: float, machine: Machine, usd_per_hour: float | None) -> Budget | None:
    if usd_per_hour is not None and not 0 <= usd_per_hour < math.inf:
        raise InvalidValue(f"--usd-per-hour {usd_per_hour} is no price; give dollars, 0 or more")
    if tokens <= 0:
        return None
    steps = -(-tokens // per_step)
    hours = steps * per_step / rate / 3600
    source = "--usd-per-hour"
    if usd_per_hour is None and machine.price_per_hour is not None:
        usd_per_hour, source = machine.price_per_hour.value, machine.price_per_hour.source
    usd = None if usd_per_hour is None else hours * usd_per_hour
    return Budget(tokens, steps, hours / 24, hours, usd, usd_per_hour, source if usd_per_hour is not None else "")


def evenly(timed: Timed, count: int) -> Iterator[Moment]:
    """Memory in `count` slices of equal time, each with the moment in it that has most bytes.

    An operation longer than a slice stands in all that it reaches into, so the peak is always among the moments.
    """
    total = timed.expected_seconds
    best: tuple[float, Moment] | None = None
    at, slot = 0.0, 0
    for step, seconds, now in zip(timed.walk.steps, timed.seconds, memory.play(timed.walk), strict=True):
        at += seconds
        size = sum(now.values())
        if best is None or size > best[0]:
            best = size, Moment(memory.place(timed.walk, step), dict(now))
        reached = min(int(count * at / total), count) if total else count
        if reached > slot:
            yield from [best[1]] * (reached - slot)
            slot = reached
            # What this operation held still stands where the next slice begins.
            best = size, Moment(memory.place(timed.walk, step), dict(now))
    if best is not None:
        yield from [best[1]] * (count - slot)


def _notes(settings: TrainSettings) -> list[str]:
    more = settings.micro_batches - 2
    if more <= 0:
        return []
    return [f"memory is shown over 2 of {settings.micro_batches} micro-batches: the other {more} are like the second"]
