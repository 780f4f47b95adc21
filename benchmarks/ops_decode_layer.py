"""A decoder layer's four products with norms, gate and residual sums on a GPU, by who computes them, in µs a layer.

    python -m benchmarks.ops_decode_layer [--rows 8,32] [--models 0.6b] [--tune few|skinny|wide]

Takes about a minute on an H200. Attention is left out. Calls run in a CUDA graph over more weights than the L2 cache
holds. "separate" is cuBLAS with our norm and gate kernels; the others carry norm, gate and sum along (skinny: one row,
few: 2 to 32, wide: to 128 of a small matrix, stream: 2 to 128), and where they have no plan the product is made by
separate kernels. The share is of the time in which memory gives the weights. `--tune` tries other plans, one product
after the other.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.timing import attempt, eager_seconds, graph_seconds, in_processes
from rooflight.ops.kernels import (
    ceil_div,
    few_linear,
    few_plan,
    power_of_2,
    processors,
    skinny_linear,
    skinny_plan,
    stream_plan,
    wide_linear,
    wide_plan,
)
from rooflight.ops.kernels.activation import gated_activation
from rooflight.ops.kernels.fused_linear import SMALL_WEIGHTS
from rooflight.ops.kernels.norm import add_rms_norm, rms_norm
from rooflight.ops.kernels.stream_linear import stream_linear

EPS = 1e-5
BYTES_PER_S = 4.31e12  # what an H200 copies
NAMES = ("separate", "few", "skinny", "stream", "wide")
GRAPH_SECONDS, MOST_RUNS, WARM_REPLAYS, REPLAYS = 4e-3, 8, 12, 7
WRONG = 2e-2


class Product(NamedTuple):
    """A linear layer of a decoder; outputs are those after the gate."""

    outputs: int
    inputs: int
    normed: bool
    gate: str | None

    @property
    def weight_rows(self) -> int:
        return self.outputs if self.gate is None else 2 * self.outputs


class Model(NamedTuple):
    """Widths of a layer: residual stream, fused QKV, attention's output, feed-forward; layers in a graph."""

    width: int
    qkv: int
    heads: int
    feed: int
    layers: int

    @property
    def products(self) -> tuple[Product, ...]:
        return (
            Product(self.qkv, self.width, True, None),
            Product(self.width, self.heads, False, None),
            Product(self.feed, self.width, True, "silu"),
            Product(self.width, self.feed, False, None),
        )


