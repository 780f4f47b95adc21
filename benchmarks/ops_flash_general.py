"""Attention forward and backward on a GPU: every kernel of `ops.attention.choice` and the reference, in TFLOP/s.

    python -m benchmarks.ops_flash_general [--cases 'causal|softcap'] [--flex] [--tune]

Takes under a minute on an H200; --flex adds torch's FlexAttention, which compiles for half a minute a case, and --tune
times other tiles of the Triton kernels. FLOPs are those of the visible pairs: forward 2·(E + U) a pair and head,
backward 2·(3·E + 2·U), though ours computes scores and dP twice. Calls are replays of a CUDA graph that take turns
through inputs of which one alone exceeds the L2 cache. The largest error of output and gradients against the reference
stands last, relative to the largest value: of the Triton kernels, then of the one that `choice` prefers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ops_flash_cases import (
    CASES,
    Case,
    Inputs,
    all_of,
    backward_of,
    error_of,
    flex,
    flops,
    inputs,
    reference,
    triton,
)
from benchmarks.timing import attempt, eager_seconds, graph_seconds, in_processes
from rooflight.ops.attention import choice
from rooflight.ops.attention.choice import Kernel
from rooflight.ops.kernels import flash_backward
from rooflight.ops.kernels.flash_tile import Plan

REPLAYS, LEAST_SECONDS = 5, 5e-3

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


def milliseconds(run: Callable[[Any], Any], sets: list[Any]) -> float:
    """Median time of a call, of replays of one graph over all inputs."""
    # The reference's scores may have left little of the memory.
    torch.cuda.empty_cache()
    rounds = max(1, round(LEAST_SECONDS / eager_seconds(lambda: run(sets[0])) / len(sets)))
    return graph_seconds(run, sets, rounds * len(sets), REPLAYS) * 1e3


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


def timed(kernel: Kernel, sets: list[Inputs], backward: bool) -> float:
    """Milliseconds of the kernel's forward or backward."""
    measure = milliseconds_eager if kernel.name == "FlexAttention" else milliseconds
    if not backward:
        return measure(lambda x: kernel.forward(*x.qkv, *x.options), sets)
    both, run = [(x, *kernel.forward(*x.qkv, *x.options)) for x in sets], backward_of(kernel, sets[0])
    return measure(lambda y: run(y[0].grad, *y[0].qkv, y[1], y[2], *y[0].options), both)


def table(cases: dict[str, Case], with_flex: bool) -> None:
    names = ["Triton", "cuDNN", "FlashAttention-2", "chunked", *(["FlexAttention"] if with_flex else [])]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; TFLOP/s")
    print(f"{'case':<12}{'':<9}" + "".join(f"{name:>17}" for name in names) + "  errors", flush=True)
    for label, case in cases.items():
        attempt(lambda label=label, case=case: row(label, case, names, with_flex), label, None)
        torch.cuda.empty_cache()


def row(label: str, case: Case, names: list[str], with_flex: bool) -> None:
    sets = [inputs(case) for _ in range(3)]
    x = sets[0]
    peers = {k.name: k for k in (choice.PACKED if case.documents else choice.DENSE) if k.takes(*x.qkv, *x.options)}
    preferred = next(iter(peers))
    kernels = {**peers, "Triton": triton(case), "chunked": reference(case)}
    if with_flex and (found := attempt(lambda: flex(case), f"{label} Flex", None)) is not None:
        kernels[found.name] = found
    wanted = all_of(kernels["chunked"], x)
    errors = []
    for name in dict.fromkeys(("Triton", preferred)):
        result = attempt(lambda name=name: all_of(kernels[name], x), f"{label} {name}", None)
        errors.append("nan" if result is None else f"{error_of(result, wanted):.1e}")
    del wanted
    times: dict[str, float] = {}
    for backward in (False, True):
        line = f"{label:<12}{'backward' if backward else 'forward':<9}"
        for name in names:
            kernel, found = kernels.get(name), None
            if kernel is not None:
                each = sets[:1] if name == "chunked" else sets
                found = attempt(lambda k=kernel, e=each, b=backward: timed(k, e, b), f"{label} {name}", None)
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
                found = attempt(
                    lambda k=kernel, w=wanted, s=sets: error_of(all_of(k, s[0]), w), f"{label} {plan}", None
                )
                if found is None or not found < 0.05:
                    print(f"WRONG: {label} {what} {plan}: error {found}" if found is not None else "", flush=True)
                    continue
                took = attempt(lambda k=kernel, b=backward, s=sets: timed(k, s, b), f"{label} {plan}", None)
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


def jobs_of(cases: dict[str, Case], tuned: bool) -> list[tuple[Case, Any, Any]]:
    """A case's kernels, and where plans are tuned those of each of them beside the rule's."""
    jobs: list[tuple[Case, Any, Any]] = [(case, None, None) for case in cases.values()]
    for case in cases.values() if tuned else ():
        rule = flash_backward.plans_of(case.head_dim, case.value_dim, case.dtype)
        forward, for_keys, for_queries = candidates(case)
        jobs += [(case, p, None) for p in forward] + [(case, None, (p, rule[1])) for p in for_keys]
        jobs += [(case, None, (rule[0], p)) for p in for_queries]
    return jobs


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
    in_processes(compile_one, jobs_of(cases, options.tune))
    if options.tune:
        tune(cases)
    else:
        table(cases, options.flex)


if __name__ == "__main__":
    main()
