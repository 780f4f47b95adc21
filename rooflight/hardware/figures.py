"""The nouns of the hardware room: a sourced figure, a link, one measured sample, and an estimate of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rooflight.errors import InvalidValue

ANY = "any"  # precision of a sample that only moves bytes, whatever they mean

# What stands in for a unit that a chip lacks: the storage type stays small, the arithmetic runs on the next wider unit.
STAND_INS: dict[str, tuple[str, ...]] = {
    "fp64": ("fp32",),
    "fp32": (),
    "tf32": ("fp32",),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "fp8": ("bf16", "fp16", "fp32"),
    "int8": ("bf16", "fp16", "fp32"),
    "fp4": ("fp8", "bf16", "fp16", "fp32"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it comes from: a datasheet, or `measured` and how."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Link:
    """A way between devices; bandwidth is per direction and per device, domain the most ranks that it joins."""

    name: str
    latency_seconds: float
    bandwidth_bytes_per_s: float
    domain: int
    source: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured call of one operation.

    curve: the operation's name, e.g. "linear", "add_rms_norm", "copy", "all_reduce".
    size: (M, N, K) for linear, (rows, columns) and the like for others, (bytes,) for copy and read,
        (ranks, message bytes) for a collective.
    flops, bytes, link_bytes: what the cost model counts for the call.
    seconds: device time a call; on a CPU the call's wall time. host_seconds: time that the host needs to launch it
        eagerly on a GPU, None elsewhere.
    """

    curve: str
    precision: str
    size: tuple[int, ...]
    flops: Mapping[str, float]
    bytes: float
    seconds: float
    host_seconds: float | None = None
    link_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected device seconds, with provenance measured | interpolated | extrapolated | datasheet and a note on how."""

    seconds: float
    provenance: str
    note: str = ""


def stand_ins(precision: str) -> tuple[str, ...]:
    """Precisions to try in turn where a chip has no unit for this one; raises InvalidValue for an unknown name."""
    if precision not in STAND_INS:
        raise InvalidValue(f"unknown precision {precision!r}; use one of {', '.join(STAND_INS)}")
    return STAND_INS[precision]