MODELS = {
    "0.6b": Model(1024, 4096, 2048, 3072, 18),
    "1.7b": Model(2048, 4096, 2048, 6144, 8),
    "4b": Model(2560, 6144, 4096, 9728, 4),
    "8b": Model(4096, 6144, 4096, 14336, 3),
}
Weights = tuple[Tensor, Tensor]  # of a product, and of the norm before it
Run = Callable[[Tensor, Product, Weights, Tensor, Any], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def weights_of(product: Product) -> Weights:
    norm = 1 + draw(product.inputs) / 8
    return draw(product.weight_rows, product.inputs) * product.inputs**-0.5, norm


def separate(x: Tensor, product: Product, weights: Weights, residual: Tensor, plan: None = None) -> Tensor:
    w, norm = weights
    if product.normed:
        y = linear(rms_norm(x, norm, EPS), w)
        return y if product.gate is None else gated_activation(y, product.gate)
    return residual.addmm_(x, w.t())


def ours(kernels: Any) -> Run:
    def run(x: Tensor, product: Product, weights: Weights, residual: Tensor, plan: Any) -> Tensor:
        w, norm = weights
        if plan is None:
            return separate(x, product, weights, residual)
        if product.normed:
            return kernels.norm_linear(x, norm, w, None, EPS, 0.0, product.gate, plan)
        kernels.add_linear(residual, x, w, None, plan)
        return residual

    return run


def stream(x: Tensor, product: Product, weights: Weights, residual: Tensor, plan: None = None) -> Tensor:
    w, norm = weights
    if product.normed:
        return stream_linear(x, w, norm_weight_K=norm, eps=EPS, activation=product.gate)
    return stream_linear(x, w, residual_MN=residual)


few, skinny, wide = ours(few_linear), ours(skinny_linear), ours(wide_linear)


def layers_of(run: Run, model: Model, layers: list[list[Weights]], start: Tensor, plans: Iterable[Any]) -> None:
    residual = start.clone()
    first, second, third, fourth = plans
    for qkv, out, gate_up, down in layers:
        one, two, three, four = model.products
        attended = run(residual, one, qkv, residual, first)
        run(attended[:, : model.heads], two, out, residual, second)
        inner = run(residual, three, gate_up, residual, third)
        run(inner, four, down, residual, fourth)


def as_the_engine(model: Model, layers: list[list[Weights]], residual: Tensor) -> None:
    """Without kernels that carry anything along: a residual sum is the next norm's."""
    x, r = torch.zeros_like(residual), residual
    for (qkv, norm), (out, _), (gate_up, norm_2), (down, _) in layers:
        normed, r = add_rms_norm(x, r, norm, EPS)
        attended = linear(normed, qkv)[:, : model.heads]
        normed, r = add_rms_norm(linear(attended, out), r, norm_2, EPS)
        x = linear(gated_activation(linear(normed, gate_up), "silu"), down)


def seconds(run: Callable[[], object]) -> float:
    """Median time of a run in a CUDA graph of several."""
    runs = max(1, min(MOST_RUNS, round(GRAPH_SECONDS / eager_seconds(run))))
    return graph_seconds(lambda each: each(), [run], runs, REPLAYS, WARM_REPLAYS)


def error_of(run: Run, product: Product, rows: int, plan: Any) -> float:
    """Largest error against separate kernels in fp32, relative to the largest value."""
    weights, x = weights_of(product), draw(rows, product.inputs)
    residual, (w, norm) = draw(rows, product.outputs), weights
    want = separate(x.float(), product, (w.float(), norm.float()), residual.float())
    found = run(x, product, weights, residual, plan)
    return float((found.float() - want).abs().max() / want.abs().max())


def few_plans(rows: int, product: Product) -> Iterator[few_plan.Plan]:
    """What registers allow."""
    shapes = itertools.product((16, 32, 64), (32, 64, 128), ((4, 128), (4, 255), (8, 128), (8, 255), (16, 128)))
    for outputs, inputs, (warps, registers) in shapes:
        gated = product.gate is not None
        plan = few_plan.cut(rows, product.inputs, gated, outputs, inputs, warps, registers)
        programs = ceil_div(product.outputs, outputs)
        if plan is not None and 32 <= programs <= 1024 and inputs * warps < 2 * product.inputs:
            yield plan


def skinny_plans(rows: int, product: Product) -> Iterator[skinny_plan.Plan]:
    block = power_of_2(max(256, product.inputs))
    for outputs in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            if 16 <= outputs * block * (1 if product.gate is None else 2) / (32 * warps) <= 128:
                yield skinny_plan.Plan(outputs, block, warps, 1)
    if block >= 4096:
        yield from (skinny_plan.Plan(*plan) for plan in ((4, 1024, 4, 1), (2, 2048, 4, 1), (4, 1024, 4, 4)))


def wide_plans(rows: int, product: Product) -> Iterator[wide_plan.Plan]:
    """What shared memory allows."""
    gated, block = product.gate is not None, stream_plan.rows_block(rows)
    for plan in itertools.starmap(
        wide_plan.Plan, itertools.product((64, 128), (16, 32, 64, 128), (1, 2, 4, 8), (64, 128))
    ):
        programs = wide_plan.programs_of(plan, rows, product.outputs, gated)
        small = plan.rows <= block and plan.height * plan.rows <= 64 * 128
        if small and 32 <= programs <= 264 and wide_plan.fits(plan, product.inputs, gated):
            yield plan


def rule(name: str, rows: int, product: Product) -> Any:
    if name == "wide":
        small = 1 < rows <= stream_plan.MOST_ROWS and product.weight_rows * product.inputs <= SMALL_WEIGHTS
        sizes = (rows, product.outputs, product.inputs, product.gate is not None)
        return wide_plan.plan_for(*sizes, processors(torch.device("cuda"))) if small else None
    if name == "few":
        return few_plan.plan_for(rows, product.outputs, product.inputs, product.gate is not None)
    return skinny_plan.fused_plan_for(rows, product.inputs, product.gate is not None, not product.normed)


RUNS: dict[str, Run] = {"few": few, "skinny": skinny, "wide": wide}
TRIED: dict[str, Callable[[int, Product], Iterator[Any]]] = {
    "few": few_plans,
    "skinny": skinny_plans,
    "wide": wide_plans,
}
Job = tuple[str, int, Product, Any]


def try_plan(job: Job) -> str:
    """Compile a plan's kernel into Triton's cache on disk; what is wrong with it, or nothing."""
    name, rows, product, plan = job
    try:
        error = error_of(RUNS.get(name, stream), product, rows, plan)
        return "" if error < WRONG else f"error {error:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"


def guarded(name: str, run: Callable[[], object]) -> float:
    """Infinite where a run fails."""
    return attempt(lambda: seconds(run), name, float("inf"))


def short(plan: Any) -> str:
    return "-" if plan is None else "/".join(str(getattr(plan, field)) for field in plan.__slots__)


def tune(name: str, rows: int, model: Model, layers: list[list[Weights]], wrong: dict[Job, str]) -> None:
    """By coordinate descent: the best plan of a product while the others stay."""
    plans = [rule(name, rows, product) or next(TRIED[name](rows, product), None) for product in model.products]
    residual = draw(rows, model.width)

    def time(plans: list[Any]) -> float:
        return guarded(" ".join(map(short, plans)), lambda: layers_of(RUNS[name], model, layers, residual, plans))

    best = time(plans)
    for turn in range(2):
        for index, product in enumerate(model.products):
            found = []
            for plan in TRIED[name](rows, product):
                if not wrong.get((name, rows, product, plan)):
                    found.append((time([*plans[:index], plan, *plans[index + 1 :]]), plan))
            found.sort(key=lambda pair: pair[0])
            if found and found[0][0] < best:
                best, plans[index] = found[0]
            tops = "  ".join(f"{t / len(layers) * 1e6:.2f} {short(plan)}" for t, plan in found[: 5 - 2 * turn])
            print(f"  {name} M={rows} {product.weight_rows}x{product.inputs} turn {turn}: {tops}", flush=True)
    print(f"  {name} M={rows} tuned {best / len(layers) * 1e6:.2f} µs: {'  '.join(map(short, plans))}", flush=True)


def table(title: str, row_counts: list[int], tuned: str | None) -> None:
    model = MODELS[title]
    rows_of = [rows for rows in row_counts if tuned is None or (rows == 1) == (tuned == "skinny")]
    jobs: list[Job] = []
    if tuned is not None:
        jobs += [(tuned, r, p, plan) for r in rows_of for p in model.products for plan in TRIED[tuned](r, p)]
    jobs += [(n, r, p, rule(n, r, p)) for r in rows_of for n in RUNS for p in model.products if rule(n, r, p)]
    jobs += [("stream", r, p, None) for r in rows_of if 1 < r <= stream_plan.MOST_ROWS for p in model.products]
    jobs = sorted(set(jobs), key=str)
    # In several processes where that works; else one after the other.
    found = in_processes(try_plan, jobs) or [try_plan(job) for job in jobs]
    wrong = dict(zip(jobs, found, strict=True))
    print(f"{title}: {len(jobs)} kernels", flush=True)
    for job, what in wrong.items():
        if what:
            print(
                f"  WRONG: {job[0]} M={job[1]} {job[2].weight_rows}x{job[2].inputs} {short(job[3])}: {what}", flush=True
            )
    layers = [[weights_of(product) for product in model.products] for _ in range(model.layers)]
    floor = sum(2 * w.numel() for w, _ in layers[0]) / BYTES_PER_S
    print(f"{title}, {len(layers)} layers of {floor * BYTES_PER_S / 1e6:.0f} MB, {floor * 1e6:.2f} µs of memory each")
    print(f"{'M':>4} " + " ".join(f"{name:>14}" for name in NAMES) + "  plans of few")
    for rows in rows_of:
        residual = draw(rows, model.width)
        runs: dict[str, Callable[[], object]] = {
            "separate": lambda r=residual: as_the_engine(model, layers, r),
        }
        plans = {name: [rule(name, rows, product) for product in model.products] for name in RUNS}
        for name, run in RUNS.items():
            if any(plans[name]):
                runs[name] = lambda run=run, p=plans[name], r=residual: layers_of(run, model, layers, r, p)
        if 1 < rows <= stream_plan.MOST_ROWS:
            runs["stream"] = lambda r=residual: layers_of(stream, model, layers, r, [None] * 4)
        line = f"{rows:>4}"
        for name in NAMES:
            time = guarded(f"{name} {rows}", runs[name]) / len(layers) if name in runs else float("nan")
            line += f" {time * 1e6:8.2f} {floor / time:4.0%} "
        print(line + "  " + "  ".join(map(short, plans["few"])), flush=True)
        if tuned:
            tune(tuned, rows, model, layers, wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64", help="rows of x, with commas")
    parser.add_argument("--models", default="0.6b,8b", help=f"of {', '.join(MODELS)}, with commas")
    parser.add_argument("--tune", choices=tuple(RUNS), help="also try other plans of these kernels")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    with torch.no_grad():
        print(torch.cuda.get_device_name(), torch.__version__)
        for title in options.models.split(","):
            table(title, [int(rows) for rows in options.rows.split(",")], options.tune)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
