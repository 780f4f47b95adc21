"""Figures written by `report.units`, read back and compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from rooflight.report import units

DECIMAL = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21, "Y": 1e24}
BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50, "EiB": 2**60}
TIMES = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
RATES = {f"{prefix}FLOP/s": factor for prefix, factor in DECIMAL.items()}
BANDWIDTHS = {f"{prefix}B/s": factor for prefix, factor in DECIMAL.items()}


def _read(text: str, factors: dict[str, float]) -> float:
    number, _, unit = text.partition(" ")
    return float(number.replace(",", "")) * factors[unit]


@pytest.mark.parametrize(
    ("write", "factors", "low", "high"),
    [
        (units.format_bytes, BINARY, 0, 19),
        (units.format_seconds, TIMES, -9, 4),
        (units.format_count, DECIMAL, 0, 26),
        (units.format_flop_rate, RATES, 0, 18),
        (units.format_bandwidth, BANDWIDTHS, 0, 15),
    ],
)
def test_a_figure_reads_back_to_three_digits(
    write: Callable[[float | None], str], factors: dict[str, float], low: int, high: int
) -> None:
    for exponent in range(low, high):
        for mantissa in (1.0, 1.234, 5.0, 9.987, 9.9951, 9.99999):
            value = mantissa * 10.0**exponent
            assert _read(write(value), factors) == pytest.approx(value, rel=0.0051), (value, write(value))
            assert _read(write(-value), factors) == pytest.approx(-value, rel=0.0051)
            assert len(write(value).split()[0]) <= 6


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.format_bytes(0), "0 B"),
        (units.format_bytes(512), "512 B"),
        (units.format_bytes(2**30), "1.00 GiB"),
        (units.format_bytes(4 * 2**30), "4.00 GiB"),
        (units.format_bytes(1023 * 2**20), "0.999 GiB"),
        (units.format_seconds(0.9997), "1.00 s"),
        (units.format_seconds(7.9e-6), "7.90 µs"),
        (units.format_seconds(0), "0 s"),
        (units.format_seconds(12345.0), "12,345 s"),
        (units.format_bandwidth(4.8e12), "4.80 TB/s"),
        (units.format_flop_rate(989e12), "989 TFLOP/s"),
        (units.format_flops(15e9), "15.0 GFLOP"),
        (units.format_parameters(8_030_261_248), "8.03 B"),
        (units.format_count(32), "32"),
        (units.format_ratio(1.246), "1.25×"),
        (units.format_percent(0.0001), "<0.1%"),
        (units.format_percent(0), "0%"),
        (units.format_percent(0.0521), "5.2%"),
        (units.format_percent(0.634), "63%"),
        (units.format_percent(1), "100%"),
    ],
)
def test_figures_as_they_are_written(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize(
    "write", [units.format_bytes, units.format_seconds, units.format_count, units.format_intensity, units.format_ratio]
)
def test_what_is_not_there_is_a_dash_and_never_nan(write: Callable[[float | None], str]) -> None:
    assert write(None) == units.MISSING
    assert write(math.nan) == units.MISSING
    assert write(math.inf).startswith(units.INFINITE)


@pytest.mark.parametrize(("largest", "unit"), [(2.0, "s"), (0.5, "ms"), (3e-4, "µs"), (2e-8, "ns")])
def test_an_axis_of_times_has_the_unit_of_its_largest(largest: float, unit: str) -> None:
    factor, name = units.time_axis(largest)
    assert name == unit
    assert largest * factor >= 1
