"""What `bench ops` found: times beside the roof and the peers, and whether each result was right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORWARD, BACKWARD, WHOLE = "forward", "backward", "forward+backward"
# FLOPs a byte from which a rate is told in FLOP/s where no machine says what binds.
_DENSE = 64.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The largest error of a result against the reference, and how much may be.

    Both are relative to the largest number of the reference; of choices, the share of rows that differ.
    """

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        # What is not a number is not below anything.
        return self.error <= self.allowed


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate's time and check.

    seconds: median device time of a call. spread: interquartile range over the median. captured: timed as a node of a
    CUDA graph. failure: why there is no time or no verdict.
    """

    name: str
    seconds: float | None = None
    spread: float = 0.0
    captured: bool = False
    verdict: Verdict | None = None
    failure: str = ""

    @property
    def state(self) -> str:
        """right, wrong, unchecked or failed."""
        if self.seconds is None:
            return "failed"
        if self.verdict is None:
            return "unchecked"
        return "right" if self.verdict.right else "wrong"

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "spread": self.spread,
            "captured": self.captured,
            "state": self.state,
            "error": self.verdict and self.verdict.error,
            "allowed_error": self.verdict and self.verdict.allowed,
            "failure": self.failure,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """One pass of one operation at one shape.

    flops by precision, bytes: the operations' own prices. roof_seconds, bound: of the machine, None without one.
    ceiling_seconds: the same with the ceilings that were measured on it, None where none were.
    """

    operation: str
    shape: str
    which: str
    ours: Measured
    peers: tuple[Measured, ...] = ()
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    roof_seconds: float | None = None
    bound: str | None = None
    ceiling_seconds: float | None = None

    @property
    def label(self) -> str:
        return f"{self.operation} {self.shape} {self.which}"

    @property
    def flop_per_s(self) -> float | None:
        """FLOP/s of the precision that does most of the arithmetic."""
        return max(self.flops.values(), default=0.0) / self.ours.seconds if self.ours.seconds else None

    @property
    def bytes_per_s(self) -> float | None:
        """Unique bytes a second."""
        return self.bytes / self.ours.seconds if self.ours.seconds else None

    @property
    def by_compute(self) -> bool:
        """Whether FLOP/s, and not bytes a second, say how fast this is."""
        if self.bound is not None:
            return self.bound == "compute"
        return max(self.flops.values(), default=0.0) > _DENSE * self.bytes

    @property
    def share_of_roof(self) -> float | None:
        return self._share(self.roof_seconds)

    @property
    def share_of_ceiling(self) -> float | None:
        return self._share(self.ceiling_seconds)

    def _share(self, least: float | None) -> float | None:
        return None if least is None or not self.ours.seconds else least / self.ours.seconds

    @property
    def best_peer(self) -> Measured | None:
        """The fastest peer whose result is right."""
        right = [peer for peer in self.peers if peer.state == "right"]
        return min(right, key=lambda peer: peer.seconds or 0.0, default=None)

    @property
    def speed_up(self) -> float | None:
        """The best peer's time over ours; above 1 ours is faster."""
        best = self.best_peer
        return best.seconds / self.ours.seconds if best and best.seconds and self.ours.seconds else None

    def to_json(self) -> dict[str, Any]:
        best = self.best_peer
        return {
            "operation": self.operation,
            "shape": self.shape,
            "pass": self.which,
            **self.ours.to_json(),
            "flops": dict(self.flops),
            "bytes": self.bytes,
            "flop_per_s": self.flop_per_s,
            "bytes_per_s": self.bytes_per_s,
            "bound": self.bound,
            "roof_seconds": self.roof_seconds,
            "share_of_roof": self.share_of_roof,
            "share_of_measured_ceiling": self.share_of_ceiling,
            "best_peer": best and best.name,
            "speed_up": self.speed_up,
            "peers": {peer.name: peer.to_json() for peer in self.peers},
        }


@dataclass(frozen=True, slots=True)
class Result:
    """All rows of a run. device: what ran. machine: whose roof it stands beside, "" for none."""

    device: str
    machine: str
    dtype: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def bad(self) -> list[str]:
        """Rows whose own result is wrong, or that did not run."""
        return [f"{row.label} ({row.ours.state})" for row in self.rows if row.ours.state in ("wrong", "failed")]

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "machine": self.machine,
            "dtype": self.dtype,
            "facts": list(self.facts),
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }
