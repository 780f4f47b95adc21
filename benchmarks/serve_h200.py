"""Serving on one GPU: offline throughput, time per output token, time to first token, start-up, beside vLLM's figures.

Random weights of the named shapes, bf16, temperature 0.6, end of text ignored, no prefix cache, as vLLM 0.26 was
measured on the same kind of machine (shared/ANCHORS.md); the roof is that of each run's own steps.

    python benchmarks/serve_h200.py [--models qwen3-0.6b llama-3.1-8b] [--parts offline tpot ttft] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rooflight.serve.engine import StepRecord
from rooflight.serve.llm import LLM
from rooflight.serve.params import SamplingParams

# vLLM 0.26: output tokens a second; milliseconds per output token; milliseconds to the first token; seconds to start.
PEER = {
    "qwen3-0.6b": {
        "offline 256 x U(100,1024)/U(100,1024)": 23800.0,
        "tpot 1": 1.62, "tpot 8": 1.59, "tpot 32": 1.90, "tpot 128": 3.31,
        "ttft 1x1024": 15.5, "ttft 1x8192": 31.0, "ttft 16x1024": 41.8, "start": 40.5,
    },
    "llama-3.1-8b": {
        "offline 256 x 1024/256": 6070.0, "offline 512 x 1024/128": 3930.0,
        "tpot 1": 4.90, "tpot 8": 5.05, "tpot 32": 5.55, "tpot 128": 7.51,
        "ttft 1x1024": 27.5, "ttft 1x8192": 216.0, "ttft 16x1024": 377.0, "start": 36.7,
    },
}  # fmt: skip
OFFLINE = {
    "qwen3-0.6b": [("offline 256 x U(100,1024)/U(100,1024)", 256, (100, 1024), (100, 1024))],
    "llama-3.1-8b": [
        ("offline 256 x 1024/256", 256, (1024, 1024), (256, 256)),
        ("offline 512 x 1024/128", 512, (1024, 1024), (128, 128)),
    ],
}


@dataclass
class Line:
    """One figure: ours, the peer's, and ours as a multiple of the peer's speed; the roof and what was predicted."""

    model: str
    what: str
    unit: str
    ours: float
    peer: float | None
    speed: float | None
    roof: float | None = None
    predicted: float | None = None


class Bench:
    """One model's engine and the records of its steps."""

    def __init__(self, model: str, max_num_seqs: int, **settings: Any):
        self.model, self.records = model, []
        began = time.perf_counter()
        self.llm = LLM(
            model, load_format="dummy", dtype="bf16", enable_prefix_caching=False, max_model_len=16384,
            max_num_seqs=max_num_seqs, on_step=self.records.append, say=lambda text: print(text, flush=True),
            **settings,
        )  # fmt: skip
        self.start_seconds = time.perf_counter() - began
        self.draw = random.Random(0)
        self.generate([64] * 4, [8] * 4)

    def generate(self, inputs: list[int], outputs: list[int]) -> float:
        """Seconds for prompts of these lengths to give so many tokens each."""
        vocabulary = self.llm.config.vocab_size
        prompts = [[self.draw.randrange(vocabulary) for _ in range(length)] for length in inputs]
        params = [SamplingParams(max_tokens=length, temperature=0.6, ignore_eos=True) for length in outputs]
        self.records.clear()
        began = time.perf_counter()
        results = self.llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        for result, length in zip(results, outputs, strict=True):
            if len(result.outputs[0].token_ids) != length:
                raise SystemExit(f"{self.model}: {len(result.outputs[0].token_ids)} tokens instead of {length}")
        return seconds

    def forecast(self, decodes_only: bool = False) -> tuple[float, float]:
        """Roof and predicted seconds of the steps recorded."""
        chosen = [r for r in self.records if not decodes_only or r.decodes == r.sequences]
        found = [record.forecast for record in chosen if record.forecast is not None]
        return sum(one.roof_seconds for one in found), sum(one.seconds for one in found)

    def offline(self, name: str, count: int, inputs: tuple[int, int], outputs: tuple[int, int]) -> Line:
        ins = [self.draw.randint(*inputs) for _ in range(count)]
        outs = [self.draw.randint(*outputs) for _ in range(count)]
        seconds = self.generate(ins, outs)
        roof, predicted = self.forecast()
        rate, peer = sum(outs) / seconds, PEER[self.model].get(name)
        self.tell_steps(name)
        return Line(
            self.model, name, "output tok/s", rate, peer, rate / peer if peer else None,
            sum(outs) / roof if roof else None, sum(outs) / predicted if predicted else None,
        )  # fmt: skip

    def tpot(self, batch: int) -> Line:
        self.generate([128] * batch, [257] * batch)
        steps = [r for r in self.records if r.decodes == r.sequences == batch]
        wall = (steps[-1].ended - steps[0].ended) / (len(steps) - 1)
        roof, predicted = self.forecast(decodes_only=True)
        peer = PEER[self.model].get(f"tpot {batch}")
        device = statistics.median(r.seconds for r in steps)
        print(
            f"    batch {batch}: {wall * 1e3:.3f} ms a step by the wall, {device * 1e3:.3f} on the device", flush=True
        )
        return Line(
            self.model, f"tpot {batch}", "ms", wall * 1e3, peer, peer / (wall * 1e3) if peer else None,
            roof / len(steps) * 1e3, predicted / len(steps) * 1e3,
        )  # fmt: skip

    def ttft(self, count: int, length: int) -> Line:
        times = [self.generate([length] * count, [1] * count) for _ in range(4)]
        roof, predicted = self.forecast()
        ours = statistics.median(times[1:]) * 1e3
        peer = PEER[self.model].get(f"ttft {count}x{length}")
        return Line(
            self.model, f"ttft {count}x{length}", "ms", ours, peer, peer / ours if peer else None, roof * 1e3,
            predicted * 1e3,
        )  # fmt: skip

    def tell_steps(self, name: str) -> None:
        """Where the time of a run went: steps with prompts in them, steps without, and what lies between."""
        records: list[StepRecord] = self.records
        mixed = [r for r in records if r.decodes != r.sequences]
        pure = [r for r in records if r.decodes == r.sequences]
        span = records[-1].ended - records[0].began
        print(
            f"    {name}: {len(mixed)} steps with prompts {sum(r.seconds for r in mixed):.3f} s, {len(pure)} without "
            f"{sum(r.seconds for r in pure):.3f} s, {span:.3f} s in all; {sum(r.preempted for r in records)} preempted",
            flush=True,
        )


