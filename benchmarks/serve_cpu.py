"""Generation on this CPU, ours and transformers', taken in turns: ms a step, output tokens/s and their ratio.

    python -m benchmarks.serve_cpu [--batches 1,16] [--engine] [--cache static] [--turns 5] [--profile]

All continue the same random prompts greedily with the same random weights (a Llama of 12 layers, 100M parameters, read
from one checkpoint), on as many threads, in one process whose freed memory glibc keeps. A turn is one `generate` of
each for a single token, which is the prefill, and one for all tokens. Output tokens/s count the whole call, prefill
included; ms a step are of the tokens after the first. Medians over the turns; the ratio is also given of the fastest
calls, for other work on the cores only ever adds time. `--engine` adds our serving engine, with its scheduler and
sampler, to our plain loop.

Legend: B sequences  T tokens
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from rooflight.hardware.host import cpu_name, keep_freed_memory
from rooflight.models.config import ModelConfig
from rooflight.models.generate import generate
from rooflight.models.layers import Linear
from rooflight.models.presets import preset
from rooflight.models.transformer import Head
from rooflight.models.weights import load_pretrained, save
from rooflight.ops.cpu_matmul import pack
from rooflight.workload.program import DTYPES, build_model

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a number of tokens → that many tokens after each."""

TOP = 16


def config() -> ModelConfig:
    """12 layers of width 768, 12 query heads on 4 key heads, 32,000 tokens, tied: 100.1M parameters."""
    sizes = {"vocab_size": 32000, "kv_heads": 4, "ffn_width": 2048}
    return replace(preset("train-152m"), name="serve-100m", **sizes)


def transformers(directory: Path, dtype: torch.dtype, cache: str) -> Generate:
    """LlamaForCausalLM.generate with its SDPA attention and a dynamic or a static cache."""
    # Its mixins and its types disagree.
    model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    greedy: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    if cache == "static":
        greedy |= {"cache_implementation": "static", "disable_compile": True}

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        tokens_BT = torch.tensor(prompts)
        out_BT = model.generate(
            tokens_BT, attention_mask=torch.ones_like(tokens_BT), max_new_tokens=count, min_new_tokens=count, **greedy
        )
        return out_BT[:, tokens_BT.shape[1] :].tolist()

    return run


def plain(directory: Path, dtype: torch.dtype) -> Generate:
    """Our loop over a paged cache, with packed weights."""
    model = load_pretrained(directory, "cpu", dtype).requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, Linear | Head):
            pack(module.weight)
    return lambda prompts, count: generate(model, prompts, count)


def engine(directory: Path, dtype: str, longest: int) -> Generate:
    """Our engine: scheduler, paged cache with prefix sharing switched off, sampler."""
    from rooflight.serve.llm import LLM
    from rooflight.serve.params import SamplingParams

    # Prompts repeat from turn to turn; transformers computes them anew each time, and so must we.
    llm = LLM(str(directory), dtype=dtype, device="cpu", max_model_len=longest, enable_prefix_caching=False)

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]

    return run


@dataclass
class Times:
    """Seconds of a contender's calls for one token and for all of them, and what it generated."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def step_ms(self, count: int) -> float:
        """Milliseconds of a step after the first."""
        return (statistics.median(self.whole) - statistics.median(self.first)) / (count - 1) * 1e3


def timed(run: Generate, prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = run(prompts, count)
    return time.perf_counter() - start, tokens


def measure(contenders: dict[str, Generate], prompts: list[list[int]], count: int, turns: int) -> dict[str, Times]:
    """Calls of each contender in turns, after one of each that is not counted."""
    times = {name: Times() for name in contenders}
    for run in contenders.values():
        run(prompts, 3)
    names = list(contenders)
    for turn in range(turns):
        # Each goes first as often as the others: what it leaves in the caches is the next one's loss.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds, _ = timed(contenders[name], prompts, 1)
            times[name].first.append(seconds)
            seconds, times[name].tokens = timed(contenders[name], prompts, count)
            times[name].whole.append(seconds)
            print(f"  {len(prompts)} requests, {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return times


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Mean share of the tokens before the first that differs; rounding decides between near-equal logits."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        differs = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        shares.append(next(differs, len(a)) / len(a))
    return statistics.mean(shares)


def rows(times: dict[str, Times], batch: int, count: int) -> list[str]:
    """A row a contender; transformers is the first."""
    peer = next(iter(times.values()))
    made = []
    for name, seen in times.items():
        ratio = statistics.median(peer.whole) / statistics.median(seen.whole)
        fastest = min(peer.whole) / min(seen.whole)
        made.append(
            f"| {batch} | {name} | {statistics.median(seen.first) * 1e3:,.1f} | {seen.step_ms(count):.1f} "
            f"| {batch * count / statistics.median(seen.whole):,.0f} | {ratio:.2f} ({fastest:.2f}) "
            f"| {same_tokens(seen.tokens, peer.tokens):.0%} |"
        )
    return made


def profiled(run: Generate, prompts: list[list[int]], count: int) -> None:
    """Print the operators that take most of a call, prefill included, as milliseconds a token."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(prompts, count)
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    for event in found[:TOP]:
        print(f"  {event.self_cpu_time_total / 1e3 / count:8.2f}  {event.count / count:6.1f}  {event.key[:90]}")


def main() -> None:
    """Run the batches and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", default="1,16", help="requests at once (default 1,16)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens a prompt (default 128)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt, 2 or more (default 64)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="weights and products (default bf16)")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="transformers' cache")
    parser.add_argument("--engine", action="store_true", help="our serving engine too")
    parser.add_argument("--threads", type=int, default=2, help="threads of all (default 2)")
    parser.add_argument("--turns", type=int, default=5, help="turns of a batch (default 5)")
    parser.add_argument("--profile", action="store_true", help="print where each spends its time")
    options = parser.parse_args()
    if options.tokens < 2 or options.turns < 1 or options.prompt < 1:
        parser.error("--tokens must be at least 2, --turns and --prompt at least 1")
    torch.set_num_threads(options.threads)
    kept = keep_freed_memory()
    longest = options.prompt + options.tokens
    sized = replace(config(), max_context=max(config().max_context, longest), dtype=str(DTYPES[options.dtype])[6:])
    dtype = DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(0)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save(build_model(sized, options.dtype, "cpu").initialize(), directory)
        contenders = {
            f"transformers, {options.cache} cache": transformers(directory, dtype, options.cache),
            "rooflight generate": plain(directory, dtype),
        }
        if options.engine:
            contenders["rooflight engine"] = engine(directory, options.dtype, longest)
        for batch in map(int, options.batches.split(",")):
            prompts = torch.randint(0, sized.vocab_size, (batch, options.prompt), generator=generator).tolist()
            table += rows(measure(contenders, prompts, options.tokens, options.turns), batch, options.tokens)
            for name, run in contenders.items() if options.profile else ():
                print(f"\n{batch} requests, {name}: ms a token, calls")
                profiled(run, prompts, options.tokens)
    memory = "freed memory kept" if kept else "freed memory returned to the system"
    print(f"\n{cpu_name()}, {options.threads} threads, torch {torch.__version__}, {options.dtype}; {memory}")
    print(f"prompts of {options.prompt} tokens, {options.tokens} new ones, {options.turns} turns\n")
    print("| requests | who | prefill ms | step ms | output tok/s | × transformers, medians (fastest) | same tokens |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
