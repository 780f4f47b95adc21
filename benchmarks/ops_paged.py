"""Attention over the paged cache on a GPU: bandwidth of decoding, TFLOP/s of prefill beside torch's SDPA, mixed steps.

    python -m benchmarks.ops_paged [PART ...] [--tune]        (about a minute on an H200; with --tune ten)

Parts are decode, ragged (contexts drawn from 100…2048), prefill, mixed and write; without any, all are measured.
Calls run in a CUDA graph; inputs take turns through more blocks than the L2 cache holds. Bytes are those of the keys,
values, queries and outputs; shares are of the bandwidth in the same run and of 989 TFLOP/s; tiles: µs of the kernel for
any GPU in place of Hopper's. Block tables are as wide as 40,960 tokens want, as an engine's are. `--tune` tries other
launch constants and prints the best of each shape; decoding's are keys/warps/stages of a tile, parts for each
multiprocessor, and keys of a part at least.
Shapes are those of "paged decode attention" in ANCHORS and of Qwen3-0.6B: 16 query heads on 8 key heads of 128.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from benchmarks.ops_paged_shapes import (
    COLD_BYTES,
    HEAD_DIM,
    MOST_SETS,
    PAGE,
    PREFILLS,
    SHAPES,
    Args,
    Shape,
    sets_of,
)
from benchmarks.timing import copy_bandwidth, read_bandwidth
from rooflight.hardware.timing import time_call
from rooflight.ops.attention import paged_attention, write_kv
from rooflight.ops.kernels import ceil_div, flash_hopper_paged, paged_decode, paged_parts, paged_prefill, processors
from rooflight.ops.kernels.paged_parts import Cut
from rooflight.ops.kernels.paged_tile import Tiles

PEAK_FLOPS = 989e12
SAMPLED_ROWS = 48


def error_of(args: Args, shape: Shape) -> float:
    """Largest error of some rows against fp64, relative to their largest value."""
    q, k, v, table = args[:4]
    out = paged_attention(*args)
    starts = [0, *itertools.accumulate(shape.queries)]
    worst = 0.0
    for row in torch.linspace(0, q.shape[0] - 1, SAMPLED_ROWS).long().unique().tolist():
        b = next(b for b in range(len(shape.queries)) if row < starts[b + 1])
        at = torch.arange(shape.contexts[b] - starts[b + 1] + row + 1, device="cuda")
        group = shape.heads // shape.key_heads
        keys, values = (x[table[b].long()[at // PAGE], at % PAGE].double().repeat_interleave(group, 1) for x in (k, v))
        probs = (torch.einsum("he,she->hs", q[row].double(), keys) * HEAD_DIM**-0.5).softmax(1)
        want = torch.einsum("hs,she->he", probs, values)
        worst = max(worst, float((out[row].double() - want).abs().max() / want.abs().max()))
    return worst


def seconds(fn: Callable[..., Any], sets: Sequence[Args], budget: float = 0.1) -> float:
    return time_call([lambda args=args: fn(*args) for args in sets], device="cuda", budget_seconds=budget).seconds


def with_tiles(*args: Any) -> Tensor:
    """The same by the kernel of `paged_prefill`, also where Hopper's own takes the call."""
    with mock.patch.object(flash_hopper_paged, "takes", return_value=False):
        return paged_attention(*args)


def sdpa(shape: Shape, backend: SDPBackend) -> float:
    """Seconds of torch's causal attention on contiguous sequences; NaN where the backend refuses."""

    def draw(heads: int) -> Tensor:
        size = (len(shape.queries), shape.queries[0], heads, HEAD_DIM)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    sets = [(draw(shape.heads), draw(shape.key_heads), draw(shape.key_heads)) for _ in range(2)]
    try:
        run(*sets[0])
    except RuntimeError:
        return float("nan")
    return seconds(run, sets)


def table(parts: Sequence[str]) -> None:
    roof = max(copy_bandwidth(), read_bandwidth())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, best of copy and read {roof / 1e12:.2f} TB/s")
    print(
        f"{'shape':44} {'µs':>9} {'MiB':>8} {'rate':>12} {'of roof':>8} {'tiles':>8} {'cuDNN':>8} {'flash':>8}  error"
    )
    for part in parts:
        for shape in SHAPES.get(part, ()):
            try:
                _row(shape, part, roof)
            except (RuntimeError, TritonError, OutOfResources) as error:
                print(f"{shape.label:44} {type(error).__name__}: {str(error)[:80]}", flush=True)
            torch.cuda.empty_cache()
    if "write" in parts:
        for tokens in (1, 256, 8192):
            _scatter(tokens, roof)


def _row(shape: Shape, part: str, roof: float) -> None:
    sets = sets_of(shape)
    error, took = error_of(sets[0], shape), seconds(paged_attention, sets)
    peers = ""
    if part in ("decode", "ragged"):
        rate, share = f"{shape.bytes / took / 1e12:.2f} TB/s", shape.bytes / took / roof
    else:
        rate, share = f"{shape.flops / took / 1e12:.0f} TFLOP/s", shape.flops / took / PEAK_FLOPS
    if part in ("prefill", "mixed"):
        peers = f" {seconds(with_tiles, sets) * 1e6:8.1f}"
    if part == "prefill":
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            peers += f" {sdpa(shape, backend) * 1e6:8.1f}"
    size = shape.bytes / 2**20
    print(f"{shape.label:44} {took * 1e6:9.1f} {size:8.1f} {rate:>12} {share:8.1%}{peers:27}  {error:.1e}", flush=True)


