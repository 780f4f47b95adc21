"""Expected times: exact at samples, never below the roof, between neighbours in between, and honest about origin."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from rooflight.hardware import Estimate, Machine, Sample, catalog, load
from rooflight.hardware.efficiency import blend

MATMUL, MOVE = "matrix multiply", "data movement"


def linear(machine: Machine, m: int, n: int, k: int, precision: str = "bf16", name: str = "linear") -> Estimate:
    moved = 2.0 * (m * k + n * k + m * n)
    return machine.estimate(name, precision, (m, n, k), {precision: 2.0 * m * n * k}, moved, MATMUL)


def roof(machine: Machine, m: int, n: int, k: int, precision: str = "bf16") -> float:
    return machine.roof_seconds({precision: 2.0 * m * n * k}, 2.0 * (m * k + n * k + m * n))[0]


@pytest.mark.parametrize("name", ["h200", "cloud-cpu"])
def test_every_sample_comes_back_as_it_was_measured(name: str) -> None:
    machine = load(name)
    assert machine.samples
    for s in machine.samples:
        found = machine.estimate(s.curve, s.precision, s.size, s.flops, s.bytes, MOVE, link_bytes=s.link_bytes)
        assert found.provenance == "measured"
        assert found.seconds == pytest.approx(s.seconds, rel=1e-3)


@pytest.mark.parametrize("name", catalog())
def test_never_below_the_roof(name: str) -> None:
    machine = load(name)
    draw = random.Random(7)
    for _ in range(100):
        m, n, k = (2 ** draw.randint(0, 16) + draw.randint(0, 5) for _ in range(3))
        precision = draw.choice(["bf16", "fp32", "fp8", "int8"])
        assert linear(machine, m, n, k, precision).seconds >= roof(machine, m, n, k, precision)
        moved = 2.0 ** draw.uniform(4, 36)
        seconds = machine.estimate("swiglu", "bf16", (m, n), {"fp32": moved}, moved, "elementwise").seconds
        assert seconds >= machine.roof_seconds({"fp32": moved}, moved)[0]


@pytest.mark.parametrize("name", catalog())
def test_expected_stays_within_reason_of_the_roof(name: str) -> None:
    """Large square products reach a quarter of the peak and large copies a third of the bandwidth on every machine."""
    machine = load(name)
    assert linear(machine, 8192, 8192, 8192).seconds < 4 * roof(machine, 8192, 8192, 8192)
    assert (
        machine.estimate("copy", "bf16", (2**30,), {}, 2.0**30, MOVE).seconds < 3 * machine.roof_seconds({}, 2.0**30)[0]
    )


def test_between_samples_lies_between_their_efficiencies() -> None:
    h200 = load("h200")
    efficiencies = [roof(h200, m, 28672, 4096) / linear(h200, m, 28672, 4096).seconds for m in (16, 24, 32)]
    assert linear(h200, 24, 28672, 4096).provenance == "interpolated"
    assert min(efficiencies[0], efficiencies[2]) * 0.9 < efficiencies[1] < max(efficiencies[0], efficiencies[2]) * 1.1


@pytest.mark.parametrize("name", ["h200", "h100-sxm", "cloud-cpu", "xeon"])
def test_four_times_the_rows_never_take_less_time(name: str) -> None:
    machine = load(name)
    # Small products are left out: cuBLAS takes longer for one row of 1024×1024 than for four (7.7 against 4.5 µs).
    for n, k in ((4096, 4096), (28672, 4096), (8192, 8192)):
        seconds = [linear(machine, 4**power, n, k).seconds for power in range(8)]
        for less, more in itertools.pairwise(seconds):
            assert more >= 0.85 * less
        assert seconds[-1] > 3 * seconds[0]


def test_decode_sized_linears_are_nearly_flat() -> None:
    h200 = load("h200")
    seconds = [linear(h200, m, 14336, 4096).seconds for m in (1, 3, 7, 16, 33, 64)]
    assert max(seconds) < 1.3 * min(seconds)


def test_provenance_tells_inside_from_outside() -> None:
    h200 = load("h200")
    assert linear(h200, 1, 28672, 4096).provenance == "measured"
    assert linear(h200, 100, 8192, 4096).provenance == "interpolated"
    assert linear(h200, 1, 10**6, 4096).provenance == "extrapolated"
    assert linear(load("b200"), 64, 4096, 4096).provenance == "extrapolated"


def test_left_out_samples_are_predicted() -> None:
    """Take one GEMM of the sweep away: its neighbours bring it back within a third."""
    h200 = load("h200")
    for m in (16, 64, 128, 256):
        without = replace(h200, samples=tuple(s for s in h200.samples if s.size != (m, 28672, 4096)))
        assert linear(without, m, 28672, 4096).seconds == pytest.approx(linear(h200, m, 28672, 4096).seconds, rel=0.34)


def test_other_precision_then_likeness_then_reference_then_roof() -> None:
    h200 = load("h200")
    assert "bf16" in linear(h200, 64, 4096, 4096, "fp16").note
    assert "linear" in linear(h200, 64, 4096, 4096, name="grouped_linear").note
    move = h200.estimate("gather", "bf16", (10, 10), {}, 1e8, MOVE)
    assert "copy" in move.note and move.provenance == "extrapolated"
    assert "h200" in linear(load("a100"), 64, 4096, 4096).note
    alone = replace(h200, samples=(), reference=None)
    bare = linear(alone, 4096, 4096, 4096)
    assert bare.provenance == "datasheet"
    assert bare.seconds == pytest.approx(roof(alone, 4096, 4096, 4096) + 1.27e-6)


def test_another_roof_at_the_same_size_is_not_the_sample() -> None:
    h200 = load("h200")
    flops = {"bf16": 2.0 * 28672 * 4096}
    assert h200.estimate("linear", "bf16", (1, 28672, 4096), flops, 28672 * 4096.0, MATMUL).provenance != "measured"


def test_tiny_calls_cost_the_floor() -> None:
    h200 = load("h200")
    tiny = h200.estimate("swiglu", "bf16", (1, 64), {"fp32": 64.0}, 384.0, "elementwise").seconds
    assert 1e-6 < tiny < 5e-6
    assert h200.estimate("empty", "bf16", (), {}, 0.0, MOVE).seconds == 0


def test_collectives_use_their_samples_and_else_latency_and_bandwidth() -> None:
    h200 = load("h200")
    sent = float(2**28)
    found = h200.estimate("all_reduce", "bf16", (2, 2**28), {}, 0.0, MOVE, link_bytes=sent)
    assert (found.provenance, found.seconds) == ("measured", pytest.approx(923e-6))
    eight = h200.estimate("all_reduce", "bf16", (8, 2**28), {}, 0.0, MOVE, link_bytes=1.75 * sent)
    assert 1.75 * sent / 450e9 < eight.seconds < 4 * 1.75 * sent / 450e9
    a100 = load("a100").estimate("all_reduce", "bf16", (2, 2**28), {}, 0.0, MOVE, link_bytes=sent)
    assert a100.seconds == pytest.approx(sent / 300e9 + 3.4e-6)
    assert a100.provenance == "datasheet"


def test_blend_is_exact_at_samples_and_has_no_jumps() -> None:
    generator = np.random.default_rng(3)
    x_SD, y_S = generator.uniform(0, 10, (60, 2)), generator.uniform(-1, 0, 60)
    for x_D, y in zip(x_SD, y_S, strict=True):
        assert blend(x_SD, y_S, x_D) == pytest.approx(y)
    way = [blend(x_SD, y_S, np.array([step / 500, 5.0])) for step in range(5000)]
    assert max(abs(b - a) for a, b in itertools.pairwise(way)) < 0.05
    assert y_S.min() <= min(way) <= max(way) <= y_S.max()


def test_a_curve_of_one_sample_serves() -> None:
    h200 = load("h200")
    one = Sample("odd", "bf16", (64, 64), {"fp32": 4096.0}, 16384.0, 4e-6)
    machine = replace(h200, samples=(one,))
    assert machine.estimate("odd", "bf16", (64, 64), {"fp32": 4096.0}, 16384.0, MOVE).seconds == 4e-6
    assert machine.estimate("odd", "bf16", (128, 64), {"fp32": 8192.0}, 32768.0, MOVE).seconds > 4e-6


def test_one_tiny_sample_does_not_slow_large_calls_by_its_latency() -> None:
    """A fill of 4 bytes takes a launch; a fill of a gigabyte takes its bytes and one launch, not a million of them."""
    machine = load("h200")
    tiny = Sample("fill", "fp32", (1,), {}, 4.0, 3e-6)
    machine = replace(machine, samples=(*(s for s in machine.samples if s.curve != "fill"), tiny))
    assert machine.estimate("fill", "fp32", (1,), {}, 4.0, MOVE).seconds == pytest.approx(3e-6)
    size = 2.0**30
    roof_seconds = machine.roof_seconds({}, size)[0]
    assert machine.estimate("fill", "fp32", (2**28,), {}, size, MOVE).seconds < 2 * roof_seconds
