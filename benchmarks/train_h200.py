"""Training steps on one H200, ours and the peers' in one run: tokens/s, MFU, memory, and what was predicted.

    python -m benchmarks.train_h200 [--models 152m,1.2b,3.2b,8b] [--peers plain,hf] [--steps 10] [--json FILE]

Each contender of each model is a process of its own: memory is clean, and one failure does not lose the rest. MFU is
(6·matmul parameters + 6·L·T·d) FLOPs a token over 989 TFLOP/s, causal attention counted half; in parentheses with
12·L·T·d, full attention. A tied head is a matmul, the embedding's gather is none; recomputation is not counted. The
GEMM share is the causal figure over bf16 8192³ on random data, timed in the same process right after the steps.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Job, Step, batches, ours, setting_of
from rooflight.hardware import load
from rooflight.models.config import ModelConfig
from rooflight.models.presets import preset
from rooflight.workload.memory import over_time
from rooflight.workload.program import decoder
from rooflight.workload.roofline import time_walk
from rooflight.workload.walk import dry

MACHINE, PRECISION, GIB = "h200", "bf16", 2**30
# By name: preset, batch, context, recompute, and the figures of shared/ANCHORS.md for the best plain PyTorch.
MODELS = {
    "152m": ("train-152m", 32, 1024, "none", "414k tok/s, 40.5%, 17.5 GiB"),
    "1.2b": ("train-1.2b", 8, 2048, "none", "68.1k tok/s, 53.8%, 32.4 GiB"),
    "3.2b": ("train-3.2b", 4, 4096, "none", "25.8k tok/s, 55.9%, 67.4 GiB"),
    "8b": ("llama-3.1-8b", 8, 4096, "full", "10.5k tok/s published (KempnerForge)"),
}
OURS = {"ours bf16": "adamw-bf16", "ours fp32 masters": "adamw-master"}
PEERS = ("plain", "hf")
PRECISIONS = {"ours bf16": "bf16 throughout", "ours fp32 masters": "bf16, fp32 masters and states"}
GEMM = 8192
BLOCK = 2  # steps between synchronisations


def job_of(model: str, dtype: str) -> Job:
    """The job of one of MODELS; dtype bf16, or fp8 for our products in fp8 over bf16 weights."""
    name, batch, context, recompute, _ = MODELS[model]
    return Job(preset(name), batch, context, dtype, recompute)


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied by: projections, feed-forward and head, tied or not."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    ffn = (3 if config.gated else 2) * config.width * config.ffn_width
    return len(config.layers) * (attention + ffn) + config.vocab_size * config.width


def flops_per_token(config: ModelConfig, context: int) -> tuple[int, int]:
    """Model FLOPs a trained token with causal attention counted half, and counted full (PaLM, 2204.02311, App. B)."""
    attention = 6 * len(config.layers) * context * config.heads * config.head_dim
    matmuls = 6 * matmul_parameters(config)
    return matmuls + attention, matmuls + 2 * attention


def predict(job: Job, optimizer: str) -> dict[str, float]:
    """Step seconds and peak bytes that a dry run of our step says, on the catalog's H200."""
    setting = setting_of(job, optimizer)
    machine = load(MACHINE)
    walk = dry(lambda: decoder(job.config, setting, "cpu", fold=True))
    memory = over_time(walk, machine.memory_bytes.value)
    return {"seconds": time_walk(walk, machine, graph=False).expected_seconds, "bytes": memory.total}


def contender(name: str, job: Job) -> Step:
    """A contender's step; the peers are imported only where they run."""
    if name in OURS:
        return ours(job, "cuda", OURS[name])
    if name == "plain":
        from benchmarks.peers import plain

        return plain.build(job, "cuda")
    from benchmarks.peers import hf

    return hf.build(job, "cuda")


