"""Attention forward and backward on a GPU: every kernel of `ops.attention.choice` and the reference, in TFLOP/s.

    python benchmarks/ops_flash_general.py [--cases 'causal|softcap'] [--flex] [--tune]

Takes under a minute on an H200; --flex adds torch's FlexAttention, which compiles for half a minute a case, and --tune
times other tiles of the Triton kernels. FLOPs are those of the visible pairs: forward 2·(E + U) a pair and head,
backward 2·(3·E + 2·U), though ours computes scores and dP twice. Calls are replays of a CUDA graph that take turns
through inputs of which one alone exceeds the L2 cache. The largest error of output and gradients against the reference
stands last, relative to the largest value: of the Triton kernels, then of the one that `choice` prefers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.attention import attention, attention_backward, choice, packed_attention, packed_attention_backward
from rooflight.ops.attention.choice import Kernel
from rooflight.ops.attention.pairs import visible_pairs
from rooflight.ops.kernels import flash_backward, flash_forward
from rooflight.ops.kernels.flash_tile import Plan

BF16, FP32 = torch.bfloat16, torch.float32
REPLAYS, LEAST_MS = 5, 5.0


@dataclass(frozen=True, slots=True)
class Case:
    """A call; `documents` of equal length fill a packed row of batch × length tokens, 0: dense."""

    batch: int = 4
    length: int = 4096
    heads: int = 32
    key_heads: int = 32
    head_dim: int = 128
    value_dim: int = 128
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    documents: int = 0
    dtype: torch.dtype = BF16


CASES = {
    "causal": Case(),
    "not causal": Case(batch=2, causal=False),
    "16k": Case(1, 16384),
    "gqa": Case(key_heads=8),
    "d64": Case(8, 4096, 16, 16, 64, 64),
    "d64, 1k": Case(16, 1024, 32, 32, 64, 64),
    "window 1k": Case(key_heads=8, window=1024),
    "gpt-oss": Case(4, 4096, 64, 8, 64, 64, window=128, sinks=True),
    "softcap": Case(key_heads=8, softcap=50.0),
    "gemma-2": Case(2, 4096, 16, 8, 256, 256, softcap=50.0),
    "d256": Case(2, 4096, 16, 16, 256, 256),
    "deepseek": Case(1, 4096, 64, 64, 192, 128),
    "d96": Case(2, 4096, 32, 32, 96, 96),
    "packed 1k": Case(key_heads=8, documents=16),
    "packed 100": Case(key_heads=8, documents=160),
    "fp32": Case(1, 4096, 16, 16, 64, 64, dtype=FP32),
    "fp32 128": Case(1, 4096, 16, 8, 128, 128, dtype=FP32),
}
FORWARD_PLANS = (
    *((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2)),
    *((64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3)),
    *((256, 64, 16, 2), (64, 32, 4, 2), (64, 16, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2)),
    (16, 16, 8, 2),
)
KEY_PLANS = (
    *((64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    *((32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (32, 64, 8, 2)),
    *((16, 64, 8, 2), (16, 64, 4, 2), (16, 128, 8, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
    (16, 16, 8, 2),
)
QUERY_PLANS = (
    *((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    *((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 128, 4, 2)),
    *((128, 16, 8, 2), (64, 16, 4, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
    (16, 16, 8, 2),
)


def flops(case: Case) -> tuple[float, float]:
    """Of forward and backward."""
    count, length = case.batch, case.length
    if case.documents:
        count, length = case.documents, case.batch * case.length // case.documents
    pairs = count * case.heads * visible_pairs(length, length, case.causal, case.window)
    return 2.0 * pairs * (case.head_dim + case.value_dim), 2.0 * pairs * (3 * case.head_dim + 2 * case.value_dim)


@dataclass(frozen=True, slots=True)
class Inputs:
    qkv: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    options: tuple[Any, ...]


def inputs(case: Case) -> Inputs:
    tokens = (case.batch * case.length,) if case.documents else (case.batch, case.length)

    def draw(heads: int, channels: int) -> Tensor:
        return torch.randn(*tokens, heads, channels, device="cuda", dtype=case.dtype)

    qkv = (
        draw(case.heads, case.head_dim),
        draw(case.key_heads, case.head_dim),
        draw(case.key_heads, case.value_dim),
    )
    sinks = torch.randn(case.heads, device="cuda", dtype=case.dtype) if case.sinks else None
    tail = (case.window, case.softcap, sinks)
    scale = case.head_dim**-0.5
    if not case.documents:
        return Inputs(qkv, draw(case.heads, case.value_dim), (scale, case.causal, *tail))
    length, rest = divmod(tokens[0], case.documents)
    lengths = [length + (i < rest) for i in range(case.documents)]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    return Inputs(qkv, draw(case.heads, case.value_dim), (starts, max(lengths), scale, *tail))


def milliseconds(run: Callable[[Any], Any], sets: list[Any]) -> float:
    """Median time of a call, of replays of one graph over all inputs."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run(sets[0])
        begin.record()
        run(sets[0])
        end.record()
        end.synchronize()
        rounds = max(1, round(LEAST_MS / max(begin.elapsed_time(end), 1e-3) / len(sets)))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for each in sets:
                    run(each)
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / rounds / len(sets))
    graph.reset()
    return statistics.median(times)


