"""Figures that every report derives from an `Explanation` in the same way: shares, headroom, names, memory lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rooflight.report.units import format_bytes, format_parameters, format_percent, format_seconds
from rooflight.workload.explanation import Advice, Division, Explanation, Memory, Row, Totals

BOUNDS = ("compute", "memory", "launch", "communication")


@dataclass(frozen=True, slots=True)
class Share:
    """A name with its part of a whole, `fraction` from 0 to 1."""

    name: str
    fraction: float


def label(row: Row, by: str) -> str:
    """A row's name under the grouping that was asked for; a row without that name goes by its path, else its op."""
    names = {"component": row.component, "op": row.op, "primitive": row.primitive, "layer": row.path}
    return names.get(by) or row.path or row.component or row.op


def headroom(roof_seconds: float, expected_seconds: float, measured_seconds: float | None = None) -> float | None:
    """Time over roof: of the measured time where there is one, else of the expected; None where the roof is zero."""
    actual = expected_seconds if measured_seconds is None else measured_seconds
    return actual / roof_seconds if roof_seconds > 0 else None


def prediction_error(totals: Totals) -> float | None:
    """Expected over measured, less 1; None for what was not run."""
    return totals.expected_seconds / totals.measured_seconds - 1 if totals.measured_seconds else None


def settings_text(settings: Mapping[str, object]) -> list[str]:
    """Each setting in words: `kv cache dtype fp8`."""
    return [f"{name.replace('_', ' ')} {value}" for name, value in settings.items()]


def time_shares(rows: Iterable[Row]) -> list[float]:
    """Each row's part of the rows' expected time; they sum to 1, whatever the timeline overlaps."""
    times = [row.expected_seconds for row in rows]
    whole = sum(times)
    return [time / whole if whole > 0 else 0.0 for time in times]


def finest(explanation: Explanation) -> list[Row]:
    """Single operations where they were kept, else the table's rows."""
    return explanation.points or explanation.rows


def bound_shares(explanation: Explanation) -> list[Share]:
    """What the expected time is bound by, the largest part first."""
    return _shares((row.bound, row.expected_seconds) for row in finest(explanation))


def provenance_shares(explanation: Explanation) -> list[Share]:
    """Where the expected time comes from, the largest part first."""
    return _shares((row.provenance, row.expected_seconds) for row in finest(explanation))


def _shares(parts: Iterable[tuple[str, float]]) -> list[Share]:
    sums: dict[str, float] = {}
    for name, amount in parts:
        sums[name] = sums.get(name, 0.0) + amount
    whole = sum(sums.values())
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return [Share(name, amount / whole) for name, amount in ordered if whole > 0 and amount > 0]


def flops_by_precision(rows: Iterable[Row]) -> dict[str, float]:
    """FLOPs of all rows by precision, the largest first."""
    sums: dict[str, float] = {}
    for row in rows:
        for precision, flops in row.flops_by_precision.items():
            sums[precision] = sums.get(precision, 0.0) + flops
    return dict(sorted(((name, flops) for name, flops in sums.items() if flops > 0), key=lambda item: -item[1]))


def memory_lines(memory: Memory) -> list[tuple[str, float]]:
    """Bytes by category, those that hold nothing left out; what the categories leave of the total is `other`.

    Categories may sum to more than the total, for not all of them peak at the same moment.
    """
    lines = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations (peak)", memory.activations_peak),
        ("KV cache", memory.kv_cache),
    ]
    other = memory.total - sum(size for _, size in lines)
    if other > 0.001 * memory.total:
        lines.append(("other", other))
    return [(name, size) for name, size in lines if size > 0]


def fit_text(memory: Memory) -> str:
    """Whether the step fits: `fits, 12.3 GiB free` or `does not fit, 3.4 GiB over`."""
    left = memory.capacity - memory.total
    return f"fits, {format_bytes(left)} free" if memory.fits else f"does not fit, {format_bytes(-left)} over"


def divisions(explanation: Explanation) -> list[tuple[str, str, list[Division]]]:
    """(key, title, slices by falling time) of each way to divide the work that has slices."""
    ways = [
        ("primitive", "Primitives", explanation.primitives),
        ("access", "Access patterns", explanation.access),
        ("movement", "Data movement", explanation.movement),
    ]
    return [(key, title, sorted(way, key=lambda part: -part.expected_seconds)) for key, title, way in ways if way]


def gain_text(advice: Advice, expected_seconds: float) -> str:
    """A change's predicted gain in words: `saves 1.20 ms (24%), costs 3.10 GiB`."""
    parts: list[str] = []
    if advice.saves_seconds:
        verb = "saves" if advice.saves_seconds > 0 else "costs"
        fraction = abs(advice.saves_seconds) / expected_seconds if expected_seconds > 0 else 0.0
        parts.append(f"{verb} {format_seconds(abs(advice.saves_seconds))} ({format_percent(fraction)} of the time)")
    if advice.saves_bytes:
        verb = "frees" if advice.saves_bytes > 0 else "takes"
        parts.append(f"{verb} {format_bytes(abs(advice.saves_bytes))}")
    return ", ".join(parts) or "no gain in time or memory"


def parameters_text(params: dict[str, int]) -> str:
    """`46.7 B parameters, 12.9 B active`; active and embedding only where they say something."""
    total = params.get("total", 0)
    text = f"{format_parameters(total)} parameters"
    if params.get("active", total) != total:
        text += f", {format_parameters(params['active'])} active"
    if params.get("embedding"):
        text += f", {format_parameters(params['embedding'])} of them embedding"
    return text


def is_measured(explanation: Explanation) -> bool:
    """Whether the program was also run on the machine."""
    rows = [*explanation.rows, *explanation.components]
    return explanation.totals.measured_seconds is not None or any(row.measured_seconds is not None for row in rows)


def has_phases(rows: Iterable[Row]) -> bool:
    """Whether the rows come from more than one phase, so that a report must name it."""
    return len({row.phase for row in rows}) > 1


def without_indices(path: str) -> str:
    """A module path with the layer numbers taken out: `layers.*.mlp.down`."""
    return re.sub(r"(?<![^.\[])\d+(?![^.\]])", "*", path)