def gemm_flops_per_second(seconds: float = 0.5) -> float:
    """FLOP/s of a bf16 8192³ product on random data, the median over as many as fit into `seconds`."""
    a, b = (torch.randn(GEMM, GEMM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 10 or time.perf_counter() - began < seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2.0 * GEMM**3 / statistics.median(times)


def measure(model: str, name: str, steps: int, dtype: str) -> dict[str, float]:
    """One contender on this GPU: seconds a step, peak bytes after warm-up, the losses, the GEMM ceiling."""
    job = job_of(model, dtype)
    torch.manual_seed(0)
    began = time.perf_counter()
    step, stream = contender(name, job), batches(job, "cuda")
    first = float(step(*next(stream)))
    for _ in range(2):
        step(*next(stream))
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    last = torch.zeros(())
    for _ in range(math.ceil(steps / BLOCK)):
        start = time.perf_counter()
        for _ in range(BLOCK):
            last = step(*next(stream))
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / BLOCK)
    if not math.isfinite(float(last)):
        raise RuntimeError(f"{name}: the loss is {float(last)} after {steps} steps, so its time means nothing")
    return {
        "seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "peak_bytes": float(torch.cuda.max_memory_allocated()),
        "reserved_bytes": float(torch.cuda.max_memory_reserved()),
        "first_loss": first,
        "last_loss": float(last),
        "warm_up_seconds": warm_up,
        "gemm": gemm_flops_per_second(),
    }


def in_a_process(
    model: str, name: str, steps: int, dtype: str, limit: float, beside: Callable[[], Any]
) -> tuple[Any, Any]:
    """`measure` in a process of its own, or why it failed; and what `beside` returned, run while that one starts."""
    command = [sys.executable, "-m", "benchmarks.train_h200", "--measure", model, name, "--steps", str(steps)]
    command += ["--dtype", dtype]
    # A session of its own, so that the compiler's helper processes end with it: they hold the pipes open.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    also = beside()
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no result within {limit:.0f} s", also
    if process.returncode:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        # torch ends some errors with hints: the line that names the exception says more.
        named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
        return (named or lines or [f"exit code {process.returncode}"])[-1][:300], also
    return json.loads(out.splitlines()[-1]), also


def row(model: str, name: str, dtype: str, found: dict[str, Any], predicted: dict[str, float] | None) -> dict[str, Any]:
    """All figures of one contender, derived ones beside the measured."""
    job = job_of(model, dtype)
    peak = load(MACHINE).peaks[PRECISION].value
    half, full = flops_per_token(job.config, job.context)
    rate = job.tokens / found["seconds"]
    derived = {
        "tokens_per_second": rate,
        "mfu_causal": rate * half / peak,
        "mfu_full": rate * full / peak,
        "share_of_gemm": rate * half / found["gemm"],
        "peak_gib": found["peak_bytes"] / GIB,
    }
    if predicted is not None:
        derived["predicted_seconds"] = predicted["seconds"]
        derived["predicted_gib"] = predicted["bytes"] / GIB
        derived["time_error"] = predicted["seconds"] / found["seconds"] - 1
        derived["memory_error"] = predicted["bytes"] / found["peak_bytes"] - 1
    about = {"batch": job.batch, "context": job.context, "recompute": job.recompute, "weights": PRECISIONS.get(name)}
    return {"model": model, "contender": name, **about, **found, **derived}


HEADER = (
    "| model | contender | step | tok/s | of best peer | MFU causal (full) | of GEMM | peak | predicted step | "
    "predicted peak |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as one markdown table, each contender beside the best peer of its model."""
    lines = [HEADER]
    for found in rows:
        recompute = MODELS[found["model"]][3]
        shape = f"{found['model']}, {found.get('batch')}×{found.get('context')}"
        shape += f", {recompute} recompute" if recompute != "none" else ""
        if "error" in found:
            lines.append(f"| {found['model']} | {found['contender']} | failed: {found['error']} | | | | | | | |")
            continue
        peers = [r for r in rows if r["model"] == found["model"] and r["contender"] in PEERS and "error" not in r]
        best = max((r["tokens_per_second"] for r in peers), default=None)
        ratio = f"{found['tokens_per_second'] / best:.3f}" if best else ""
        predicted = "| | |"
        if "predicted_seconds" in found:
            predicted = (
                f"| {found['predicted_seconds'] * 1e3:.1f} ms ({found['time_error']:+.1%}) "
                f"| {found['predicted_gib']:.1f} GiB ({found['memory_error']:+.1%}) |"
            )
        lines.append(
            f"| {shape} | {found['contender']} | {found['seconds'] * 1e3:.1f} ms | {found['tokens_per_second']:,.0f} "
            f"| {ratio} | {found['mfu_causal']:.1%} ({found['mfu_full']:.1%}) | {found['share_of_gemm']:.1%} "
            f"| {found['peak_gib']:.1f} GiB {predicted}"
        )
    lines += [
        "",
        "Peers: bf16 weights and states, fused AdamW, torch.compile; ours as named. Earlier, on this kind of GPU:",
    ]
    lines += [f"- {model}: {MODELS[model][4]}" for model in dict.fromkeys(r["model"] for r in rows)]
    gemms = [r["gemm"] / 1e12 for r in rows if "gemm" in r]
    if gemms:
        lines.append(f"- bf16 {GEMM}³ in these processes: {min(gemms):.0f} to {max(gemms):.0f} TFLOP/s")
    return "\n".join(lines)


def listed(text: str, allowed: tuple[str, ...]) -> list[str]:
    """The names of a comma list, each one of `allowed`."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; use some of {','.join(allowed)}")
    return names


def main() -> None:
    """Run every contender and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = tuple(MODELS)
    parser.add_argument("--models", type=lambda t: listed(t, models), default=list(models), help=",".join(models))
    peers = (*PEERS, "none")
    parser.add_argument("--peers", type=lambda t: listed(t, peers), default=list(PEERS), help="plain,hf or none")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16", help="of our products (fp8: no peers)")
    parser.add_argument(
        "--ours", type=lambda t: listed(t, ("bf16", "fp32")), default=["bf16", "fp32"], help="bf16,fp32"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one contender (default 150)")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for everything (default 470)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        model, name = options.measure
        print(json.dumps(measure(model, name, options.steps, options.dtype)))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: these runs need one H200; `python -m benchmarks.train_cpu` runs on a CPU")
    began, rows = time.perf_counter(), []
    rivals = [peer for peer in PEERS if peer in options.peers and options.dtype == "bf16"]
    contenders = [*(name for name in OURS if name.split()[1] in options.ours), *rivals]
    for model, name in itertools.product(options.models, contenders):
        left = options.budget - (time.perf_counter() - began)
        if left < 10:
            found: Any = "not started: the time was up"
            predicted = None
        else:
            beside = (
                functools.partial(predict, job_of(model, options.dtype), OURS[name]) if name in OURS else lambda: None
            )
            found, predicted = in_a_process(model, name, options.steps, options.dtype, min(options.limit, left), beside)
        failed = isinstance(found, str)
        rows.append(
            {"model": model, "contender": name, "error": found}
            if failed
            else row(model, name, options.dtype, found, predicted)
        )
        said = (
            found if failed else f"{rows[-1]['tokens_per_second']:,.0f} tok/s, warm-up {found['warm_up_seconds']:.0f} s"
        )
        print(f"{time.perf_counter() - began:5.0f} s  {model} {name}: {said}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
