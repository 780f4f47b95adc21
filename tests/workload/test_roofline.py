"""Times by hand: the roof of a record and what binds it, the lanes of host and device, and the shares of parts."""

from __future__ import annotations

from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.ops.cost import Cost, Part
from rooflight.workload.program import Setting
from rooflight.workload.record import FORWARD, Record, Trace
from rooflight.workload.roofline import least_sure, price, time_walk, weights_of_parts
from rooflight.workload.walk import Step, Walk
from tests.workload.machines import BANDWIDTH, BF16, CPU, EAGER, FP32, GPU, GRAPH, LINK
from tests.workload.setups import FAMILIES, PHASES, walked


def record(**cost: Any) -> Record:
    return Record("thing", "", "", FORWARD, Cost(**cost))


def run(*records: Record) -> Walk:
    return Walk(Trace(list(records), [], {}), [Step(i, None) for i in range(len(records))], {})


def test_the_roof_is_the_largest_term_and_names_it() -> None:
    # 1e12 FLOPs at 1e14 are 10 ms, 2e9 bytes at 1e12 are 2 ms, 1e9 bytes on a link of 1e11 are 10 ms.
    compute = price(record(flops={"bf16": 1e12}, bytes_read=2e9), GPU, {}, graph=False)
    assert (compute.roof_seconds, compute.bound) == (pytest.approx(1e12 / BF16), "compute")
    memory = price(record(flops={"bf16": 1e11}, bytes_read=1.5e9, bytes_written=0.5e9), GPU, {}, graph=False)
    assert (memory.roof_seconds, memory.bound) == (pytest.approx(2e9 / BANDWIDTH), "memory")
    link = price(
        record(flops={"bf16": 1e11}, bytes_read=2e9, link_bytes=1e9, group_size=4, size=(4, 8)), GPU, {}, graph=False
    )
    assert (link.roof_seconds, link.bound) == (pytest.approx(1e9 / LINK.bandwidth_bytes_per_s), "communication")
    # Units of different precisions work side by side: the slower of the two decides.
    both = price(record(flops={"bf16": 1e12, "fp32": 5e11}), GPU, {}, graph=False)
    assert both.roof_seconds == pytest.approx(5e11 / FP32)


def test_without_samples_a_kernel_takes_its_floor_and_its_roof() -> None:
    found = price(record(flops={"bf16": 1e11}, bytes_read=2e9), GPU, {}, graph=False)
    assert found.kernel_seconds == pytest.approx(2e-3 + GRAPH)
    assert found.provenance == "datasheet"
    assert found.host_seconds == EAGER
    assert price(record(bytes_read=2e9), GPU, {}, graph=True).host_seconds == GRAPH
    # A CPU's floor is the dispatcher's and is in the call: nobody launches ahead.
    cpu = price(record(flops={"bf16": 1e11}, bytes_read=2e9), CPU, {}, graph=False)
    assert (cpu.kernel_seconds, cpu.host_seconds) == (pytest.approx(2e-3 + EAGER), 0.0)


def test_an_operation_measured_on_the_host_keeps_it_for_that_long() -> None:
    measured = {"thing": 42e-6, "curve": 7e-6}
    assert price(record(bytes_read=1e6), GPU, measured, graph=False).host_seconds == 42e-6
    assert price(record(bytes_read=1e6, curve="curve"), GPU, measured, graph=False).host_seconds == 7e-6
    assert price(record(bytes_read=1e6), GPU, measured, graph=True).host_seconds == GRAPH


def test_steps_that_wait_for_one_another_each_pay_the_floor() -> None:
    found = price(record(flops={"fp32": 10}, bytes_read=40, serial_steps=500), GPU, {}, graph=False)
    assert found.kernel_seconds == pytest.approx(500 * GRAPH)


def test_what_does_nothing_takes_nothing() -> None:
    found = price(record(), GPU, {}, graph=False)
    assert (found.roof_seconds, found.kernel_seconds, found.host_seconds) == (0.0, 0.0, 0.0)


def test_a_collective_over_more_ranks_than_a_link_joins_is_refused() -> None:
    with pytest.raises(InvalidValue, match="16 ranks"):
        price(record(link_bytes=1e6, group_size=16, size=(16, 8)), GPU, {}, graph=False)


def near(seconds: list[float]) -> Any:
    """Equal but for the eight bytes that a short kernel moves."""
    return pytest.approx(seconds, rel=1e-4)


# A long one of 100 µs on the device, then short ones of next to nothing.
LONG, SHORT = record(bytes_read=100e-6 * BANDWIDTH), record(bytes_read=8)


