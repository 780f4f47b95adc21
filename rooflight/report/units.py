"""How figures are written for people: bytes, times, FLOPs, rates, ratios and shares.

Memory is in powers of 1024 (GiB); bandwidths, FLOPs and counts are in powers of 1000. Every figure carries three
significant digits; one that is missing is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"
INFINITE = "∞"

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_TIMES = ("ns", "µs", "ms", "s")
_DECIMAL = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")
_PARAMETERS = ("", "K", "M", "B", "T")


def _digits(magnitude: float) -> str:
    if magnitude >= 999.5:
        return f"{magnitude:,.0f}"
    if magnitude >= 99.95:
        return f"{magnitude:.0f}"
    if magnitude >= 9.995:
        return f"{magnitude:.1f}"
    if magnitude >= 0.9995:
        return f"{magnitude:.2f}"
    return f"{magnitude:.3g}"


def _scaled(value: float | None, units: Sequence[str], step: float, *, whole: bool = False) -> str:
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return INFINITE if value > 0 else f"-{INFINITE}"
    magnitude, index = abs(value), 0
    # A value that three digits would round up to 1000 belongs to the next unit: 999.7 ms is 1.00 s.
    while magnitude >= 999.5 and index < len(units) - 1:
        magnitude, index = magnitude / step, index + 1
    exact = index == 0 and whole and magnitude == int(magnitude)
    text = f"{int(magnitude)}" if exact else _digits(magnitude)
    return f"{'-' if value < 0 else ''}{text} {units[index]}".rstrip()


def format_bytes(value: float | None) -> str:
    """Bytes in powers of 1024: `16.1 GiB`."""
    return _scaled(value, _BINARY, 1024, whole=True)


def format_seconds(value: float | None) -> str:
    """A time from ns to s: `3.45 ms`."""
    if value == 0:
        return "0 s"
    return _scaled(None if value is None else value * 1e9, _TIMES, 1000)


def format_count(value: float | None) -> str:
    """A count in powers of 1000, such as FLOPs under a heading that names them: `15.0 G`."""
    return _scaled(value, _DECIMAL, 1000, whole=True)


def format_flops(value: float | None) -> str:
    """FLOPs with their unit, a multiply-add counted as 2: `15.0 GFLOP`."""
    return _scaled(value, [f"{prefix}FLOP" for prefix in _DECIMAL], 1000, whole=True)


def format_parameters(value: float | None) -> str:
    """Parameters in the field's own letters, B for 10⁹: `8.03 B`."""
    return _scaled(value, _PARAMETERS, 1000, whole=True)


def format_bandwidth(bytes_per_s: float | None) -> str:
    """Bytes a second in powers of 1000: `4.80 TB/s`."""
    return _scaled(bytes_per_s, [f"{prefix}B/s" for prefix in _DECIMAL], 1000)


def format_flop_rate(flop_per_s: float | None) -> str:
    """FLOPs a second in powers of 1000: `989 TFLOP/s`."""
    return _scaled(flop_per_s, [f"{prefix}FLOP/s" for prefix in _DECIMAL], 1000)


def format_intensity(flop_per_byte: float | None) -> str:
    """FLOPs a byte, without the unit: `206`."""
    return _scaled(flop_per_byte, _DECIMAL, 1000)


def format_ratio(value: float | None) -> str:
    """One figure over another: `1.25×`."""
    text = _scaled(value, _DECIMAL, 1000)
    return text if text == MISSING else f"{text}×"


def format_percent(fraction: float | None) -> str:
    """A fraction of one in percent; a small one is never written as nothing: `<0.1%`."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    if 0 < abs(fraction) < 0.001:
        return "<0.1%"
    return f"{100 * fraction:.1f}%" if abs(fraction) < 0.0995 and fraction else f"{100 * fraction:.0f}%"


def binary_axis(largest_bytes: float) -> tuple[float, str]:
    """Divisor and unit for an axis of bytes whose largest is given: `(1073741824, "GiB")`."""
    index = 0
    while largest_bytes >= 1024 ** (index + 1) and index < len(_BINARY) - 1:
        index += 1
    return float(1024**index), _BINARY[index]


def time_axis(largest_seconds: float) -> tuple[float, str]:
    """Factor and unit for an axis of times whose largest is given: `(1000.0, "ms")`."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if largest_seconds * factor >= 1:
            return factor, unit
    return 1e9, "ns"
