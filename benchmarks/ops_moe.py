"""Mixture-of-experts operations on a GPU: ours beside torch's, in µs and TB/s of what must be moved, or in TFLOP/s.

    python benchmarks/ops_moe.py [--tune] [--models qwen3-30b-a3b] [--tokens 1,32]

Takes a minute on an H200, with --tune a minute a model. Calls run in a CUDA graph and take turns through several
routings of random tokens, which hit different experts. torch's are our references (argsort, index, fp32 sums) and
`_grouped_mm`, with the biases added afterwards; "layer" is all of them from the router's logits on, ours by the rules
of rooflight/ops. Products of ours are our kernel's, whatever the rule. `--tune` tries other plans for the products
alone and prints the best ones as rooflight/ops/kernels/grouped_plan.py wants them, and torch's time.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflight.ops import dispatch, grouped, routing
from rooflight.ops.activation import gated_activation
from rooflight.ops.grouped_gated import grouped_gated_linear
from rooflight.ops.kernels.grouped import gated_linear, linear
from rooflight.ops.kernels.grouped_plan import Plan, mean_rows, plan_for

INPUTS, CALLS, REPLAYS = 8, 24, 5
WRONG = 2e-2
BF16 = torch.bfloat16
_stream: list[torch.cuda.Stream] = []


@dataclass(frozen=True)
class Model:
    """Shapes of one layer, and how its router scores."""

    experts: int
    top_k: int
    width: int
    ffn: int
    bias: bool
    scoring: str
    kind: str


MODELS = {
    "qwen3-30b-a3b": Model(128, 8, 2048, 768, False, "softmax", "silu"),
    "gpt-oss-20b": Model(32, 4, 2880, 2880, True, "softmax_topk", "clamped_swiglu"),
    "mixtral-8x7b": Model(8, 2, 4096, 14336, False, "softmax", "silu"),
}
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


class Layer:
    """A model's weights, and routings of so many tokens."""

    def __init__(self, model: Model, tokens: int, weights: tuple[Any, ...]):
        self.model, self.tokens = model, tokens
        self.up, self.up_bias, self.down, self.down_bias = weights
        self.x = [torch.randn(tokens, model.width, device="cuda", dtype=BF16) for _ in range(INPUTS)]
        # Different numbers in bf16, for torch and we choose differently among equals.
        ranks = [torch.rand(tokens, model.experts, device="cuda").argsort(-1) for _ in range(INPUTS)]
        self.logits = [(rank / 16 - model.experts / 32).to(BF16) for rank in ranks]
        routes = [self.route(i) for i in range(INPUTS)]
        self.weights, self.chosen = [r[0] for r in routes], [r[1] for r in routes]
        sorts = [dispatch._permute(self.x[i], self.chosen[i], model.experts) for i in range(INPUTS)]
        self.rows, self.sources, self.counts = ([s[i] for s in sorts] for i in range(3))
        self.h = [torch.randn(tokens * model.top_k, model.ffn, device="cuda", dtype=BF16) for _ in range(INPUTS)]
        self.hit = statistics.mean(int((c > 0).sum()) for c in self.counts)

    def route(self, i: int, run: Callable[..., Any] = routing._route) -> Any:
        return run(self.logits[i], None, self.model.top_k, self.model.scoring, True, 1.0, 1, 1, "max")

    def through(self, i: int, ours: bool) -> Tensor:
        """The whole layer, from the logits on."""
        experts = self.model.experts
        if ours:
            weights, chosen = self.route(i, routing.route)
            rows, source, counts = dispatch.permute(self.x[i], chosen, experts)
            h = grouped_gated_linear(rows, self.up, self.up_bias, counts, self.model.kind)
            return dispatch.unpermute(grouped.grouped_linear(h, self.down, self.down_bias, counts), weights, source)
        weights, chosen = self.route(i)
        rows, source, counts = dispatch._permute(self.x[i], chosen, experts)
        h = gated_activation(torchs(rows, self.up, self.up_bias, counts), self.model.kind)
        return dispatch._unpermute(torchs(h, self.down, self.down_bias, counts), weights, source)


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    out = grouped._torchs_linear(x, weight, counts)
    return out if bias is None else out + bias.repeat_interleave(counts, dim=0, output_size=x.shape[0])


def weights_of(model: Model) -> tuple[Any, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=BF16) / shape[-1] ** 0.5

    up, down = draw(model.experts, 2 * model.ffn, model.width), draw(model.experts, model.width, model.ffn)
    if not model.bias:
        return up, None, down, None
    return up, draw(model.experts, 2 * model.ffn), down, draw(model.experts, model.width)


def seconds(run: Callable[[int], Any]) -> float:
    """Median time of a call, of replays of one graph over all inputs."""
    if not _stream:
        _stream.append(torch.cuda.Stream())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream[0]):
        # Outside of the capture, for libraries allocate when they first run on a stream.
        run(0)
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for i in range(CALLS):
                run(i % INPUTS)
        finally:
            graph.capture_end()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3 / CALLS)
    torch.cuda.synchronize()
    graph.reset()
    return statistics.median(times)


