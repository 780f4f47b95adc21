"""`Case`: what is being explained, and how a variant of it is predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rooflight.hardware.machine import Machine
from rooflight.models.config import ModelConfig
from rooflight.workload.explanation import Advice, Memory
from rooflight.workload.memory import over_time
from rooflight.workload.program import Setting
from rooflight.workload.roofline import Timed, time_walk
from rooflight.workload.walk import Walk


@dataclass(frozen=True, slots=True)
class Case:
    """What is being explained, and how to predict a variant of it."""

    config: ModelConfig
    setting: Setting
    machine: Machine
    graph: bool
    timed: Timed
    memory: Memory
    predict: Callable[[ModelConfig, Setting], Walk]

    def variant(self, config: ModelConfig, setting: Setting) -> tuple[float, float]:
        """Expected seconds and peak bytes of the changed program."""
        walk = self.predict(config, setting)
        timed = time_walk(walk, self.machine, graph=self.graph)
        return timed.expected_seconds, over_time(walk, self.memory.capacity).total

    def gain(self, change: str, why: str, config: ModelConfig, setting: Setting) -> Advice:
        seconds, size = self.variant(config, setting)
        return Advice(change, self.timed.expected_seconds - seconds, self.memory.total - size, why)
