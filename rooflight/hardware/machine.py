"""`Machine`: what one device can do, as roofs, links and samples; the only place that knows a chip's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rooflight.errors import InvalidValue
from rooflight.hardware.efficiency import Efficiency
from rooflight.hardware.figures import Estimate, Figure, Link, Sample, stand_ins

# A working set up to this multiple of a cache still finds part of its data there, so the cache's roof holds for it.
CACHE_REACH = 2.0


@dataclass(frozen=True, slots=True)
class Machine:
    """One device and its surroundings.

    peaks: dense FLOP/s by precision; fp32 is true fp32, tensor-core fp32 is tf32.
    memory_bandwidth: bytes/s of main memory. memory_bytes: capacity.
    caches: bytes by level ("l1", "l2", "l3", "shared"), summed over the device.
    launch_eager_seconds, launch_graph_seconds: cost of one launch from Python, and as a node of a captured graph.
    measured: ceilings reached in practice, "copy" and "read" in bytes/s, "matmul.bf16" … in FLOP/s, and on a CPU
        "bandwidth.l2" … in bytes/s, the roof of a working set that a cache holds.
    samples: measured calls, from which efficiency is interpolated. reference: the machine whose efficiency stands in
        where this one has none of its own. curves: the names of those samples' curves.
    """

    name: str
    title: str
    kind: str
    peaks: Mapping[str, Figure]
    memory_bandwidth: Figure
    memory_bytes: Figure
    launch_eager_seconds: Figure
    launch_graph_seconds: Figure
    caches: Mapping[str, Figure] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)
    measured: Mapping[str, Figure] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    samples_source: str = ""
    power_watts: Figure | None = None
    price_per_hour: Figure | None = None
    aliases: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()
    reference: Machine | None = field(default=None, repr=False, compare=False)
    curves: frozenset[str] = field(init=False, repr=False, compare=False)
    _cached_levels: tuple[tuple[float, float], ...] = field(init=False, repr=False, compare=False)
    _efficiency: Efficiency = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        levels = [
            (size.value * CACHE_REACH, self.measured[f"bandwidth.{level}"].value)
            for level, size in self.caches.items()
            if f"bandwidth.{level}" in self.measured
        ]
        object.__setattr__(self, "curves", frozenset(sample.curve for sample in self.samples))
        object.__setattr__(self, "_cached_levels", tuple(sorted(levels)))
        object.__setattr__(self, "_efficiency", Efficiency(self))

    @property
    def floor_seconds(self) -> float:
        """The least device time of any call: a graph node on a GPU, the dispatcher's overhead on a CPU."""
        return (self.launch_eager_seconds if self.kind == "cpu" else self.launch_graph_seconds).value

    def peak(self, precision: str) -> tuple[float, str]:
        """Dense FLOP/s at a precision and the name of the unit that does it: its own, or the first stand-in.

        Raises InvalidValue for an unknown precision, and where the machine has neither it nor a stand-in.
        """
        for unit in (precision, *stand_ins(precision)):
            if unit in self.peaks:
                return self.peaks[unit].value, unit
        raise InvalidValue(
            f"machine {self.name!r} has no {precision} unit and none that stands in; it has {', '.join(self.peaks)}"
        )

    def bandwidth_at(self, working_set: float) -> float:
        """Memory bytes/s for a working set in bytes: main memory's, or a faster cache's where one was measured."""
        return max(
            [self.memory_bandwidth.value, *(rate for reach, rate in self._cached_levels if working_set <= reach)]
        )

    def ridge(self, precision: str) -> float:
        """Arithmetic intensity in FLOP/byte above which compute is the bound: peak / memory bandwidth."""
        return self.peak(precision)[0] / self.memory_bandwidth.value

    def link_for(self, ranks: int) -> Link:
        """The fastest link that joins this many ranks; raises InvalidValue where none does."""
        joining = [link for link in self.links.values() if link.domain >= ranks]
        if not joining:
            known = ", ".join(f"{link.name} ({link.domain})" for link in self.links.values()) or "none"
            raise InvalidValue(
                f"no link of machine {self.name!r} joins {ranks} ranks; its links and the ranks they join: {known}; "
                "use fewer ranks or add a link to its file"
            )
        return max(joining, key=lambda link: link.bandwidth_bytes_per_s)

    def link(self, name: str | None) -> Link:
        """A link by name, the fastest one for None; raises InvalidValue for a name that the machine lacks."""
        if name is None:
            return self.link_for(2)
        if name not in self.links:
            raise InvalidValue(
                f"machine {self.name!r} has no link {name!r}; it has {', '.join(self.links) or 'none'}; use one of them"
            )
        return self.links[name]

    def terms(
        self, flops: Mapping[str, float], bytes: float, link_bytes: float = 0.0, link: str | None = None
    ) -> tuple[float, float, float]:
        """Least seconds for compute (max over precisions of FLOPs/peak), memory (bytes/bandwidth) and link."""
        compute = max(
            (float(count) / self.peak(precision)[0] for precision, count in flops.items() if count), default=0.0
        )
        memory = float(bytes) / self.bandwidth_at(float(bytes))
        communication = float(link_bytes) / self.link(link).bandwidth_bytes_per_s if link_bytes else 0.0
        return compute, memory, communication

    def roof_seconds(
        self, flops: Mapping[str, float], bytes: float, link_bytes: float = 0.0, link: str | None = None
    ) -> tuple[float, str]:
        """Least seconds that physics allows and what binds: compute, memory or communication.

        max over precisions of FLOPs/peak (the units overlap), memory bytes/bandwidth, bytes on the link/its bandwidth.
        """
        compute, memory, communication = self.terms(flops, bytes, link_bytes, link)
        if communication > max(compute, memory):
            return communication, "communication"
        return (compute, "compute") if compute > memory else (memory, "memory")

    def estimate(
        self,
        curve: str,
        precision: str | None,
        size: tuple[int, ...],
        flops: Mapping[str, float],
        bytes: float,
        primitive: str,
        *,
        link_bytes: float = 0.0,
        link: str | None = None,
    ) -> Estimate:
        """Expected device seconds of one call, from the nearest measured samples; never below the roof.

        curve, precision, size, primitive as in ops.cost.Cost; bytes the unique bytes read and written. On a GPU the
        time is that of the device and launching comes on top; on a CPU the dispatcher's overhead is in it.
        """
        return self._efficiency.estimate(curve, precision, size, flops, bytes, primitive, link_bytes, link)
