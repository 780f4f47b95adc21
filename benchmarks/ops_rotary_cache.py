"""The fused step between qkv and attention on a GPU, beside the up to four launches that it replaces.

    python -m benchmarks.ops_rotary_cache [--tune] [--pdl]        (about half a minute on an H200 for each)

Calls run in a CUDA graph; inputs take turns through more memory than the L2 cache holds, as far as MOST_SETS goes.
Bytes are those that the fused step must move; shares are of a copy's bandwidth in the same run.
`--tune` tries other tiles. `--pdl` times chains of small kernels with and without programmatic dependent launch, by
which a kernel starts while the one before it still ends, and waits for its results itself.
"""

# ruff: noqa: ANN001, ANN202 - arguments of Triton functions are blocks and scalars of its language, without annotations
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from benchmarks.timing import copy_bandwidth
from rooflight.hardware.timing import time_call
from rooflight.ops.attention import write_kv
from rooflight.ops.kernels import processors, qk_norm_rope
from rooflight.ops.kernels.qk_norm_rope import Tile
from rooflight.ops.norm import rms_norm
from rooflight.ops.rope import rotary
from rooflight.ops.rotary_cache import rotate_and_cache

COLD_BYTES, MOST_SETS = 256 * 2**20, 64
EPS = 1e-6
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TOKENS = (1, 32, 128, 256, 2048, 8192)
# Query heads, key heads, head dim, whether heads are normed, the cache's type.
MODELS: dict[str, tuple[int, int, int, bool, torch.dtype]] = {
    "qwen3-0.6b": (16, 8, 128, True, BF16),
    "llama-3.1-8b": (32, 8, 128, False, BF16),
    "qwen3-0.6b, fp8 cache": (16, 8, 128, True, FP8),
}
CHAIN, CHAIN_WIDTH = 200, 1024

Args = tuple[Any, ...]


