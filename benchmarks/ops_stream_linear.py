"""Linear layers of few rows beside cuBLAS, each alone and as the whole chain of a layer, in µs and TB/s of weights.

    python -m benchmarks.ops_stream_linear [--rows 16,32] [--models llama-3.1-8b] [--part alone|chain] [--tune]

Each part takes about half a minute on an H200. All runs are CUDA graphs that take turns through more weights than the
L2 cache holds. "chain" is a layer's four products with norms, SwiGLU and residual sums between them (attention left
out): four launches of ours, which depend on one another programmatically, and seven of cuBLAS and our other kernels.
`--tune` tries other cuts: inputs of a step × stages × programs a multiprocessor.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.timing import attempt, graph_seconds, in_processes
from rooflight.ops.kernels import ceil_div, processors
from rooflight.ops.kernels.activation import gated_activation
from rooflight.ops.kernels.norm import add_rms_norm
from rooflight.ops.kernels.stream_linear import stream_linear
from rooflight.ops.kernels.stream_plan import Plan, plan_for, tiles_of

EPS = 1e-5
COLD_BYTES = 512 * 2**20
GRAPH_BYTES = 2 * 2**30
WRONG = 2e-2


class Sizes(NamedTuple):
    """Widths of a layer: residual stream, fused QKV, attention's output, feed-forward."""

    width: int
    qkv: int
    heads: int
    feed: int


class Layer(NamedTuple):
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor


class Cut(NamedTuple):
    """Inputs of a step, stages, programs a multiprocessor."""

    inputs: int
    stages: int
    programs: int


MODELS = {"llama-3.1-8b": Sizes(4096, 6144, 4096, 14336), "qwen3-0.6b": Sizes(1024, 4096, 2048, 3072)}
CUTS = (
    *(Cut(64, 3, 1), Cut(64, 4, 1), Cut(64, 5, 1), Cut(64, 8, 1), Cut(64, 3, 2)),
    *(Cut(128, 2, 1), Cut(128, 3, 1), Cut(128, 5, 1), Cut(128, 2, 2)),
)


def plan_of(cut: Cut | None, rows: int, outputs: int, inputs: int, gated: bool) -> Plan:
    multiprocessors = processors(torch.device("cuda", 0))
    rule = plan_for(rows, outputs, inputs, gated, multiprocessors)
    if cut is None:
        return rule
    total = tiles_of(outputs, gated) * ceil_div(inputs, cut.inputs)
    return Plan(cut.inputs, cut.stages, min(cut.programs * multiprocessors, total))


def draw(*shape: int) -> Tensor:
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return x * shape[-1] ** -0.5 if len(shape) > 1 else x


def layer_of(sizes: Sizes) -> Layer:
    d, q, h, f = sizes
    return Layer(draw(q, d), draw(d, h), draw(2 * f, d), draw(d, f), 1 + draw(d) / 8)


def ours(residual: Tensor, layer: Layer, sizes: Sizes, cut: Cut | None) -> None:
    rows, (d, q, h, f) = residual.shape[0], sizes
    norm = {"norm_weight_K": layer.norm, "eps": EPS}
    qkv = stream_linear(residual, layer.qkv, **norm, plan=plan_of(cut, rows, q, d, False))
    attended = qkv[:, :h]
    stream_linear(attended, layer.out, residual_MN=residual, plan=plan_of(cut, rows, d, h, False))
    plan = plan_of(cut, rows, f, d, True)
    inner = stream_linear(residual, layer.gate_up, **norm, activation="silu", plan=plan)
    stream_linear(inner, layer.down, residual_MN=residual, plan=plan_of(cut, rows, d, f, False))


