"""A linear layer forward and backward in fp8 beside bf16 on a GPU: milliseconds, TFLOP/s, and the share of the casts.

    python -m benchmarks.ops_fp8 [--sweep]        (under half a minute on an H200)

TFLOP/s count the three products alone, 6·T·K·N, also where casts are part of the time. Calls run in a CUDA graph.
Casts are timed by themselves: their bytes are the operation's own price, the share is of the copy bandwidth of the same
run. `--sweep` then tries other tiles. Legend: T tokens  N output width  K input width
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copy_bandwidth
from rooflight.hardware.timing import time_call
from rooflight.ops import fp8_linear as fp8
from rooflight.ops.linear import linear
from rooflight.ops.op import Op

TOKENS = 16384
# (K, N): QKV, gate and up, and down of the training runs in ANCHORS and of Llama-3.1-8B.
SHAPES = ((2048, 3072), (3072, 2 * 8192), (8192, 3072), (4096, 28672), (14336, 4096))
TILES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 128, 4), (32, 128, 4))
BUDGET_SECONDS = 0.15


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def seconds_of(call: Callable[[], Any]) -> float:
    return time_call(call, device="cuda", budget_seconds=BUDGET_SECONDS).seconds


def step(layer: Callable[..., Tensor], x_TK: Tensor, weight_NK: Tensor, grad_TN: Tensor) -> tuple[Tensor, ...]:
    """Forward and both gradients."""
    return torch.autograd.grad(layer(x_TK, weight_NK), (x_TK, weight_NK), grad_TN)


@torch.no_grad()
def parts(x_TK: Tensor, weight_NK: Tensor, grad_TN: Tensor) -> list[tuple[Op, tuple[Any, ...]]]:
    """Every operation of a forward and backward with its arguments, in order."""
    x_amax, weight_amax, grad_amax = (fp8.fp8_amax(tensor) for tensor in (x_TK, weight_NK, grad_TN))
    x_args, weight_args = (x_TK, x_amax, fp8.E4M3), (weight_NK, weight_amax, fp8.E4M3)
    grad_args = (grad_TN, grad_amax, fp8.E5M2)
    x8_TK, x8_KT, x_scale = fp8.fp8_quantize_both(*x_args)
    weight8_NK, weight_scale = fp8.fp8_quantize(*weight_args)
    weight8_KN, _ = fp8.fp8_quantize_transposed(*weight_args)
    grad8_TN, grad8_NT, grad_scale = fp8.fp8_quantize_both(*grad_args)
    bf16 = torch.bfloat16
    return [
        (fp8.fp8_amax, (x_TK,)),
        (fp8.fp8_amax, (weight_NK,)),
        (fp8.fp8_quantize_both, x_args),
        (fp8.fp8_quantize, weight_args),
        (fp8.scaled_linear, (x8_TK, weight8_NK, x_scale, weight_scale, None, bf16)),
        (fp8.fp8_amax, (grad_TN,)),
        (fp8.fp8_quantize_both, grad_args),
        (fp8.fp8_quantize_transposed, weight_args),
        (fp8.fp8_linear_input_grad, (grad8_TN, weight8_KN, grad_scale, weight_scale, bf16)),
        (fp8.fp8_linear_weight_grad, (grad8_NT, x8_KT, grad_scale, x_scale, bf16)),
    ]


def operands(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(TOKENS, k).requires_grad_(), (draw(n, k) / k**0.5).requires_grad_(), draw(TOKENS, n)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


def table(roof: float) -> None:
    head = f"{'K → N':>14} {'bf16 ms':>8} {'TFLOP/s':>8} {'fp8 ms':>8} {'TFLOP/s':>8} {'speed-up':>8}"
    print(f"{head} {'casts ms':>9} {'share':>6} {'forward':>8} {'input':>6} {'weight':>6} TFLOP/s   error of y, dx, dW")
    for k, n in SHAPES:
        tensors = operands(k, n)
        flops = 6.0 * TOKENS * k * n
        found = [fp8.fp8_linear(*tensors[:2]), *step(fp8.fp8_linear, *tensors)]
        wanted = [linear(*tensors[:2], None), *step(lambda x, w: linear(x, w, None), *tensors)]
        errors = " ".join(f"{relative(a, b):.3f}" for a, b in zip(found, wanted, strict=True))
        del found, wanted
        plain = seconds_of(lambda args=tensors: step(lambda x, w: linear(x, w, None), *args))
        ours = seconds_of(lambda args=tensors: step(fp8.fp8_linear, *args))
        casts, products = 0.0, []
        with torch.no_grad():
            for op, args in parts(*tensors):
                took = seconds_of(lambda op=op, args=args: op(*args))
                if "linear" in op.name:
                    products.append(flops / 3 / took / 1e12)
                else:
                    casts += took
        print(
            f"{k:6} → {n:5} {plain * 1e3:8.3f} {flops / plain / 1e12:8.0f} {ours * 1e3:8.3f} {flops / ours / 1e12:8.0f}"
            f" {plain / ours:8.2f} {casts * 1e3:9.3f} {casts / ours:6.1%} {products[0]:8.0f} {products[1]:6.0f}"
            f" {products[2]:6.0f}           {errors}",
            flush=True,
        )
    print(f"\n{'cast':26} {'rows × columns':>16} {'µs':>8} {'TB/s':>6} of copy")
    for k, n in (SHAPES[0], SHAPES[3]):
        with torch.no_grad():
            for op, args in parts(*operands(k, n)):
                if "linear" not in op.name:
                    print_cast(op, args, roof)


def print_cast(op: Op, args: tuple[Any, ...], roof: float, note: str = "") -> None:
    took = seconds_of(lambda: op(*args))
    rate = op.price(op(*args), *args).total_bytes / took
    size = "×".join(str(size) for size in args[0].shape)
    print(f"{op.name:26} {size:>16} {took * 1e6:8.1f} {rate / 1e12:6.2f} {rate / roof:7.1%} {note}", flush=True)


@torch.no_grad()
def sweep(roof: float) -> None:
    """Other tiles for the casts, and other chunks for the largest magnitude."""
    from rooflight.ops.kernels import fp8 as kernels

    x_TK = draw(TOKENS, 4096)
    amax_P = fp8.fp8_amax(x_TK)
    before = kernels.TILE_ROWS, kernels.TILE_COLUMNS, kernels.TILE_WARPS
    for op in (fp8.fp8_quantize, fp8.fp8_quantize_transposed, fp8.fp8_quantize_both):
        for tile in TILES:
            kernels.TILE_ROWS, kernels.TILE_COLUMNS, kernels.TILE_WARPS = tile
            print_cast(op, (x_TK, amax_P, fp8.E4M3), roof, "tile {}×{}, {} warps".format(*tile))
    kernels.TILE_ROWS, kernels.TILE_COLUMNS, kernels.TILE_WARPS = before
    chunk = kernels.AMAX_BLOCK, kernels.AMAX_WARPS
    for block, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)):
        kernels.AMAX_BLOCK, kernels.AMAX_WARPS = block, warps
        print_cast(fp8.fp8_amax, (x_TK,), roof, f"chunks of {block}, {warps} warps")
    kernels.AMAX_BLOCK, kernels.AMAX_WARPS = chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="then try other tiles for the casts")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        sys.exit("this benchmark needs a CUDA GPU of capability 8.9 or more, for fp8; none is visible")
    torch.manual_seed(0)
    roof = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {roof / 1e12:.2f} TB/s, {TOKENS} tokens")
    table(roof)
    if options.sweep:
        sweep(roof)


if __name__ == "__main__":
    main()
