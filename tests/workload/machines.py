"""A GPU and a CPU of round figures without a single measured sample, so that every time can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rooflight.hardware.figures import Figure, Link
from rooflight.hardware.machine import Machine

# A call takes the floor (a graph node's 1 µs) and its roof; eager launches keep the host busy for 10 µs each.
EAGER, GRAPH = 10e-6, 1e-6
BANDWIDTH, BF16, FP32 = 1e12, 1e14, 1e13
LINK = Link("wire", 1e-6, 1e11, 8, "test")


def _figure(value: float) -> Figure:
    return Figure(value, "test")


GPU = Machine(
    name="round-gpu",
    title="A GPU of round figures",
    kind="gpu",
    peaks={"bf16": _figure(BF16), "fp32": _figure(FP32)},
    memory_bandwidth=_figure(BANDWIDTH),
    memory_bytes=_figure(80e9),
    launch_eager_seconds=_figure(EAGER),
    launch_graph_seconds=_figure(GRAPH),
    links={"wire": LINK},
)
CPU = replace(GPU, name="round-cpu", title="A CPU of round figures", kind="cpu", links={})


def changed(machine: Machine, **changes: Any) -> Machine:
    """The machine with other figures, given as plain numbers."""
    return replace(machine, **{name: _figure(value) for name, value in changes.items()})