def theirs(x: Tensor, residual: Tensor, layer: Layer, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """x: what is to be added to the residual, from the layer before."""
    normed, residual = add_rms_norm(x, residual, layer.norm, EPS)
    attended = linear(normed, layer.qkv)[:, : sizes.heads]
    normed, residual = add_rms_norm(linear(attended, layer.out), residual, layer.norm, EPS)
    inner = gated_activation(linear(normed, layer.gate_up), "silu")
    return linear(inner, layer.down), residual


def turns_of(weights: list[Tensor]) -> int:
    return max(len(weights), min(400, GRAPH_BYTES // (2 * weights[0].numel())))


def alone(weights: list[Tensor], rows: int, cut: Cut | None) -> float:
    outputs, inputs = weights[0].shape
    x, plan = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16), plan_of(cut, rows, outputs, inputs, False)
    want = x.float() @ weights[0].float().t()
    error = float((stream_linear(x, weights[0], plan=plan).float() - want).abs().max() / want.abs().max())
    if not error < WRONG:
        raise RuntimeError(f"error {error:.1e}")
    return graph_seconds(lambda weight: stream_linear(x, weight, plan=plan), weights, turns_of(weights))


def cublas_alone(weights: list[Tensor], rows: int) -> float:
    x = torch.randn(rows, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
    return graph_seconds(lambda weight: linear(x, weight), weights, turns_of(weights))


def chain(layers: list[Layer], rows: int, sizes: Sizes, cut: Cut | None) -> float:
    x = torch.randn(rows, sizes.width, device="cuda", dtype=torch.bfloat16)
    residual = x.clone()
    zero = torch.zeros_like(x)
    ours(residual, layers[0], sizes, cut)
    y, r = theirs(zero, x, layers[0], sizes)
    want = (y.float() + r.float()).double()
    error = float((residual.double() - want).abs().max() / want.abs().max())
    if not error < WRONG:
        raise RuntimeError(f"error {error:.1e}")

    def run(start: Tensor) -> None:
        residual.copy_(start)
        for layer in layers:
            ours(residual, layer, sizes, cut)

    return graph_seconds(run, [x], 1) / len(layers)


def cublas_chain(layers: list[Layer], rows: int, sizes: Sizes) -> float:
    x = torch.randn(rows, sizes.width, device="cuda", dtype=torch.bfloat16)

    def run(start: Tensor) -> None:
        y, r = torch.zeros_like(start), start
        for layer in layers:
            y, r = theirs(y, r, layer, sizes)

    return graph_seconds(run, [x], 1) / len(layers)


def compile_one(job: tuple[int, Cut | None]) -> None:
    """Compile a cut's kernels into Triton's cache on disk."""
    rows, cut = job
    sizes = Sizes(256, 256, 256, 256)
    try:
        ours(torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16), layer_of(sizes), sizes, cut)
        stream_linear(draw(rows, 256), draw(256, 256), plan=plan_of(cut, rows, 256, 256, False))
        torch.cuda.synchronize()
    except Exception as error:
        print(f"FAILED: {job}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def table(name: str, row_counts: list[int], parts: list[str], cuts: list[Cut | None]) -> None:
    sizes = MODELS[name]
    probe = layer_of(sizes)
    bytes_ = 2 * sum(w.numel() for w in probe)
    layers = [probe, *(layer_of(sizes) for _ in range(max(3, ceil_div(COLD_BYTES, bytes_)) - 1))]
    titles = ["rule" if cut is None else "/".join(map(str, cut)) for cut in cuts]
    print(f"\n{name}, {len(layers)} layers of {bytes_ / 1e6:.0f} MB; µs, (TB/s), cuBLAS's time over ours", flush=True)
    for part in parts:
        print(f"{part:>14} {'M':>4} {'cuBLAS':>14} " + " ".join(f"{title:>19}" for title in titles), flush=True)
        for rows in row_counts:
            for field in Layer._fields[:4] if part == "alone" else ("layer",):
                weights = [getattr(layer, field) for layer in layers] if part == "alone" else []
                moved = (2 * weights[0].numel() if weights else bytes_) / 1e12
                label = "x".join(map(str, weights[0].shape)) if weights else field
                reference = attempt(
                    lambda w=weights, m=rows: cublas_alone(w, m) if w else cublas_chain(layers, m, sizes),
                    f"{label} {rows} cuBLAS",
                    float("nan"),
                )
                line = f"{label:>14} {rows:>4} {reference * 1e6:8.2f} ({moved / reference:4.2f})"
                for cut, title in zip(cuts, titles, strict=True):
                    time = attempt(
                        lambda w=weights, m=rows, c=cut: alone(w, m, c) if w else chain(layers, m, sizes, c),
                        f"{label} {rows} {title}",
                        float("nan"),
                    )
                    line += f" {time * 1e6:7.2f} ({moved / time:4.2f}) {reference / time:4.2f}"
                print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="2,16,32,64,128", help="rows of x, with commas")
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas")
    parser.add_argument("--part", choices=("alone", "chain"), help="instead of both")
    parser.add_argument("--tune", action="store_true", help="also try other cuts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    row_counts = [int(rows) for rows in options.rows.split(",")]
    cuts: list[Cut | None] = [None, *(CUTS if options.tune else ())]
    with torch.no_grad():
        in_processes(compile_one, itertools.product(row_counts, cuts))
        print(torch.cuda.get_device_name(), torch.__version__)
        for name in options.models.split(","):
            table(name, row_counts, [options.part] if options.part else ["alone", "chain"], cuts)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
