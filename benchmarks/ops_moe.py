"""Mixture-of-experts operations on a GPU: ours beside torch's, in µs and TB/s of what must be moved, or in TFLOP/s.

    python -m benchmarks.ops_moe [--tune] [--models qwen3-30b-a3b] [--tokens 1,32]

Takes a minute on an H200, with --tune a minute a model. Calls run in a CUDA graph and take turns through several
routings of random tokens, which hit different experts. torch's are our references (argsort, index, fp32 sums) and
`_grouped_mm`, with the biases added afterwards; "layer" is all of them from the router's logits on, ours by the rules
of rooflight/ops. Products of ours are our kernel's, whatever the rule. `--tune` tries other plans for the products
alone and prints the best ones as rooflight/ops/kernels/grouped_plan.py wants them, and torch's time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops_moe_layer import BF16, INPUTS, MODELS, Layer, operations, torchs, weights_of
from benchmarks.timing import attempt, graph_seconds, in_processes
from rooflight.ops.kernels.grouped import linear
from rooflight.ops.kernels.grouped_plan import Plan, mean_rows, plan_for

CALLS = 24
WRONG = 2e-2


TOKENS = (1, 8, 32, 128, 4096)
TUNED = {  # rows of a tile -> (outputs, inputs, warps, stages)
    16: (
        *((32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 5), (64, 64, 4, 8), (64, 128, 4, 3), (64, 128, 4, 4)),
        *((64, 128, 4, 6), (64, 256, 4, 3), (128, 64, 4, 4), (128, 64, 4, 6), (128, 128, 4, 3), (128, 128, 8, 4)),
    ),
    32: ((64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 4, 6), (128, 128, 8, 4)),
    64: ((64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)),
    128: ((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3)),
}


def tried(run: Callable[[int], Any], what: str) -> float:
    """Seconds, or NaN with a line that says why not."""
    return attempt(lambda: graph_seconds(run, range(INPUTS), CALLS), what, float("nan"))


def error_of(ours: Any, theirs: Any) -> float:
    """Largest error relative to the largest value."""
    a, b = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def table(name: str, layer: Layer) -> None:
    for what, (ours, theirs, moved, flops) in operations(layer).items():
        label = f"{name:>14} {layer.tokens:>5} {what:<15}"
        try:
            error = error_of(ours(0), theirs(0))
        except Exception as failure:
            print(f"{label} FAILED: {type(failure).__name__}: {str(failure).splitlines()[0][:200]}", flush=True)
            continue
        a, b = tried(ours, what), tried(theirs, f"torch's {what}")
        line = f"{label} {a * 1e6:9.2f} {moved / a / 1e12:6.2f} {flops / a / 1e12:6.0f} {b * 1e6:10.2f} {b / a:7.2f}"
        print(line + ("" if error < WRONG else f"  WRONG by {error:.1e}"), flush=True)


def warm_one(job: tuple[str, int]) -> None:
    """Compile what a table needs into Triton's cache on disk."""
    name, tokens = job
    try:
        with torch.inference_mode():
            layer = Layer(MODELS[name], tokens, weights_of(MODELS[name]))
            for ours, _, _, _ in operations(layer).values():
                ours(0)
            torch.cuda.synchronize()
    except Exception as failure:
        print(f"{name} {tokens} FAILED while compiling: {str(failure)[:200]}", flush=True)


def plans(rows: int, experts: int) -> list[Plan]:
    """What is tried for so many rows: tiles near the mean of an expert's."""
    mean = mean_rows(rows, experts)
    sizes = [size for size in TUNED if (size == 16 or size <= 8 * mean) and (mean <= 2 * size or size == 128)]
    return [Plan(size, *rest) for size in sizes for rest in TUNED[size]]


def compile_one(job: tuple[int, int, int, int, bool, Plan]) -> None:
    """Compile a plan's kernel into Triton's cache on disk."""
    experts, outputs, inputs, rows, bias, plan = job
    x, weight = (torch.empty(s, device="cuda", dtype=BF16) for s in ((rows, inputs), (experts, outputs, inputs)))
    counts = torch.zeros(experts, dtype=torch.int64, device="cuda")
    try:
        linear(x, weight, weight[:, :, 0].contiguous() if bias else None, counts, plan)
    except Exception:
        return


def tune(models: list[str], token_counts: list[int]) -> None:
    jobs = []
    for name, t in itertools.product(models, token_counts):
        m = MODELS[name]
        for n, k in ((2 * m.ffn, m.width), (m.width, m.ffn)):
            jobs += [(m.experts, n, k, t * m.top_k, m.bias, plan) for plan in plans(t * m.top_k, m.experts)]
    # Kernels differ by plan, experts, bias, whole tiles, and whether rows are divisible by 16; compile each once.
    unique = {(j[0], j[2] % j[5].inputs == 0, j[4], j[5]): j for j in jobs}
    in_processes(compile_one, unique.values())
    for name in models:
        m = MODELS[name]
        weights = weights_of(m)
        for t in token_counts:
            layer = Layer(m, t, weights)
            rows = t * m.top_k
            for what in ("up", "down"):
                x, weight, bias = (layer.rows, *weights[:2]) if what == "up" else (layer.h, *weights[2:])
                moved = layer.hit * weight[0].numel() * 2 + 2 * rows * (weight.shape[1] + weight.shape[2])

                def call(i: int, plan: Plan, x: Any = x, w: Any = weight, b: Any = bias, at: Layer = layer) -> Tensor:
                    return linear(x[i], w, b, at.counts[i], plan)

                theirs = tried(lambda i, x=x, w=weight, b=bias, c=layer.counts: torchs(x[i], w, b, c[i]), "torch's")
                want = torchs(x[0], weight, bias, layer.counts[0])
                found = []
                for plan in plans(rows, m.experts):
                    took = tried(lambda i, plan=plan: call(i, plan), str(plan))
                    if took == took and not error_of(call(0, plan), want) < WRONG:
                        print(f"    {plan} is WRONG", flush=True)
                    found.append((took, str(plan), plan))
                found = sorted(one for one in found if one[0] == one[0])[:3]
                shown = "; ".join(f"{s * 1e6:.1f} {moved / s / 1e12:.2f} {short(p)}" for s, _, p in found)
                rule = short(plan_for(rows, m.experts, BF16))
                print(f"{name:>14} {t:>5} mean {mean_rows(rows, m.experts):6.1f} {what:<5} {shown}", end="  ")
                print(f"rule {rule}  torch {theirs * 1e6:.1f}", flush=True)
            del layer
        del weights
        torch.cuda.empty_cache()


def short(plan: Plan) -> str:
    """As it stands in HALF."""
    return f"Plan({plan.rows}, {plan.outputs}, {plan.inputs}, {plan.warps}, {plan.stages})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try other plans for the products, and nothing else")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="with commas")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    token_counts, models = [int(t) for t in options.tokens.split(",")], options.models.split(",")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.inference_mode():
        if options.tune:
            tune(models, token_counts)
            return
        in_processes(warm_one, itertools.product(models, token_counts))
        head = f"{'model':>14} {'T':>5} {'operation':<15} {'ours µs':>9} {'TB/s':>6} {'TFLOP/s':>6} {'torch µs':>9}"
        print(head + f" {'ratio':>7}", flush=True)
        for name in models:
            weights = weights_of(MODELS[name])
            for tokens in token_counts:
                table(name, Layer(MODELS[name], tokens, weights))
            del weights
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