def run(model: str, parts: list[str], batches: list[int], settings: dict[str, Any]) -> list[Line]:
    """Every figure of one model."""
    bench = Bench(model, 256, **settings)
    started = bench.start_seconds
    lines = [Line(model, "start", "s", started, PEER[model]["start"], PEER[model]["start"] / started)]
    if "tpot" in parts:
        lines += [bench.tpot(batch) for batch in batches]
    if "ttft" in parts:
        lines += [bench.ttft(count, length) for count, length in ((1, 1024), (1, 8192), (16, 1024))]
    if "offline" in parts:
        lines += [bench.offline(*what) for what in OFFLINE[model]]
    bench.llm.close()
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    return lines


def table(lines: list[Line]) -> str:
    """The figures as Markdown."""
    rows = ["| model | what | ours | vLLM 0.26 | ours / vLLM | predicted | roof |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        shown = [f"{value:,.3g}" if value is not None and value < 1000 else f"{value:,.0f}" if value else "–"
                 for value in (line.ours, line.peer, line.speed, line.predicted, line.roof)]  # fmt: skip
        ours, peer, speed, predicted, roof = shown
        rows.append(f"| {line.model} | {line.what} ({line.unit}) | {ours} | {peer} | {speed} | {predicted} | {roof} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PEER))
    parser.add_argument("--parts", nargs="+", default=["tpot", "ttft", "offline"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--on", default="h200")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {"on": options.on, "enforce_eager": options.enforce_eager}
    lines: list[Line] = []
    for model in options.models:
        lines += run(model, options.parts, options.batches, settings)
        print(table(lines), flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