def test_the_device_waits_for_the_host_when_kernels_are_short() -> None:
    """Host: launches done at 10, 20, 30, 40 µs. Device: each short kernel of 1 µs starts when it has been launched."""
    timed = time_walk(run(SHORT, SHORT, SHORT, SHORT), GPU, graph=False)
    # 0 → 11, 11 → 21, 21 → 31, 31 → 41: the first waits 10 µs, the others 9, each then runs for 1.
    assert timed.seconds == near([11e-6, 10e-6, 10e-6, 10e-6])
    assert timed.expected_seconds == pytest.approx(41e-6, rel=1e-4)
    assert timed.bounds == ["launch"] * 4


def test_the_host_runs_ahead_behind_a_long_kernel() -> None:
    """Host: 10, 20, 30 µs. Device: the long one from 10 to 111, by when both short ones are queued: 112, 113."""
    timed = time_walk(run(LONG, SHORT, SHORT), GPU, graph=False)
    assert timed.seconds == near([111e-6, 1e-6, 1e-6])
    assert timed.bounds[0] == "memory"
    # Short ones do not wait, but their time is the floor that any launch has.
    assert timed.bounds[1:] == ["launch", "launch"]


def test_the_host_is_caught_up_with_again() -> None:
    """Twelve short ones after a long one: launched at 20, 30 … 130 µs, the device frees up at 111 and overtakes."""
    timed = time_walk(run(LONG, *[SHORT] * 12), GPU, graph=False)
    assert timed.seconds[1:10] == near([1e-6] * 9)
    # Launch number 12 is done at 120 µs, where the device has reached 121 (111 + ten of 1 µs) and is not idle yet;
    # number 13 is done at 130 µs, and the device, free at 122, waits.
    assert timed.seconds[10:] == near([1e-6, 1e-6, 9e-6])
    assert timed.expected_seconds == pytest.approx(131e-6, rel=1e-4)


def test_a_graph_launches_at_its_nodes_cost() -> None:
    timed = time_walk(run(SHORT, SHORT, SHORT, SHORT), GPU, graph=True)
    # Nodes launch each microsecond, as fast as kernels run: only the first is waited for.
    assert timed.seconds == near([2e-6, 1e-6, 1e-6, 1e-6])
    assert timed.graph


def test_a_cpu_runs_calls_one_after_the_other() -> None:
    timed = time_walk(run(LONG, SHORT, LONG), CPU, graph=False)
    assert timed.seconds == near([110e-6, 10e-6, 110e-6])
    assert timed.bounds == ["memory", "launch", "memory"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("graph", [False, True])
def test_no_step_beats_its_roof_and_a_graph_is_never_slower(phase: str, graph: bool) -> None:
    walk = walked(FAMILIES["mixtral"], Setting(phase, 2, 19))
    timed = time_walk(walk, GPU, graph=graph)
    for step, seconds in zip(walk.steps, timed.seconds, strict=True):
        assert seconds >= timed.priced[step.record].roof_seconds
    assert timed.roof_seconds <= timed.expected_seconds
    assert timed.roof_seconds == pytest.approx(sum(timed.priced[s.record].roof_seconds for s in walk.steps))
    eager = time_walk(walk, GPU, graph=False)
    assert time_walk(walk, GPU, graph=True).expected_seconds < eager.expected_seconds
    # Small operations in eager mode wait for Python: all but a few launches show in the total.
    assert eager.expected_seconds >= EAGER * len(walk.steps)


def test_parts_share_the_time_by_their_own_roofs() -> None:
    # 2 ms of memory, 1 ms of bf16, 1 ms of fp32: half, a quarter and a quarter.
    parts = (
        Part("scores", {"bf16": 1e11}, bytes_read=2e9),
        Part("context", {"bf16": 1e11}),
        Part("softmax", {"fp32": 1e10}),
    )
    shares = weights_of_parts(record(flops={"bf16": 2e11, "fp32": 1e10}, bytes_read=2e9, parts=parts), GPU)
    assert [(part.component, share) for part, share in shares] == [
        ("scores", pytest.approx(0.5)),
        ("context", pytest.approx(0.25)),
        ("softmax", pytest.approx(0.25)),
    ]
    # Parts that do nothing share evenly.
    empty = weights_of_parts(record(parts=(Part("a", {}), Part("b", {}))), GPU)
    assert [share for _, share in empty] == [0.5, 0.5]


def test_a_sum_is_as_sure_as_its_least_sure_part() -> None:
    assert least_sure({"measured"}) == "measured"
    assert least_sure({"measured", "interpolated"}) == "interpolated"
    assert least_sure({"measured", "interpolated", "extrapolated"}) == "extrapolated"
    assert least_sure({"measured", "datasheet", "extrapolated"}) == "datasheet"
    assert least_sure(set()) == "datasheet"
