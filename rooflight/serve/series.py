"""`Counter` and `Histogram`: plain numbers that become Prometheus' words when asked; their caller holds a lock.

prometheus_client's own take a lock an observation and walk their buckets; an engine adds hundreds of values a step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

LABELS = ("model_name", "engine")

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
FIRST_TOKEN += (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
# vLLM's begin at 10 ms, above a whole decode step of an H200; finer ones below do not disturb its queries.
TOKEN = (0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
TOKEN += (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
REQUEST += (120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
STEP = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
STEP += (1.0, 2.0, 5.0, 10.0)
BATCH = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COMPLETIONS = (1, 2, 5, 10, 20)


@dataclass(slots=True)
class Counter:
    """What only grows; Prometheus writes `_total` after its name."""

    name: str
    help: str
    value: float = 0.0

    def copy(self) -> Counter:
        """One that later changes leave alone."""
        return Counter(self.name, self.help, self.value)

    def family(self, labels: Sequence[str]) -> Metric:
        """Itself under the values of LABELS."""
        family = CounterMetricFamily(self.name, self.help, labels=LABELS)
        family.add_metric(labels, self.value)
        return family


@dataclass(slots=True)
class Histogram:
    """How many values fell at or below each bound and above the one before (the last: above all), and their sum."""

    name: str
    help: str
    bounds: Sequence[float]
    counts: list[int]
    total: float = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Take a value in, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> Histogram:
        """One that later changes leave alone."""
        return Histogram(self.name, self.help, self.bounds, self.counts.copy(), self.total)

    def family(self, labels: Sequence[str]) -> Metric:
        """Itself under the values of LABELS."""
        family = HistogramMetricFamily(self.name, self.help, labels=LABELS)
        edges = [*map(floatToGoString, self.bounds), "+Inf"]
        family.add_metric(labels, list(zip(edges, accumulate(self.counts))), self.total)
        return family


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `most`, as vLLM's histograms of tokens have them."""
    steps = (digit * 10**zeros for zeros in range(len(str(most))) for digit in (1, 2, 5))
    return [step for step in steps if step <= most]
