"""Choosing tokens on a GPU: greedy, plainly drawn and ranked draws, beside their references; µs a call.

    python -m benchmarks.ops_sampling [--tune]        (under a minute on an H200; with --tune two)

Calls run in a CUDA graph; logits take turns through more than the L2 cache holds. Logits are normal, of a standard
deviation of 3 ("peaked", as a model's are about) or 0.5 ("flat", as a model's of random weights: a ranked draw can then
reach most of the vocabulary); whole numbers and equal logits are the ranked draw's worst cases. The share is of the
bandwidth of the same run, had the logits been read once. `--tune` tries other launch constants.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import read_bandwidth
from rooflight.hardware.timing import time_call
from rooflight.ops.kernels import sampling, sampling_ranked
from rooflight.ops.sampling import greedy, sample, sample_plain

COLD_BYTES = 200 * 2**20
MOST_SETS = 200
BATCHES = (1, 8, 32, 128, 256)
V = 151_936
PEAKED, FLAT = 3.0, 0.5
# temperature, top_k, top_p, min_p.
SETTINGS = {
    "top_p 0.9": (1.0, 0, 0.9, 0.0),
    "top_k 20, top_p 0.95, 0.6": (0.6, 20, 0.95, 0.0),
    "top_k 50": (1.0, 50, 1.0, 0.0),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
}
Args = tuple[Any, ...]


def logits_of(rows: int, dtype: torch.dtype, spread: float, vocabulary: int = V) -> list[Tensor]:
    """As many batches as the cache does not hold."""
    size = rows * vocabulary * dtype.itemsize
    count = min(MOST_SETS, max(2, -(-COLD_BYTES // size)))
    return [torch.randn(rows, vocabulary, device="cuda", dtype=dtype).mul_(spread) for _ in range(count)]


def seconds(fn: Callable[..., Any], sets: list[Args], budget: float = 0.05) -> float:
    return time_call([lambda args=args: fn(*args) for args in sets], device="cuda", budget_seconds=budget).seconds


def plain_args(batches: list[Tensor]) -> list[Args]:
    rows = batches[0].shape[0]
    heat_B = torch.ones(rows, dtype=torch.float64, device="cuda")
    return [(x, heat_B, torch.rand(rows, dtype=torch.float64, device="cuda")) for x in batches]


def ranked_args(batches: list[Tensor], setting: tuple[float, int, float, float]) -> list[Args]:
    rows = batches[0].shape[0]
    heat, top_k, top_p, min_p = setting
    heat_B, top_p_B, min_p_B = (
        torch.full((rows,), x, dtype=torch.float64, device="cuda") for x in (heat, top_p, min_p)
    )
    top_k_B = torch.full((rows,), top_k, device="cuda")
    uniforms = (torch.rand(rows, dtype=torch.float64, device="cuda") for _ in batches)
    # The promise that lets the reference select the likeliest few, as the engine gives it.
    return [(x, heat_B, top_k_B, top_p_B, min_p_B, u, top_k) for x, u in zip(batches, uniforms, strict=True)]


def different(op: Any, sets: list[Args]) -> int:
    """Rows of one batch whose token is not the reference's."""
    return int((op(*sets[0]) != op.reference(*sets[0])).sum())


def line(label: str, op: Any, sets: list[Args], roof: float, against: bool) -> None:
    took = seconds(op, sets)
    size = sets[0][0].numel() * sets[0][0].element_size()
    reference = f"{seconds(op.reference, sets[:4]) * 1e6:10.1f}" if against else f"{'':10}"
    print(
        f"{label:52} {took * 1e6:9.1f} {size / 2**20:8.1f} {size / took / roof:8.1%} {reference} "
        f"{different(op, sets):6d}",
        flush=True,
    )