def sets_of(model: str, tokens: int) -> list[Args]:
    """Arguments that take turns."""
    heads, key_heads, head_dim, norm, cache_dtype = MODELS[model]
    width = (heads + 2 * key_heads) * head_dim
    count = min(MOST_SETS, max(2, -(-COLD_BYTES // (4 * tokens * width))))
    caches = [
        torch.zeros(count * tokens // 16 + 1, 16, key_heads, head_dim, device="cuda").to(cache_dtype) for _ in "kv"
    ]
    slots = torch.randperm(count * tokens, device="cuda").split(tokens)
    weights = [torch.rand(head_dim, device="cuda").to(BF16) if norm else None for _ in "qk"]
    angles = torch.randn(tokens, head_dim // 2, device="cuda")
    return [
        (
            torch.randn(tokens, width, device="cuda").to(BF16),
            *(angles.cos(), angles.sin(), *caches, chosen, heads, False, *weights, EPS, 0.0),
        )
        for chosen in slots
    ]


def apart(*args: Any) -> Tensor:
    qkv, cos, sin, k_cache, v_cache, slots, heads, interleaved, q_weight, k_weight, eps, offset = args
    q, k, v = qkv.unflatten(1, (-1, k_cache.shape[3])).split([heads, k_cache.shape[2], k_cache.shape[2]], dim=1)
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps, offset), rms_norm(k, k_weight, eps, offset)
    q, k = rotary(q, k, cos, sin, interleaved)
    write_kv(k, v, k_cache, v_cache, slots)
    return q


def microseconds(fn: Callable[..., Any], sets: list[Args], budget: float = 0.1) -> float:
    calls = [lambda args=args: fn(*args) for args in sets]
    return time_call(calls, device="cuda", budget_seconds=budget).seconds * 1e6


def differing(args: Args) -> float:
    """Share of the queries and of the cached keys that differ from the operations' apart."""
    mine, theirs = ([*args[:3], args[3].clone(), args[4].clone(), *args[5:]] for _ in range(2))
    pairs = ((rotate_and_cache(*mine), apart(*theirs)), (mine[3], theirs[3]), (mine[4], theirs[4]))
    return max(float((a.float() != b.float()).float().mean()) for a, b in pairs)


def table() -> None:
    roof = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, ", end="")
    print(f"copy {roof / 1e12:.2f} TB/s")
    print(f"{'shape':30} {'µs':>8} {'MiB':>8} {'TB/s':>6} {'of copy':>8} {'apart µs':>9} {'times':>6}  differing")
    for model in MODELS:
        for tokens in TOKENS:
            sets = sets_of(model, tokens)
            args = sets[0]
            moved = float(rotate_and_cache.price(rotate_and_cache(*args), *args).total_bytes)
            other = differing(args)
            took, before = microseconds(rotate_and_cache, sets), microseconds(apart, sets)
            rate = moved / took * 1e6
            print(
                f"{model + ' × ' + str(tokens):30} {took:8.2f} {moved / 2**20:8.2f} {rate / 1e12:6.2f} "
                f"{rate / roof:8.1%} {before:9.2f} {before / took:6.2f}  {other:.1e}",
                flush=True,
            )
            del sets, args
            torch.cuda.empty_cache()


def tune() -> None:
    """Other tiles: elements of a program and its warps."""
    for model in list(MODELS)[:2]:
        for tokens in TOKENS:
            sets = sets_of(model, tokens)
            usual = qk_norm_rope.tile_of(sets[0][0].numel(), processors(sets[0][0].device))
            tried = []
            for elements, warps in (
                *((128, 1), (256, 1), (512, 1), (1024, 1), (2048, 1)),
                *((512, 2), (1024, 2), (2048, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8)),
            ):
                tile = Tile(elements, warps)
                took = microseconds(lambda *args, t=tile: qk_norm_rope.rotate_and_cache(*args, t), sets, 0.03)
                tried.append((took, f"{elements}/{warps}{' (used)' * (tile == usual)}"))
            tried.sort()
            print(
                f"{model + ' × ' + str(tokens):24} {'; '.join(f'{t:.2f} µs {what}' for t, what in tried[:6])}", end=""
            )
            print("".join(f" … {t:.2f} µs {what}" for t, what in tried[6:] if "used" in what), flush=True)
            del sets
            torch.cuda.empty_cache()


@triton.jit
def _link_kernel(
    x_ptr, weight_ptr, out_ptr, WAIT: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr
):
    """out = x·weight + 1. WAIT: for the kernel before. EARLY: lets the next one start. AHEAD: weights first."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
    if AHEAD:
        weight = tl.load(weight_ptr + at)
    if WAIT:
        gdc_wait()
    x = tl.load(x_ptr + at)
    if not AHEAD:
        weight = tl.load(weight_ptr + at)
    tl.store(out_ptr + at, x * weight + 1)


# How a chain's kernels are launched: launch_pdl, WAIT, EARLY, AHEAD.
LAUNCHES: dict[str, tuple[bool, bool, bool, bool]] = {
    "plain": (False, False, False, False),
    "pdl: wait": (True, True, False, False),
    "pdl: let the next start, wait": (True, True, True, False),
    "pdl: let it start, load weights, wait": (True, True, True, True),
}


def _chain(programs: int, launch: tuple[bool, bool, bool, bool], between: bool) -> tuple[float, Tensor]:
    """Microseconds of a link of the chain in a CUDA graph and its result; `between`: after a cuBLAS product each."""
    pdl, wait, early, ahead = launch
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device="cuda", generator=generator).to(BF16)

    size = programs * CHAIN_WIDTH
    first, weight = draw(size), draw(size)
    matrix = draw(CHAIN_WIDTH, CHAIN_WIDTH) / CHAIN_WIDTH
    buffers = [torch.zeros_like(first) for _ in range(3)]
    options: dict[str, Any] = {"num_warps": 4, "launch_pdl": pdl}

    def run() -> None:
        x = first
        for link in range(CHAIN):
            if between:
                product = buffers[2].view(programs, CHAIN_WIDTH)
                torch.mm(x.view(programs, CHAIN_WIDTH), matrix, out=product)
                x = buffers[2]
            out = buffers[link % 2]
            _link_kernel[(programs,)](x, weight, out, WAIT=wait, EARLY=early, AHEAD=ahead, BLOCK=CHAIN_WIDTH, **options)
            x = out

    took = time_call(run, device="cuda", budget_seconds=0.1).seconds * 1e6 / CHAIN
    for buffer in buffers:
        buffer.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return took, buffers[(CHAIN - 1) % 2].clone()


def pdl() -> None:
    """A chain of small kernels, each of which reads what the one before wrote, alone and between cuBLAS products."""
    print(f"a chain of {CHAIN} kernels in a CUDA graph, µs a link (same: whether the result is the plain chain's)")
    for between in (False, True):
        for programs in (1, 8, 132, 1024):
            cells, want = [], None
            for name, launch in LAUNCHES.items():
                try:
                    took, found = _chain(programs, launch, between)
                except Exception as error:  # a driver or a capture that refuses is a finding too
                    cells.append(f"{name}: {type(error).__name__} {str(error)[:80]}")
                    continue
                want = found if want is None else want
                cells.append(f"{name} {took:.2f} ({'same' if torch.equal(found, want) else 'OTHER'})")
            label = f"{programs} programs{', after cuBLAS' * between}"
            print(f"{label:28} {'; '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try other tiles instead")
    parser.add_argument("--pdl", action="store_true", help="time programmatic dependent launch instead")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    with torch.no_grad():
        if options.tune:
            tune()
        if options.pdl:
            pdl()
        if not options.tune and not options.pdl:
            table()


if __name__ == "__main__":
    main()
