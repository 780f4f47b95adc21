"""The engine's clocks: the real one, and a virtual one that a dry runner moves."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds from some fixed moment, never going back."""

    def now(self) -> float: ...


class RealClock:
    """The system's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """Stands still until it is moved forward."""

    def __init__(self, now: float = 0.0):
        self._now = now

    def now(self) -> float:
        return self._now

    def move_to(self, moment: float) -> None:
        """Go forward to `moment`; a moment that has passed changes nothing."""
        self._now = max(self._now, moment)
