"""From measured samples to expected times: slowdown against ideal work, interpolated over the logarithms of sizes.

An operation takes `floor + work · slowdown`: the floor is what any call costs, work = FLOPs/peak + bytes/bandwidth of
main memory + bytes on the link, and the slowdown, unlike time, varies slowly with size, so that few samples serve.
Their sum rather than their maximum, and main memory rather than a cache, because neither has a kink: left out one by
one on a 2-core CPU, linears came back within 12% on average instead of 20%. Suffixes, S: samples, D: log2 of each
size, then of the work and of its balance, compute time / memory time; only the last two where sizes do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rooflight.hardware.figures import ANY, STAND_INS, Estimate, Sample

if TYPE_CHECKING:
    from rooflight.hardware.machine import Machine

NEIGHBOURS = 10
CACHE_LIMIT = 65536
# Beyond a factor of 16 to either side of the ridge the lesser term no longer matters.
BALANCE_LIMIT = 4.0
# Sizes equal and work this close: the sample is the call that is asked for.
SAME_WORK = 0.02
MOST_SLOWDOWN = 64.0
MATMUL_LIKE = frozenset({"matrix multiply", "sliding window", "sequential state"})
DYNAMIC = "dynamic computation"

FloatArray = NDArray[np.float64]


class Work:
    """The ideal seconds of a call: their sum, the balance of compute to memory, and the roof that bounds it."""

    __slots__ = ("balance", "communication", "roof", "total")

    def __init__(
        self,
        machine: Machine,
        flops: Mapping[str, float],
        bytes: float,
        link_bytes: float = 0.0,
        link: str | None = None,
    ) -> None:
        compute, cached, self.communication = machine.terms(flops, bytes, link_bytes, link)
        memory = float(bytes) / machine.memory_bandwidth.value
        self.total = compute + memory + self.communication
        self.roof = max(compute, cached, self.communication)
        if compute <= 0 or memory <= 0:
            self.balance = BALANCE_LIMIT if compute > 0 else -BALANCE_LIMIT
        else:
            self.balance = min(max(math.log2(compute / memory), -BALANCE_LIMIT), BALANCE_LIMIT)

    @property
    def point(self) -> tuple[float, float]:
        return math.log2(max(self.total, 1e-12)), self.balance


def blend(x_SD: FloatArray, y_S: FloatArray, query_D: FloatArray) -> float:
    """Inverse-distance mean over the nearest samples, weights ((R − d)/(R·d))² with R the first distance left out.

    The weight fades to nothing at R, so the result has no jumps where neighbours change (Franke & Little 1980).
    """
    distance_S = np.sqrt(((x_SD - query_D) ** 2).sum(axis=1))
    order_S = np.argsort(distance_S, kind="stable")
    nearest = order_S[: NEIGHBOURS + 1]
    if distance_S[nearest[0]] < 1e-9:
        return float(y_S[nearest[0]])
    radius = float(distance_S[nearest[-1]]) * (1.0 if len(order_S) > NEIGHBOURS else 2.0) + 1e-9
    weight = ((radius - distance_S[nearest]) / (radius * distance_S[nearest])) ** 2
    if weight.sum() <= 0:
        return float(y_S[nearest].mean())
    return float((weight * y_S[nearest]).sum() / weight.sum())


class Curve:
    """Samples of one operation at one precision, as arrays ready for look-up."""

    def __init__(self, machine: Machine, samples: Sequence[Sample]) -> None:
        self.rank = len(samples[-1].size)
        samples = [sample for sample in samples if len(sample.size) == self.rank]
        works = [Work(machine, sample.flops, sample.bytes, sample.link_bytes) for sample in samples]
        seconds_S = np.array([sample.seconds for sample in samples])
        # A sample may beat the floor that was measured on another operation; the least time seen then stands for it.
        self.floor = min(machine.floor_seconds, 0.9 * float(seconds_S.min()))
        total_S = np.maximum(np.array([work.total for work in works]), 1e-12)
        beyond_S = seconds_S - self.floor
        # A tiny call's time is all latency: taken for a slowdown (of 4 bytes' fill: a millionfold) it ruins large ones.
        tiny_S = (total_S < 0.1 * self.floor) & (beyond_S > MOST_SLOWDOWN * total_S)
        self.latency_S = np.where(tiny_S, beyond_S - total_S, 0.0)
        self.log_slowdown_S = np.log((beyond_S - self.latency_S) / total_S)
        log_size_SD = np.log2(np.array([sample.size for sample in samples], dtype=float))
        self.by_work_SD = np.array([work.point for work in works])
        self.by_size_SD = np.concatenate([log_size_SD, self.by_work_SD], axis=1)
        self.low_D, self.high_D = log_size_SD.min(axis=0) - 1e-9, log_size_SD.max(axis=0) + 1e-9
        self.exact = {s.size: (s.seconds, work.total) for s, work in zip(samples, works, strict=True)}

    def hit(self, size: tuple[int, ...], work: Work) -> float | None:
        """Measured seconds of exactly this call, if it is among the samples."""
        found = self.exact.get(size)
        if found is None or abs(found[1] - work.total) > SAME_WORK * work.total:
            return None
        return found[0]

    def at_size(self, size: tuple[int, ...], work: Work) -> tuple[float, bool]:
        """Slowdown at a size, and whether every dimension lies inside the samples."""
        log_size_D = np.log2(np.maximum(np.array(size, dtype=float), 1.0))
        inside = bool((log_size_D >= self.low_D).all() and (log_size_D <= self.high_D).all())
        query_D = np.concatenate([log_size_D, work.point])
        return self._slowdown(self.by_size_SD, query_D, work), inside

    def at_work(self, work: Work) -> float:
        """Slowdown of whatever does as much work with the same balance of compute to memory."""
        return self._slowdown(self.by_work_SD, np.array(work.point), work)

    def _slowdown(self, at_SD: FloatArray, query_D: FloatArray, work: Work) -> float:
        latency = blend(at_SD, self.latency_S, query_D) if self.latency_S.any() else 0.0
        return math.exp(blend(at_SD, self.log_slowdown_S, query_D)) + latency / max(work.total, 1e-12)


class Efficiency:
    """A machine's curves and the order in which they are asked."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._samples: dict[tuple[str, str], list[Sample]] = {}
        for sample in machine.samples:
            self._samples.setdefault((sample.curve, sample.precision), []).append(sample)
        self._curves: dict[tuple[str, str], Curve] = {}
        self._estimates: dict[tuple[object, ...], Estimate] = {}

    def curve(self, name: str, precision: str) -> Curve | None:
        """The samples of one operation at exactly one precision."""
        key = (name, precision)
        if key not in self._curves and key in self._samples:
            self._curves[key] = Curve(self._machine, self._samples[key])
        return self._curves.get(key)

    def nearest_precision(self, name: str, precision: str) -> tuple[Curve, str] | None:
        """The samples of one operation at the precision that behaves most alike: a stand-in first, then any."""
        for other in (*STAND_INS.get(precision, ()), *STAND_INS):
            curve = self.curve(name, other)
            if curve is not None:
                return curve, other
        return None

    def estimate(
        self,
        name: str,
        precision: str | None,
        size: tuple[int, ...],
        flops: Mapping[str, float],
        bytes: float,
        primitive: str,
        link_bytes: float,
        link: str | None,
    ) -> Estimate:
        """`Machine.estimate`, remembered: a report asks for the same call hundreds of times."""
        key = (name, precision, size, tuple(flops.items()), bytes, primitive, link_bytes, link)
        found = self._estimates.get(key)
        if found is None:
            if len(self._estimates) >= CACHE_LIMIT:
                self._estimates.clear()
            found = self._estimate(name, precision or ANY, size, flops, bytes, str(primitive), link_bytes, link)
            self._estimates[key] = found
        return found

    def _estimate(
        self,
        name: str,
        precision: str,
        size: tuple[int, ...],
        flops: Mapping[str, float],
        bytes: float,
        primitive: str,
        link_bytes: float,
        link: str | None,
    ) -> Estimate:
        machine = self._machine
        work = Work(machine, flops, bytes, link_bytes, link)
        if work.roof <= 0:
            return Estimate(0.0, "datasheet", "no arithmetic and no bytes")
        own = self.curve(name, precision) or self.curve(name, ANY)
        if own is not None and len(size) == own.rank:
            seconds = own.hit(size, work)
            if seconds is not None:
                return Estimate(max(work.roof, seconds), "measured", f"{name} of this size was measured")
            slowdown, inside = own.at_size(size, work)
            how = f"{name} between measured sizes" if inside else f"{name} beyond measured sizes"
            seconds = max(work.roof, own.floor + work.total * slowdown)
            return Estimate(seconds, "interpolated" if inside else "extrapolated", how)
        if work.communication > 0:
            return self._collective(work, size, link)
        best = self._stand_in(name, precision, size, work, primitive)
        if best is None and machine.reference is not None:
            best = machine.reference._efficiency._stand_in(name, precision, (), work, primitive)
            best = best and (best[0], f"as {machine.reference.name}'s {best[1]} of the same work")
        if best is None:
            return Estimate(machine.floor_seconds + work.roof, "datasheet", "no samples: the roof and one launch")
        slowdown, how = best
        return Estimate(max(work.roof, machine.floor_seconds + work.total * slowdown), "extrapolated", how)

    def _stand_in(
        self, name: str, precision: str, size: tuple[int, ...], work: Work, primitive: str
    ) -> tuple[float, str] | None:
        """Slowdown from the likest samples: this operation at any precision, else a linear's or a copy's."""
        matmul_like = primitive in MATMUL_LIKE or (primitive == DYNAMIC and work.balance > 0)
        for likeness in (name, "linear" if matmul_like else "copy"):
            exactly = self.curve(likeness, precision) or self.curve(likeness, ANY)
            found = (exactly, precision) if exactly is not None else self.nearest_precision(likeness, precision)
            if found is None:
                continue
            curve, unit = found
            how = likeness if unit == ANY or likeness == "copy" else f"{likeness} in {unit}"
            if size and len(size) == curve.rank and likeness != "copy":
                return curve.at_size(size, work)[0], how
            return curve.at_work(work), how
        return None

    def _collective(self, work: Work, size: tuple[int, ...], link: str | None) -> Estimate:
        """A collective without samples of its own: ring steps of latency, then the link's bandwidth."""
        way = self._machine.link(link)
        latency = way.latency_seconds * max(1, (size[0] if len(size) > 1 else 2) - 1)
        for other in ("all_reduce", "all_gather", "reduce_scatter", "send"):
            curve = self.curve(other, ANY)
            if curve is not None:
                return Estimate(
                    max(work.roof, latency + work.total * curve.at_work(work)), "extrapolated", f"as {other}"
                )
        return Estimate(latency + work.roof, "datasheet", f"latency and bandwidth of {way.name}")
