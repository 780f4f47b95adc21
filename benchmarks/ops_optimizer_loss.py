"""AdamW, the gradient norm and the fused loss on a GPU: our kernels beside PyTorch's own, and the roof of the same run.

    python -m benchmarks.ops_optimizer_loss [--only optimizer|loss]        (under a minute on an H200)

Bytes are the operation's own price; shares are of the copy bandwidth, and of the bf16 product rate, of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from benchmarks.timing import copy_bandwidth
from rooflight.ops.adamw import adamw
from rooflight.ops.clipping import grad_norm, scale_
from rooflight.ops.fused_loss import chunk_tokens, linear_cross_entropy

FP32, BF16 = torch.float32, torch.bfloat16
REPEATS = 7
# (T, D, V) of the training runs: 1.24B, 152M and 3.2B.
LOSSES = [(16384, 2048, 128256), (32768, 768, 50304), (16384, 3072, 128256)]


def shapes() -> list[tuple[int, ...]]:
    """The tensors of a 16-layer decoder of width 2048: 1.24e9 parameters."""
    layer = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (2048,), (2048,)]
    return [(128256, 2048), (2048,), *layer * 16]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def median_ms(fn: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median device time of one call. Every call here moves gigabytes, so that none finds its data in the cache."""
    for _ in range(2):
        fn()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """(copy in TB/s, reads and writes; 8192³ bf16 product in TFLOP/s) of this machine, now."""
    a, b = draw((8192, 8192), BF16), draw((8192, 8192), BF16)
    return copy_bandwidth() / 1e12, 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9


def torchs_adamw(*lists: Any) -> None:
    torch.ops.aten._fused_adamw_(
        *lists, lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False
    )


def optimizer_rows(copy: float) -> None:
    print(f"{'operation':44} {'ms':>8} {'TB/s':>7} {'of copy':>8} {'torch ms':>9}")

    def row(name: str, moved: int, ms: float, peer: float | None = None) -> None:
        rate = moved / ms / 1e9
        print(f"{name:44} {ms:8.2f} {rate:7.2f} {rate / copy:8.1%} {f'{peer:9.2f}' if peer else '        –'}")

    scale = torch.tensor(0.5, device="cuda")
    for name, types, masters, seed in (
        ("adamw bf16 throughout", (BF16, BF16, BF16), False, 0),
        ("adamw bf16 throughout, stochastic rounding", (BF16, BF16, BF16), False, 7),
        ("adamw bf16, fp32 states", (BF16, BF16, FP32), False, 0),
        ("adamw bf16, fp32 gradients, states, masters", (BF16, FP32, FP32), True, 0),
        ("adamw fp32", (FP32, FP32, FP32), False, 0),
    ):
        params, grads, means, squares = (
            [draw(shape, dtype) for shape in shapes()] for dtype in (*types[:2], types[2], types[2])
        )
        squares = [v.abs_() for v in squares]
        fp32 = [p.float() for p in params] if masters else []
        args = (params, grads, means, squares, fp32, scale, 10, 1e-4, 0.9, 0.95, 1e-8, 0.1, seed)
        peer = None
        ours = median_ms(partial(adamw, *args))
        if len(set(types)) == 1 and not seed:
            steps = [torch.tensor(10.0, device="cuda")] * len(params)
            peer = median_ms(partial(torchs_adamw, params, grads, means, squares, [], steps))
        row(name, adamw.price(None, *args).total_bytes, ours, peer)
        if name == "adamw bf16 throughout":
            norm = grad_norm(grads)
            theirs_ms = median_ms(partial(torch.nn.utils.get_total_norm, grads, foreach=True))
            ours_ms = median_ms(partial(grad_norm, grads))
            row("grad_norm bf16", grad_norm.price(norm, grads).total_bytes, ours_ms, theirs_ms)
            row("scale_ bf16", 2 * sum(g.nbytes for g in grads), median_ms(partial(scale_, grads, scale)))
        del params, grads, means, squares, fp32, args
        torch.cuda.empty_cache()


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(torch.nn.functional.linear(x, weight).float(), targets)


def chunked(x: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
    """What one writes in plain PyTorch: chunks of tokens, each recomputed in the backward."""

    def part(x: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(torch.nn.functional.linear(x, weight).float(), targets, reduction="sum")

    parts = zip(x.split(size), targets.split(size), strict=True)
    sums: list[Any] = [checkpoint(part, x, t, use_reentrant=False) for x, t in parts]
    return torch.stack(sums).sum() / targets.numel()


def backward(x: Tensor, weight: Tensor, loss: Callable[[], Tensor]) -> None:
    x.grad = weight.grad = None
    loss().backward()


def loss_rows(product: float) -> None:
    print(f"\n{'loss, forward and backward':44} {'ms':>8} {'TFLOP/s':>8} {'of GEMM':>8} {'peak GiB':>9}")
    compiled = torch.compile(chunked, dynamic=False)
    for tokens, width, vocabulary in LOSSES:
        x = draw((tokens, width), BF16).requires_grad_()
        weight = (draw((vocabulary, width), BF16) * 0.02).requires_grad_()
        targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
        chunk = chunk_tokens(tokens, vocabulary, 2)
        print(f"T {tokens}, D {width}, V {vocabulary}")
        peers: dict[str, Callable[[], Tensor]] = {
            f"  linear_cross_entropy, chunks of {chunk}": partial(linear_cross_entropy, x, weight, targets),
            "  torch.compile, chunks recomputed": partial(compiled, x, weight, targets, chunk),
            "  full logits": partial(plain, x, weight, targets),
        }
        for name, loss in peers.items():
            step = partial(backward, x, weight, loss)
            torch.cuda.empty_cache()
            try:
                step()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                ms = median_ms(step, 5)
            except torch.OutOfMemoryError:
                print(f"{name:44} out of memory")
                continue
            rate = 6 * tokens * width * vocabulary / ms / 1e9
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            print(f"{name:44} {ms:8.2f} {rate:8.0f} {rate / product:8.1%} {peak:9.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("optimizer", "loss"))
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        print("ops_optimizer_loss: no CUDA device; run it on a machine with one", file=sys.stderr)
        return 2
    copy, product = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s\n")
    if only != "loss":
        optimizer_rows(copy)
    if only != "optimizer":
        loss_rows(product)
    return 0


if __name__ == "__main__":
    sys.exit(main())
