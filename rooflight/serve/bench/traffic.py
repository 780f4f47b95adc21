"""`Arrival`: one request of a benchmark and when it comes; arrival times as vLLM draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt of token ids, or for an endpoint of text, that comes `at` seconds after the run's begin."""

    index: int
    prompt: tuple[int, ...]
    output_len: int
    at: float = 0.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of their arrival. timed: whether the dataset itself says when they come."""

    arrivals: tuple[Arrival, ...]
    title: str
    timed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(arrival.prompt) for arrival in self.arrivals)

    @property
    def output_tokens(self) -> int:
        """Output tokens asked for."""
        return sum(arrival.output_len for arrival in self.arrivals)


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Rising seconds at which `count` requests come: gamma intervals of mean 1/rate, scaled to end at count/rate.

    burstiness is the gamma distribution's shape; 1 is a Poisson process. An infinite rate has them all come at 0. The
    generator, the order of its draws and the scaling are those of `vllm bench serve`, so that a seed gives its times.
    """
    if math.isinf(rate) or not count:
        return [0.0] * count
    intervals = np.random.RandomState(seed % 2**32).gamma(burstiness, 1.0 / (rate * burstiness), count)
    times = np.cumsum(intervals)
    return (times * (count / rate / times[-1])).tolist() if times[-1] > 0.0 else [0.0] * count


def spread(traffic: Traffic, rate: float, burstiness: float, seed: int) -> Traffic:
    """The traffic with arrival times at a rate; one that brings its own times is left as it is."""
    if traffic.timed:
        return traffic
    times = arrival_times(len(traffic.arrivals), rate, burstiness, seed)
    return replace(
        traffic, arrivals=tuple(replace(each, at=at) for each, at in zip(traffic.arrivals, times, strict=True))
    )


def warmups(arrivals: Sequence[Arrival], count: int) -> list[Arrival]:
    """`count` requests like the first ones, all at once; their ids run backwards, so that they cache no prefix."""
    like = [arrivals[index % len(arrivals)] for index in range(count)]
    return [replace(each, index=-1 - at, at=0.0, prompt=each.prompt[::-1]) for at, each in enumerate(like)]
