"""Figures that every report derives from an `Explanation` in the same way: shares, headroom, names, memory lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
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


def intensity(row: Row) -> float | None:
    """FLOPs a byte; None for the part of a fused operation whose data never leaves the chip."""
    return None if row.flops > 0 and row.bytes_read + row.bytes_written <= 0 else row.intensity


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


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One category: the most bytes that it ever holds, and what it holds when all together hold most."""

    name: str
    most: float
    at_peak: float


def memory_lines(memory: Memory) -> list[MemoryLine]:
    """Bytes by category, those that hold nothing left out; what the categories leave of the total is `other`.

    The most of each may sum to more than the total, for not all of them peak at the same moment.
    """
    most = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations_peak,
        "KV cache": memory.kv_cache,
    }
    at_peak = {category(name): size for name, size in memory.at_peak} or dict(most)
    most |= {name: max(size, most.get(name, 0.0)) for name, size in at_peak.items()}
    lines = [MemoryLine(name, size, at_peak.get(name, 0.0)) for name, size in most.items() if size > 0]
    other = memory.total - sum(line.at_peak for line in lines)
    return [*lines, MemoryLine("other", other, other)] if other > 0.001 * memory.total else lines


def category(name: str) -> str:
    """A memory category as people write it."""
    return "KV cache" if name == "kv cache" else name


def sources(explanation: Explanation) -> list[str]:
    """For each row where most of its expected time comes from, with its share unless it is all: `measured 97%`."""
    of_row: dict[str, Callable[[Row], str]] = {
        "component": lambda row: row.component,
        "op": lambda row: row.op,
        "primitive": lambda row: row.primitive,
    }
    name = of_row.get(explanation.by)
    out = []
    for row in explanation.rows:
        mine = [point for point in explanation.points if name is not None and name(point) == name(row)]
        shares = _shares((p.provenance, p.expected_seconds) for p in mine if p.phase in row.phase)
        mixed = bool(shares) and shares[0].fraction < 0.995
        most = shares[0].name if shares else row.provenance
        out.append(f"{most} {format_percent(shares[0].fraction)}" if mixed else most)
    return out


def fused_text(explanation: Explanation) -> list[str]:
    """For rows that are parts of one fused operation, what they have in common."""
    if explanation.by != "component":
        return []
    parts: dict[tuple[str, str, str], dict[str, None]] = {}
    for point in explanation.points:
        parts.setdefault((point.path, point.op, point.phase), {})[point.component] = None
    together: dict[tuple[str, ...], dict[str, None]] = {}
    for (_, op, _), components in parts.items():
        if len(components) > 1:
            together.setdefault(tuple(components), {})[op] = None
    return [
        f"{', '.join(names[:-1])} and {names[-1]} run as one operation ({', '.join(ops)}): its time is divided by "
        "what each part needs"
        for names, ops in together.items()
    ]


def program_text(explanation: Explanation) -> list[str]:
    """What is run, in words; a module that brings its own arguments has neither batch nor context."""
    size = f"batch {explanation.batch} × context {explanation.context:,}"
    own = "arguments" in explanation.settings
    words = [parameters_text(explanation.params), *([] if own else [size]), explanation.dtype]
    return [word for word in (*words, *settings_text(explanation.settings)) if word]


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