def milliseconds_eager(run: Callable[[Any], Any], sets: list[Any]) -> float:
    """The same without a graph, for what cannot be captured; calls of milliseconds outlast their launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for each in sets * REPLAYS:
        begin.record()
        run(each)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[len(sets) :])


def reference(case: Case) -> Kernel:
    ops = (packed_attention, packed_attention_backward) if case.documents else (attention, attention_backward)
    return Kernel("chunked", "", lambda *_: True, ops[0].reference, ops[1].reference)


def triton(case: Case, forward: Plan | None = None, backward: tuple[Plan, Plan] | None = None) -> Kernel:
    name = "packed_attention" if case.documents else "attention"
    run, back = getattr(flash_forward, name), getattr(flash_backward, f"{name}_backward")
    return Kernel("Triton", "", lambda *_: True, lambda *a: run(*a, forward), lambda *a: back(*a, backward))


def all_of(kernel: Kernel, x: Inputs) -> tuple[Tensor, ...]:
    out, lse = kernel.forward(*x.qkv, *x.options)
    return out, *kernel.backward(x.grad, *x.qkv, out, lse, *x.options)


def error_of(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(found, wanted) if b.numel()]
    return float(torch.stack(errors).max())


def timed(kernel: Kernel, sets: list[Inputs], backward: bool) -> float:
    """Milliseconds of the kernel's forward or backward."""
    measure = milliseconds_eager if kernel.name == "FlexAttention" else milliseconds
    if not backward:
        return measure(lambda x: kernel.forward(*x.qkv, *x.options), sets)
    both = [(x, *kernel.forward(*x.qkv, *x.options)) for x in sets]
    return measure(lambda y: kernel.backward(y[0].grad, *y[0].qkv, y[1], y[2], *y[0].options), both)


def attempt(run: Callable[[], Any], label: str) -> Any:
    """Its result, or None, the failure said, and the run goes on."""
    try:
        return run()
    except Exception as failure:
        torch.cuda.synchronize()
        print(f"FAILED: {label}: {type(failure).__name__}: {str(failure).strip()[:150]}", flush=True)
        return None


def flex(case: Case) -> Kernel | None:
    """torch's FlexAttention, compiled; without sinks, of a dense batch."""
    if case.sinks or case.documents:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return (q >= s) & (q - s < case.window) if case.window else q >= s

    def cap(score: Tensor, *_: Any) -> Tensor:
        return case.softcap * torch.tanh(score / case.softcap)

    mask = create_block_mask(visible, None, None, case.length, case.length) if case.causal else None
    compiled = torch.compile(flex_attention)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score = cap if case.softcap else None
        options = {"score_mod": score, "block_mask": mask, "enable_gqa": case.heads != case.key_heads}
        out: Any = compiled(q, k, v, **options)
        return out.transpose(1, 2)

    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return both(q, k, v), None

    # Its backward is autograd's: timed with the forward in it, and that taken off again.
    def with_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(both(*leaves), leaves, grad)

    return Kernel("FlexAttention", "", lambda *_: True, forward, with_backward)


def table(cases: dict[str, Case], with_flex: bool) -> None:
    names = ["Triton", "cuDNN", "FlashAttention-2", "chunked", *(["FlexAttention"] if with_flex else [])]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; TFLOP/s")
    print(f"{'case':<12}{'':<9}" + "".join(f"{name:>17}" for name in names) + "  errors", flush=True)
    for label, case in cases.items():
        attempt(lambda label=label, case=case: row(label, case, names, with_flex), label)
        torch.cuda.empty_cache()


def row(label: str, case: Case, names: list[str], with_flex: bool) -> None:
    sets = [inputs(case) for _ in range(3)]
    x = sets[0]
    peers = {k.name: k for k in (choice.PACKED if case.documents else choice.DENSE) if k.takes(*x.qkv, *x.options)}
    preferred = next(iter(peers))
    kernels = {**peers, "Triton": triton(case), "chunked": reference(case)}
    if with_flex and (found := attempt(lambda: flex(case), f"{label} Flex")) is not None:
        kernels[found.name] = found
    wanted = all_of(kernels["chunked"], x)
    errors = []
    for name in dict.fromkeys(("Triton", preferred)):
        result = attempt(lambda name=name: all_of(kernels[name], x), f"{label} {name}")
        errors.append("nan" if result is None else f"{error_of(result, wanted):.1e}")
    del wanted
    times: dict[str, float] = {}
    for backward in (False, True):
        line = f"{label:<12}{'backward' if backward else 'forward':<9}"
        for name in names:
            kernel, found = kernels.get(name), None
            if kernel is not None:
                each = sets[:1] if name == "chunked" else sets
                found = attempt(lambda k=kernel, e=each, b=backward: timed(k, e, b), f"{label} {name}")
            if found is not None and name == "FlexAttention":
                found, times[name] = found - times.get(name, 0.0), found
            line += f"{'–':>17}" if found is None else f"{flops(case)[backward] / found / 1e9:17.0f}"
        print(line + ("" if backward else f"  {' '.join(errors)}"), flush=True)