def tried(run: Callable[[int], Any], what: str) -> float:
    """Seconds, or NaN with a line that says why not."""
    try:
        return seconds(run)
    except Exception as failure:
        print(f"    {what} FAILED: {type(failure).__name__}: {str(failure).splitlines()[0][:150]}", flush=True)
        torch.cuda.synchronize()
        return float("nan")


def error_of(ours: Any, theirs: Any) -> float:
    """Largest error relative to the largest value."""
    a, b = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def operations(layer: Layer) -> dict[str, tuple[Callable[[int], Any], Callable[[int], Any], float, float]]:
    """Ours, torch's, bytes that must be moved, FLOPs."""
    m, t = layer.model, layer.tokens
    rows = t * m.top_k
    row_bytes = 2 * m.width
    up_bytes, down_bytes = (layer.hit * w[0].numel() * 2 for w in (layer.up, layer.down))
    up_bytes += 2 * rows * (m.width + 2 * m.ffn)
    down_bytes += 2 * rows * (m.width + m.ffn)
    flops = 2.0 * rows * m.width * m.ffn
    up, down = (layer.up, layer.up_bias), (layer.down, layer.down_bias)
    found: dict[str, tuple[Callable[[int], Any], Callable[[int], Any], float, float]] = {
        "route": (lambda i: layer.route(i, routing.route), layer.route, 2.0 * t * m.experts + 12 * rows, 0),
        "permute": (
            lambda i: dispatch.permute(layer.x[i], layer.chosen[i], m.experts),
            lambda i: dispatch._permute(layer.x[i], layer.chosen[i], m.experts),
            (t + rows) * row_bytes + 16.0 * rows,
            0,
        ),
        "up product": (
            lambda i: linear(layer.rows[i], *up, layer.counts[i]),
            lambda i: torchs(layer.rows[i], *up, layer.counts[i]),
            up_bytes,
            2 * flops,
        ),
        "up, activation": (
            lambda i: gated_linear(layer.rows[i], *up, layer.counts[i], m.kind),
            lambda i: gated_activation(torchs(layer.rows[i], *up, layer.counts[i]), m.kind),
            up_bytes,
            2 * flops,
        ),
        "down product": (
            lambda i: linear(layer.h[i], *down, layer.counts[i]),
            lambda i: torchs(layer.h[i], *down, layer.counts[i]),
            down_bytes,
            flops,
        ),
        "unpermute": (
            lambda i: dispatch.unpermute(layer.rows[i], layer.weights[i], layer.sources[i]),
            lambda i: dispatch._unpermute(layer.rows[i], layer.weights[i], layer.sources[i]),
            (t + rows) * row_bytes + 12.0 * rows,
            0,
        ),
        "layer": (
            lambda i: layer.through(i, True),
            lambda i: layer.through(i, False),
            up_bytes + down_bytes,
            3 * flops,
        ),
    }
    if t >= 1024:
        found |= backwards(layer, rows, row_bytes)
    return found


def backwards(
    layer: Layer, rows: int, row_bytes: int
) -> dict[str, tuple[Callable[[int], Any], Callable[[int], Any], float, float]]:
    m, t = layer.model, layer.tokens

    def route_args(i: int) -> tuple[Any, ...]:
        return layer.weights[i], layer.logits[i], layer.chosen[i], m.scoring, True, 1.0

    def sum_args(i: int) -> tuple[Any, ...]:
        return layer.x[i], layer.rows[i], layer.weights[i], layer.sources[i]

    return {
        "route back": (
            lambda i: routing.route_backward(*route_args(i)),
            lambda i: routing._route_backward(*route_args(i)),
            4.0 * t * m.experts + 12 * rows,
            0,
        ),
        "permute back": (
            lambda i: dispatch.permute_backward(layer.rows[i], layer.sources[i], m.top_k),
            lambda i: dispatch._permute_backward(layer.rows[i], layer.sources[i], m.top_k),
            (t + rows) * row_bytes + 8.0 * rows,
            0,
        ),
        "unpermute back": (
            lambda i: dispatch.unpermute_backward(*sum_args(i)),
            lambda i: dispatch._unpermute_backward(*sum_args(i)),
            (t + 2.0 * rows) * row_bytes + 16 * rows,
            0,
        ),
        "bias gradient": (
            lambda i: grouped.grouped_bias_grad(layer.rows[i], layer.counts[i]),
            lambda i: grouped._bias_grad(layer.rows[i], layer.counts[i]),
            (rows + m.experts) * float(row_bytes),
            0,
        ),
    }


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


def in_processes(work: Callable[[Any], None], jobs: list[Any]) -> None:
    """One process alone takes about a second a kernel."""
    try:
        workers = min(14, len(jobs), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(work, jobs))
    except Exception as failure:
        print(f"compiling ahead failed ({failure}); kernels are compiled one by one", file=sys.stderr)


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
    in_processes(compile_one, list(unique.values()))
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
        in_processes(warm_one, list(itertools.product(models, token_counts)))
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
