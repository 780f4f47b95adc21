"""Training steps on this CPU, ours and transformers', taken in turns: tokens/s of each and their ratio.

    python -m benchmarks.train_cpu [--cases demo,4x512,12x768] [--dtypes fp32,bf16] [--compiled] [--profile]

Both train the same decoder on the same batches with fused AdamW whose states have the weights' dtype, on as many
threads, in one process whose freed memory glibc keeps. A turn is one step of each; tokens/s are medians over the turns,
and the ratio is given of the medians and of the fastest steps: other work on the cores only ever adds time.
`--compiled` adds transformers under torch.compile; `--profile` prints where each spends a step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import Job, Step, batches, hf, ours
from rooflight.hardware.host import cpu_name, keep_freed_memory
from rooflight.models.config import ModelConfig
from rooflight.models.presets import preset

OPTIMIZER = {"fp32": "adamw", "bf16": "adamw-bf16"}
MIN_TURNS, MAX_TURNS = 4, 40
TOP = 14


def _narrow() -> ModelConfig:
    """Four layers of width 512 with grouped queries and the vocabulary of a small BPE tokenizer."""
    demo = preset("demo")
    sizes = {"width": 512, "heads": 8, "kv_heads": 4, "ffn_width": 1536, "vocab_size": 8192}
    return replace(demo, name="4x512", layers=demo.layers[:4], **sizes)


CASES = {
    "demo": (lambda: preset("demo"), 4, 256),
    "4x512": (_narrow, 4, 256),
    "12x768": (lambda: preset("train-152m"), 1, 128),
}


def turns(steps: dict[str, Step], stream: Iterator[tuple[Tensor, Tensor]], seconds: float) -> dict[str, list[float]]:
    """Wall seconds of each contender's steps, one of each on the same batch in every turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    began = time.perf_counter()
    for turn in range(MAX_TURNS):
        pair = next(stream)
        # Each goes first as often as the others: what it leaves in the caches is the next one's loss.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name](*pair)
            times[name].append(time.perf_counter() - start)
        if turn + 1 >= MIN_TURNS and time.perf_counter() - began > seconds:
            break
    return times


def profiled(step: Step, stream: Iterator[tuple[Tensor, Tensor]], count: int = 3) -> list[tuple[str, float, float]]:
    """The operators that take most of a step: name, milliseconds, calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            step(*next(stream))
    rows = [(str(e.key), e.self_cpu_time_total / 1e3 / count, e.count / count) for e in profiler.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:TOP]


def contenders(job: Job, compiled: bool) -> dict[str, Step]:
    """The steps to compare; ours is the first."""
    steps = {"ours": ours(job, "cpu", OPTIMIZER[job.dtype]), "transformers": hf.build(job, "cpu")}
    if compiled:
        steps["transformers compiled"] = hf.build(job, "cpu", compiled=True)
    return steps


def run(case: str, dtype: str, options: argparse.Namespace) -> str:
    """One row of the table, and the profiles where they were asked for."""
    make, batch, context = CASES[case]
    job = Job(make(), batch, context, dtype)
    torch.manual_seed(0)
    steps, stream = contenders(job, options.compiled), batches(job, "cpu")
    for name, step in steps.items():
        began = time.perf_counter()
        for _ in range(2):
            step(*next(stream))
        print(f"{case} {dtype}: {name} warmed up in {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    times = turns(steps, stream, options.seconds)
    rates = {name: job.tokens / statistics.median(seen) for name, seen in times.items()}
    if options.profile:
        for name, step in steps.items():
            print(f"\n{case} {dtype}, {name}: ms a step, calls")
            for operator, milliseconds, calls in profiled(step, stream):
                print(f"  {milliseconds:8.2f}  {calls:6.0f}  {operator[:90]}")
    row = f"| {case}, {batch}×{context} | {dtype} | {len(times['ours'])} | {rates['ours']:,.0f} "
    for name in list(steps)[1:]:
        fastest = min(times[name]) / min(times["ours"])
        row += f"| {rates[name]:,.0f} | {rates['ours'] / rates[name]:.3f} ({fastest:.3f}) "
    return row + "|"


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--dtypes", default="fp32,bf16", help="some of fp32,bf16")
    parser.add_argument("--threads", type=int, default=2, help="threads of both (default 2)")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of turns for a row (default 8)")
    parser.add_argument("--compiled", action="store_true", help="transformers under torch.compile too")
    parser.add_argument("--profile", action="store_true", help="print where each spends a step")
    options = parser.parse_args()
    cases, dtypes = options.cases.split(","), options.dtypes.split(",")
    for chosen, allowed in ((cases, CASES), (dtypes, OPTIMIZER)):
        for name in chosen:
            if name not in allowed:
                parser.error(f"{name!r} is unknown; use some of {','.join(allowed)}")
    torch.set_num_threads(options.threads)
    kept = keep_freed_memory()
    rows = []
    for case in cases:
        for dtype in dtypes:
            rows.append(run(case, dtype, options))
            print(rows[-1], file=sys.stderr, flush=True)
            gc.collect()
    memory = "freed memory kept" if kept else "freed memory returned to the system"
    print(f"\n{cpu_name()}, {options.threads} threads, torch {torch.__version__}; {memory}\n")
    others = ["transformers", *(["transformers compiled"] if options.compiled else [])]
    columns = [f"{name} tok/s | ours ÷ it, medians (fastest)" for name in others]
    print(f"| model, batch | dtype | turns | ours tok/s | {' | '.join(columns)} |")
    print("|---|---|---:|---:|" + "---:|---:|" * len(others))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