def fits(plan: Plan, case: Case) -> bool:
    """Whether a plan is worth a try: its tiles in shared memory, and not a sixteenth of what fits."""
    width = (case.head_dim + case.value_dim) * case.dtype.itemsize
    return plan.queries * width // 2 + plan.keys * width * plan.stages // 2 <= 232 * 1024


def candidates(case: Case) -> tuple[list[Plan], list[Plan], list[Plan]]:
    forward, for_keys, for_queries = ([Plan(*p) for p in plans] for plans in (FORWARD_PLANS, KEY_PLANS, QUERY_PLANS))
    return tuple([p for p in plans if fits(p, case)] for plans in (forward, for_keys, for_queries))  # pyright: ignore


def tune(cases: dict[str, Case]) -> None:
    """The best three of each kernel's plans; those of the backward with the rule's plan for the other kernel."""
    for label, case in cases.items():
        sets = [inputs(case) for _ in range(2)]
        wanted = all_of(reference(case), sets[0])
        forward, for_keys, for_queries = candidates(case)
        rule = flash_backward.plans_of(case.head_dim, case.value_dim, case.dtype)
        trials = (
            ("forward", False, [(p, triton(case, p)) for p in forward]),
            ("dK dV", True, [(p, triton(case, None, (p, rule[1]))) for p in for_keys]),
            ("dQ", True, [(p, triton(case, None, (rule[0], p))) for p in for_queries]),
        )
        for what, backward, kernels in trials:
            times = []
            for plan, kernel in kernels:
                found = attempt(lambda k=kernel, w=wanted, s=sets: error_of(all_of(k, s[0]), w), f"{label} {plan}")
                if found is None or not found < 0.05:
                    print(f"WRONG: {label} {what} {plan}: error {found}" if found is not None else "", flush=True)
                    continue
                took = attempt(lambda k=kernel, b=backward, s=sets: timed(k, s, b), f"{label} {plan}")
                if took is not None:
                    times.append((took, plan))
            best = sorted(times, key=lambda pair: pair[0])[:4]
            shown = "; ".join(
                f"{flops(case)[backward] / ms / 1e9:.0f} ({p.queries}, {p.keys}, {p.warps}, {p.stages})"
                for ms, p in best
            )
            print(f"{label:<12}{what:<9}{shown}", flush=True)
        torch.cuda.empty_cache()


def compile_one(job: tuple[Case, Any, Any]) -> None:
    """Compile a case's kernels into Triton's cache on disk."""
    case, forward, backward = job
    small = Case(
        *(1, 64 if case.documents == 0 else 16 * case.documents, case.heads, case.key_heads, case.head_dim),
        *(case.value_dim, case.causal, case.window, case.softcap, case.sinks, case.documents, case.dtype),
    )
    try:
        all_of(triton(small, forward, backward), inputs(small))
    except Exception:
        return


def compile_all(cases: dict[str, Case], tuned: bool) -> None:
    """In several processes: one alone takes seconds a kernel."""
    jobs: list[tuple[Case, Any, Any]] = [(case, None, None) for case in cases.values()]
    if tuned:
        for case in cases.values():
            rule = flash_backward.plans_of(case.head_dim, case.value_dim, case.dtype)
            forward, for_keys, for_queries = candidates(case)
            jobs += [(case, p, None) for p in forward] + [(case, None, (p, rule[1])) for p in for_keys]
            jobs += [(case, None, (rule[0], p)) for p in for_queries]
    try:
        with ProcessPoolExecutor(min(14, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_one, jobs))
    except (BrokenProcessPool, RuntimeError, OSError) as error:
        print(f"compiling ahead failed ({error}); kernels are compiled one by one", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="|".join(CASES), help="names of cases, with | between")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention")
    parser.add_argument("--tune", action="store_true", help="other plans instead of the table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    torch.manual_seed(0)
    cases = {name: CASES[name] for name in options.cases.split("|")}
    compile_all(cases, options.tune)
    if options.tune:
        tune(cases)
    else:
        table(cases, options.flex)


if __name__ == "__main__":
    main()