def _scatter(tokens: int, roof: float) -> None:
    """New keys and values, slices of fused QKV, to random slots."""
    row = 2 * 8 * HEAD_DIM * 2
    count = min(MOST_SETS, max(2, -(-COLD_BYTES // (2 * row * tokens))))
    cache = [
        torch.zeros(count * tokens // PAGE + 1, PAGE, 8, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv"
    ]
    slots = torch.randperm(count * tokens, device="cuda").split(tokens)
    sets = []
    for chosen in slots:
        qkv = torch.randn(tokens, 32, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        sets.append((qkv[:, 16:24], qkv[:, 24:], *cache, chosen))
    took = seconds(write_kv, sets)
    rate = 2 * row * tokens / took
    label = f"write_kv {tokens}×8×128"
    print(f"{label:44} {took * 1e6:9.1f} {2 * row * tokens / 2**20:8.1f} {rate / 1e12:7.2f} TB/s {rate / roof:8.1%}")


def _decode_choices(key_heads: int) -> Iterator[tuple[Tiles, Cut, str]]:
    multiprocessors = processors(torch.device("cuda"))
    for keys, warps, stages in (
        *((64, 4, 3), (64, 4, 5), (64, 2, 5), (32, 4, 5), (32, 2, 5), (32, 1, 5), (32, 1, 7), (16, 1, 7)),
    ):
        for programs in (1, 2, 3, 4, 6, 8, 12, 16):
            for least in (32, 128, 256):
                cut = Cut(ceil_div(programs * multiprocessors, key_heads), max(least, keys), keys)
                yield Tiles(16, keys, warps, stages), cut, f"{keys}/{warps}/{stages} {programs} of {least}"


def _prefill_choices() -> Iterator[Tiles]:
    for constants in (
        *((128, 64, 8, 3), (128, 64, 8, 5), (128, 64, 8, 7), (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 8, 5)),
        *((128, 32, 8, 5), (128, 32, 8, 7), (64, 64, 4, 3), (64, 64, 4, 5), (64, 32, 4, 5), (64, 128, 8, 3)),
    ):
        yield Tiles(*constants)


def _tried(run: Callable[..., None], sets: Sequence[Args]) -> float:
    """Seconds; infinite where the tiles want more shared memory than there is."""
    try:
        run(*sets[0])
    except OutOfResources:
        return float("inf")
    return seconds(run, sets, 0.03)


def _report(shape: Shape, tried: list[tuple[float, str]]) -> None:
    before = tried[0]
    tried.sort()
    best = "; ".join(f"{took * 1e6:.1f} µs {what}" for took, what in tried[:5])
    print(f"{shape.label:44} default {before[0] * 1e6:.1f} µs; best {best}", flush=True)


def scheduled(args: Args, cut: Cut | None) -> Tensor:
    longest = args[3].shape[1] * PAGE
    return paged_parts.attention_schedule(args[4], args[5], longest, args[1].shape[2], 0, cut)


def _tune_decode(shape: Shape) -> None:
    sets = sets_of(shape)
    out = torch.empty_like(sets[0][0])
    tried = []
    for tiles, cut, what in ((None, None, "the rule"), *_decode_choices(shape.key_heads)):
        schedule = scheduled(sets[0], cut)

        def run(*args: Any, tiles: Tiles | None = tiles, schedule: Tensor = schedule) -> None:
            options: Args = (*args[:6], *args[8:12])
            paged_decode.decode(out, *options, alone=True, schedule_UX=schedule, tiles=tiles)

        tried.append((_tried(run, sets), what))
    _report(shape, tried)


def tune(parts: Sequence[str]) -> None:
    """Other launch constants: tiles and cuts for decoding, tiles for prefill."""
    for shape in itertools.chain.from_iterable(SHAPES[part] for part in parts if part in ("decode", "ragged")):
        _tune_decode(shape)
        torch.cuda.empty_cache()
    for shape in PREFILLS if "prefill" in parts else ():
        sets = sets_of(shape)
        out = torch.empty_like(sets[0][0])
        default = paged_prefill.tiles_of(HEAD_DIM, shape.heads // shape.key_heads, torch.bfloat16)
        tried = []
        for tiles in (default, *_prefill_choices()):

            def run(*args: Any, tiles: Tiles = tiles, out: Tensor = out) -> None:
                options: Args = (*args[:6], *args[8:12])
                paged_prefill.prefill(out, *options, least=1, tiles=tiles)

            tried.append((_tried(run, sets), f"{tiles.rows}/{tiles.keys}/{tiles.warps}/{tiles.stages}"))
        _report(shape, tried)
        del sets, run
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*SHAPES, "write"], metavar="PART")
    parser.add_argument("--tune", action="store_true", help="then try other launch constants")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    with torch.no_grad():
        table(options.parts)
        if options.tune:
            tune(options.parts)


if __name__ == "__main__":
    main()
