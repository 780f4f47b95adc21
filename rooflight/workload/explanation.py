"""`Explanation`: everything that `rooflight explain` found out, as plain data that every report renders from.

All bytes are plain bytes, all times seconds. `to_json` gives the stable keys that other programs may rely on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Row:
    """Calls that belong together: one component, layer, operation or primitive, by the grouping that was asked for.

    provenance says where expected_seconds comes from: datasheet | measured | interpolated | extrapolated.
    shares: of this row's bytes, per access pattern and per movement, for the divisions further down.
    """

    path: str
    op: str
    component: str
    phase: str
    count: float
    flops: float
    flops_by_precision: dict[str, float]
    bytes_read: float
    bytes_written: float
    traffic: float
    intensity: float
    bound: str
    primitive: str
    access: str
    movement: list[str]
    roof_seconds: float
    expected_seconds: float
    measured_seconds: float | None = None
    formula: str = ""
    provenance: str = "datasheet"


@dataclass(slots=True)
class Division:
    """One slice of the work: a primitive, an access pattern or a movement, with what it accounts for."""

    name: str
    flops: float
    bytes: float
    expected_seconds: float


@dataclass(slots=True)
class Moment:
    """Bytes that stand at one moment of the step, by category."""

    label: str
    bytes: dict[str, float]


@dataclass(slots=True)
class Memory:
    weights: float
    gradients: float
    optimizer: float
    activations_peak: float
    kv_cache: float
    total: float
    capacity: float
    measured_peak: float | None = None
    peak_label: str = ""
    at_peak: list[tuple[str, float]] = field(default_factory=list)
    timeline: list[Moment] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


@dataclass(slots=True)
class Advice:
    """One change and what it would win; savings may be negative where the change costs something."""

    change: str
    saves_seconds: float
    saves_bytes: float
    why: str


@dataclass(slots=True)
class Totals:
    flops: float
    bytes_read: float
    bytes_written: float
    intensity: float
    roof_seconds: float
    expected_seconds: float
    measured_seconds: float | None = None


@dataclass(slots=True)
class MachineFacts:
    """What a roofline plot needs of the machine: peaks in FLOP/s, bandwidth in bytes/s."""

    name: str
    title: str
    peaks: dict[str, float]
    memory_bandwidth: float
    memory_bytes: float
    measured_peaks: dict[str, float] = field(default_factory=dict)
    measured_bandwidth: float | None = None


@dataclass(slots=True)
class Explanation:
    model: str
    machine: MachineFacts
    phase: str
    batch: int
    context: int
    dtype: str
    settings: dict[str, Any]
    params: dict[str, int]
    totals: Totals
    rows: list[Row]
    by: str
    components: list[Row]
    points: list[Row]
    primitives: list[Division]
    access: list[Division]
    movement: list[Division]
    memory: Memory
    advice: list[Advice]
    provenance: dict[str, str]
    legend: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The stable keys; `rows` follow `--by`."""
        out = asdict(self)
        out["machine_facts"] = out["machine"]
        out["machine"] = self.machine.name
        memory = out["memory"]
        memory["fits"] = self.memory.fits
        return out
