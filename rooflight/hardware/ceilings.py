"""What a machine reaches at its best: copy and read bandwidth, matrix multiplies by precision and size, launch cost.

Shape suffixes: M rows, K inputs, N outputs of a linear; E elements of a buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from rooflight.hardware.figures import ANY, Sample
from rooflight.hardware.timing import Call, Timer

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
WIDTHS_GPU = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 1024), (6144, 4096), (128256, 4096))
WIDTHS_CPU = ((1024, 1024), (4096, 1024), (256, 256), (4096, 4096), (1024, 4096), (16384, 512))
SQUARES_GPU = (512, 2048, 8192)
FORMATS: dict[str, dict[str, torch.dtype]] = {
    "cpu": {"fp32": torch.float32, "bf16": torch.bfloat16},
    "cuda": {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32},
}
# A single call longer than this is left out: it would eat the time of many small ones.
LONGEST_CALL = 1.0
MAX_COPIES = 256
TILE = 2**20
SWEEPS = 2
# The largest buffer may take this part of memory: two of them live at once, beside whatever else runs.
MEMORY_SHARE = 0.1


def cache_bytes(device: torch.device, caches: dict[str, float]) -> float:
    """Bytes of the largest cache that weights would have to fall out of to be read from memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(caches.values(), default=32e6)


def copies_beyond(cache: float, bytes: float) -> int:
    """How many copies of so many bytes exceed twice a cache, so that turns through them find each one cold."""
    return min(MAX_COPIES, max(1, int(2 * cache / max(bytes, 1)) + 1))


def _random(elements: int, device: torch.device) -> Tensor:
    """Random data, for zeros would let a chip clock higher; repeated, for drawing gigabytes takes long."""
    tile_E = torch.randn(min(elements, TILE), device=device)
    return tile_E.repeat(-(-elements // TILE))[:elements]


def copy_samples(timer: Timer, cache: float, memory: float, share: float) -> Iterator[Sample]:
    """Copy and read over buffers from a page to far beyond the caches, within `share` seconds; size is bytes moved."""
    device = timer.device
    beyond = max(2**32 if device.type == "cuda" else 2**28, 8 * cache)
    powers = [power for power in range(12, 40) if 2**power <= min(beyond, MEMORY_SHARE * memory)]
    each = share / (2 * SWEEPS * len(powers))
    best: dict[tuple[str, int], float] = {}
    # Two sweeps apart in time, the lesser of both kept: a burst of other work can spoil one size, seldom twice.
    until = timer.remaining - share
    # The largest first, for it alone tells memory's bandwidth; what a short budget leaves out is between the others.
    for power in (powers[-1:] + powers[:-1]) * SWEEPS:
        if best and timer.remaining < until:
            break
        # On a GPU data comes from memory, on a CPU small data from a cache: there a cache has a roof of its own.
        copies = copies_beyond(cache, 2**power) if device.type == "cuda" else 1
        pairs = [(_random(2**power // 4, device), _random(2**power // 4, device)) for _ in range(copies)]
        moves: list[Call] = [lambda out_E=out_E, in_E=in_E: out_E.copy_(in_E) for out_E, in_E in pairs]
        sums: list[Call] = [lambda in_E=in_E: in_E.sum() for _, in_E in pairs]
        for curve, calls in (("copy", moves), ("read", sums)):
            seconds = timer(calls, budget_seconds=each).seconds
            best[curve, power] = min(seconds, best.get((curve, power), seconds))
    for (curve, power), seconds in sorted(best.items()):
        moved = 2**power if curve == "read" else 2 * 2**power
        flops = {"fp32": 2.0**power / 4} if curve == "read" else {}
        yield Sample(curve, ANY, (moved,), flops, float(moved), seconds)


def _linear(x_MK: Tensor, w_NK: Tensor) -> Call:
    if x_MK.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=x_MK.device)
        return lambda: torch.ops.aten._scaled_mm(x_MK, w_NK.t(), one, one, out_dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(x_MK, w_NK)


def linear_sample(
    timer: Timer, precision: str, dtype: torch.dtype, m: int, n: int, k: int, *, cache: float, budget_seconds: float
) -> Sample:
    """One linear M×K by N×K with cold weights: 2·M·N·K FLOPs, every operand moved once."""
    copies = copies_beyond(cache, n * k * dtype.itemsize)
    x_MK = _random(m * k, timer.device).view(m, k).to(dtype)
    w_NK = _random(n * k, timer.device).view(n, k).to(dtype)
    calls = [_linear(x_MK, w_NK.clone()) for _ in range(copies)]
    timing = timer(calls, budget_seconds=budget_seconds)
    out_size = 2 if precision == "fp8" else dtype.itemsize
    moved = (m * k + n * k) * dtype.itemsize + m * n * out_size
    return Sample(
        "linear", precision, (m, n, k), {precision: 2.0 * m * n * k}, float(moved), timing.seconds, timing.host_seconds
    )


def _shapes(device: torch.device) -> list[tuple[int, int, int]]:
    gpu = device.type == "cuda"
    shapes = [(m, n, k) for (n, k), m in itertools.product(WIDTHS_GPU if gpu else WIDTHS_CPU, ROWS)]
    squares = [(n, n, n) for n in SQUARES_GPU] if gpu else []
    # Cheap ones first: what a short budget leaves out is what can be told from the rest.
    return sorted([*shapes, *squares], key=lambda shape: shape[0] * shape[1] * shape[2])


def _runs(precision: str, device: torch.device) -> bool:
    if precision == "fp8":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    if precision == "bf16" and device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return True


def linear_samples(timer: Timer, cache: float, share: float) -> Iterator[Sample]:
    """Linears by precision and size within `share` seconds; calls that would take too long are left out."""
    shapes = _shapes(timer.device)
    formats = {name: dtype for name, dtype in FORMATS[timer.device.type].items() if _runs(name, timer.device)}
    rates, measured = dict.fromkeys(formats, 1e9), set[str]()
    wanted = [(shape, name) for shape in shapes for name in formats if name != "fp8" or shape[0] >= 16]
    until = timer.remaining - share
    for index, ((m, n, k), name) in enumerate(wanted):
        left = timer.remaining - until
        expected = 2.0 * m * n * k / rates[name]
        # One of each precision whatever it takes: a machine without a peak is no machine.
        if name not in measured:
            left = max(left, 3 * LONGEST_CALL)
        if left <= 0 and len(measured) == len(formats):
            timer.say(f"time is up: {len(wanted) - index} of {len(wanted)} matrix multiplies left out")
            return
        if left <= 0 or expected > min(LONGEST_CALL, left / 3):
            continue
        each = max(min(left / (len(wanted) - index), 0.25), 0.01)
        sample = linear_sample(timer, name, formats[name], m, n, k, cache=cache, budget_seconds=each)
        rates[name] = max(rates[name], sample.flops[name] / sample.seconds)
        measured.add(name)
        yield sample


def launch_seconds(timer: Timer) -> tuple[float, float]:
    """Seconds of the smallest call, launched from Python and as a graph node; equal on a CPU, which has no graphs."""
    x_E = torch.randn(1, device=timer.device)
    timing = timer(lambda: x_E.add_(1.0), budget_seconds=0.5)
    return (timing.host_seconds or timing.seconds), timing.seconds