def table() -> None:
    roof = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reading {roof / 1e12:.2f} TB/s")
    print(f"{'operation, rows, logits':52} {'µs':>9} {'MiB':>8} {'of roof':>8} {'torch µs':>10} {'differ':>6}")
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for rows in BATCHES:
            batches = logits_of(rows, dtype, PEAKED)
            against = rows in (1, 32, 256)
            line(f"greedy {rows} {name}", greedy, [(x,) for x in batches], roof, against)
            line(f"sample_plain {rows} {name}", sample_plain, plain_args(batches), roof, against)
            for label, setting in SETTINGS.items():
                sets = ranked_args(batches, setting)
                line(f"sample {rows} {name}, {label}", sample, sets, roof, against and dtype == torch.bfloat16)
            del batches
            torch.cuda.empty_cache()
        for rows in (1, 32, 256):
            for kind, batches in (
                ("flat", logits_of(rows, dtype, FLAT)),
                ("whole numbers", [x.round_() for x in logits_of(rows, dtype, PEAKED)]),
                ("all equal", [x.zero_() for x in logits_of(rows, dtype, PEAKED)]),
            ):
                sets = ranked_args(batches, SETTINGS["top_p 0.9"])
                line(f"sample {rows} {name}, top_p 0.9, {kind}", sample, sets, roof, dtype == torch.bfloat16)
                del batches, sets
                torch.cuda.empty_cache()


def _searches() -> Iterator[tuple[int, tuple[int, int]]]:
    for ways in (4, 8, 16):
        for search in ((256, 4), (512, 4), (512, 8), (1024, 8), (1024, 16)):
            if search[0] * ways <= 32 * 32 * search[1]:
                yield ways, search


def _report(label: str, tried: list[tuple[float, str]]) -> None:
    default = tried[0]
    best = "; ".join(f"{took * 1e6:.1f} µs {what}" for took, what in sorted(tried)[:3])
    print(f"{label:32} default {default[0] * 1e6:.1f} µs ({default[1]}); best {best}", flush=True)


def tune() -> None:
    """Tiles of a chunk and warps of the reading kernels; the search's tile, warps and ways."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    usual_warps, usual_ways = sampling.WARPS, sampling_ranked.WAYS
    for rows in (1, 32, 256):
        batches = logits_of(rows, torch.bfloat16, PEAKED)
        sets = plain_args(batches)
        default = sampling.tiles_of(rows, V, multiprocessors)
        tried = []
        for tiles, warps in ((default, usual_warps), *itertools.product((1, 2, 4, 8, 16), (2, 4, 8))):
            sampling.WARPS = warps
            drawn = functools.partial(sampling.sample_plain, tiles=tiles)
            tried.append((seconds(drawn, sets, 0.03), f"{tiles} tiles, {warps} warps"))
        sampling.WARPS = usual_warps
        _report(f"sample_plain {rows}", tried)

        # Without the promise, which our kernel does not need.
        sets = [args[:6] for args in ranked_args(batches, SETTINGS["top_p 0.9"])]
        tried = []
        usual_part = sampling_ranked.PART_TILE, sampling_ranked.PART_WARPS, sampling_ranked.PARTS
        for part in (usual_part, (1024, 4, 8), (1024, 8, 4), (2048, 8, 2), (2048, 8, 6), (4096, 16, 2)):
            ranked = functools.partial(sampling_ranked.sample, part=part)
            tried.append((seconds(ranked, sets, 0.03), f"{part[0]} tokens, {part[1]} warps, {part[2]} programs"))
        _report(f"sample {rows}, parts", tried)
        usual = sampling_ranked.FEW_ROWS if rows <= multiprocessors else sampling_ranked.MANY_ROWS
        tried = []
        for ways, search in ((usual_ways, usual), *_searches()):
            sampling_ranked.WAYS = ways
            ranked = functools.partial(sampling_ranked.sample, search=search)
            tried.append((seconds(ranked, sets, 0.03), f"{ways} ways, list {search[0]}, {search[1]} warps"))
        sampling_ranked.WAYS = usual_ways
        _report(f"sample {rows}, search", tried)
        del batches, sets
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="then try other launch constants")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    with torch.no_grad():
        table()
        if options.tune:
            tune()


if __name__ == "__main__":
    main()
