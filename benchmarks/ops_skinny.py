"""Linear layers of few rows on a GPU: our kernels beside cuBLAS, in µs and TB/s of weights, inputs and outputs.

    python -m benchmarks.ops_skinny [--tune] [--rows 1,8] [--shapes 6144x4096]

Takes half a minute on an H200, with --tune a whole one. Calls run in a CUDA graph and take turns through more weights
than the L2 cache holds. "ours" is the plan of rooflight/ops/kernels/skinny_plan.py (nan: the product is cuBLAS's),
and the ratio is cuBLAS's time over ours. `--tune` tries other plans and prints the best two as CLASSES wants them.
Shapes N×K are those of Llama-3.1-8B and of Qwen3-0.6B.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from benchmarks.timing import copy_bandwidth, graph_seconds, in_processes
from rooflight.ops.kernels.skinny_linear import linear
from rooflight.ops.kernels.skinny_plan import Plan, plan_for

SHAPES = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
)
ROWS = (1, 2, 4, 8)
COLD_BYTES = 256 * 2**20
GRAPH_BYTES = 2 * 2**30  # of weights that a replay reads, at least: half a millisecond
CHECKED = 2048  # outputs that are compared with fp32
WRONG = 1e-2

IN_REGISTERS = (
    *((4, 1024, 4, 1), (8, 1024, 4, 1), (16, 1024, 4, 1), (2, 2048, 4, 1), (4, 2048, 4, 1), (4, 2048, 8, 1)),
    *((8, 2048, 8, 1), (1, 4096, 4, 1), (2, 4096, 4, 1), (2, 4096, 8, 1), (4, 4096, 8, 1), (4, 4096, 16, 1)),
    *((4, 512, 2, 1), (8, 512, 2, 1), (16, 512, 2, 1), (8, 256, 1, 1), (16, 256, 1, 1), (4, 1024, 4, 4)),
    *((8, 1024, 4, 3), (8, 1024, 4, 5), (4, 2048, 4, 4), (8, 512, 2, 4), (8, 256, 1, 4), (8, 256, 1, 8)),
)
IN_REGISTERS_OF_MORE_ROWS = (
    *((2, 1024, 4, 1), (4, 1024, 4, 1), (8, 1024, 4, 1), (2, 2048, 8, 1), (4, 2048, 8, 1), (4, 512, 2, 1)),
    *((8, 512, 2, 1), (8, 256, 1, 1), (4, 1024, 4, 4), (8, 512, 2, 4), (8, 256, 1, 6)),
)


def plans(rows: int, inputs: int) -> Iterator[Plan]:
    """What is tried for so many rows; tiles of more than twice the inputs would be mostly empty."""
    for plan in IN_REGISTERS if rows <= 2 else IN_REGISTERS_OF_MORE_ROWS:
        if plan[1] < 2 * inputs:
            yield Plan(*plan)


def tensors(rows: int, outputs: int, inputs: int, copies: int = 1) -> tuple[Tensor, list[Tensor]]:
    def draw(count: int) -> Tensor:
        return torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16)

    return draw(rows), [draw(outputs) for _ in range(copies)]


def compile_one(job: tuple[int, Plan]) -> None:
    """Compile a plan's kernel into Triton's cache on disk."""
    rows, plan = job
    x, (w,) = tensors(rows, 512, 2048)
    try:
        linear(x, w, None, plan)
    except (TritonError, RuntimeError):
        return


def seconds(run: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    return graph_seconds(run, weights, max(len(weights), GRAPH_BYTES // (2 * weights[0].numel())))


def error_of(x: Tensor, w: Tensor, plan: Plan) -> float:
    """Largest error of some outputs against fp32, relative to the largest value."""
    want = x.float() @ w[:CHECKED].float().t()
    return float((linear(x, w, None, plan)[:, :CHECKED].float() - want).abs().max() / want.abs().max())


def try_plan(x: Tensor, weights: list[Tensor], plan: Plan) -> float:
    """Seconds; infinite where a plan wants more shared memory than there is, or is wrong."""
    try:
        error = error_of(x, weights[0], plan)
    except OutOfResources:
        return float("inf")
    except (TritonError, RuntimeError) as failure:
        print(f"FAILED: {plan} for {x.shape[0]}×{weights[0].shape[0]}×{x.shape[1]}: {failure}", flush=True)
        return float("inf")
    if not error < WRONG:
        print(f"WRONG: {plan} for {x.shape[0]}×{weights[0].shape[0]}×{x.shape[1]}: error {error:.1e}", flush=True)
        return float("inf")
    return seconds(lambda w: linear(x, w, None, plan), weights)


def table(shapes: list[tuple[int, int]], row_counts: list[int], tune: bool) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy_bandwidth() / 1e12:.2f} TB/s")
    head = f"{'N×K':>12} {'M':>3} {'ours µs':>8} {'TB/s':>5} {'cuBLAS':>8} {'TB/s':>5} {'ratio':>6}"
    print(head + ("  best µs   TB/s  plan, and the next" if tune else ""), flush=True)
    for outputs, inputs in shapes:
        copies = max(1, -(-COLD_BYTES // (2 * outputs * inputs)))
        weights = tensors(1, outputs, inputs, copies)[1]
        for rows in row_counts:
            x, _ = tensors(rows, 1, inputs)
            moved = 2 * (outputs * inputs + rows * (outputs + inputs)) / 1e12
            plan = plan_for(rows, outputs, inputs)
            ours = float("nan") if plan is None else try_plan(x, weights, plan)
            theirs = seconds(lambda w, x=x: torch.nn.functional.linear(x, w), weights)
            line = f"{outputs:>7}×{inputs:<5}{rows:>3} {ours * 1e6:8.2f} {moved / ours:5.2f}"
            line += f" {theirs * 1e6:8.2f} {moved / theirs:5.2f} {theirs / ours:6.2f}"
            if tune:
                tried = sorted(((try_plan(x, weights, p), p) for p in plans(rows, inputs)), key=lambda pair: pair[0])
                (best, chosen), (second, other) = tried[:2]
                line += f" {best * 1e6:8.2f} {moved / best:5.2f}  {short(chosen)}; {second * 1e6:.2f} {short(other)}"
            print(line, flush=True)
        del weights
        torch.cuda.empty_cache()


def short(plan: Plan) -> str:
    """As it stands in CLASSES."""
    fields = (plan.outputs, plan.inputs, plan.warps, plan.stages)
    return f"Plan({', '.join(map(str, fields))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="also try other plans")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, with commas")
    parser.add_argument(
        "--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="N x K of weights, with commas"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    row_counts = [int(rows) for rows in options.rows.split(",")]
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in options.shapes.split(","))]
    jobs = {(rows, plan_for(rows, *shape)) for rows in row_counts for shape in shapes}
    if options.tune:
        jobs |= {(rows, plan) for rows in row_counts for _, k in shapes for plan in plans(rows, k)}
    with torch.no_grad():
        in_processes(compile_one, sorted({(rows, plan) for rows, plan in jobs if plan is not None}, key=str))
        table(shapes, row_counts, options.tune)


if __name__ == "__main__":
    main()
