"""Measure every operation on this machine by running small decoders wet: the samples from which `expected` comes.

On a CPU an operation is timed where it runs, between its neighbours, with its data as warm as the step leaves it. On a
GPU, where a call only launches, each distinct call is kept and timed by itself as a node of a CUDA graph.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rooflight.hardware.ceilings import copies_beyond
from rooflight.hardware.figures import Sample
from rooflight.hardware.timing import Timer
from rooflight.models.config import ModelConfig, MoE, Rope, same_layers
from rooflight.ops.cost import Cost, curve_of
from rooflight.workload import program as programs
from rooflight.workload import walk as walks
from rooflight.workload.optimizers import Update
from rooflight.workload.program import Setting
from rooflight.workload.record import Record, wall_clock
from rooflight.workload.roofline import BETWEEN_INFERENCE, BETWEEN_TRAINING
from rooflight.workload.training import Recipe

# Operations whose weights or cache a real step reads from memory, not from the cache that a repeat would leave them in.
_COLD = frozenset(
    {
        "linear",
        "norm_linear",
        "add_linear",
        "head_linear",
        "grouped_linear",
        "grouped_gated_linear",
        "linear_input_grad",
        "paged_attention",
        "gather_kv",
    }
)
_CPU_RUNS = 5
_TINY_RUNS = 20
_SOURCE_RUN_SECONDS = 6.0  # a single wet run longer than this would eat the budget


@dataclass(frozen=True, slots=True)
class Trial:
    """A decoder and what to run on it."""

    config: ModelConfig
    setting: Setting


def _decoder(width: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, **changes: Any) -> ModelConfig:
    rope = Rope(10000.0, width // heads)
    config = ModelConfig(
        family="llama",
        name=f"calibration-{width}",
        vocab_size=vocabulary,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        ffn_width=ffn,
        layers=same_layers(2, 0, rope),
        max_context=131072,
    )
    return replace(config, **changes)


def _trials(device: torch.device) -> Iterator[Trial]:
    """Widths, token counts, contexts and phases that span what models do, the commonest first."""
    gpu = device.type == "cuda"
    if gpu:
        widths = [(4096, 32, 8, 14336, 128256), (2048, 32, 8, 8192, 128256), (1024, 16, 8, 3072, 151936)]
        prompts = [(1, 1024), (1, 4096), (1, 128), (8, 2048), (1, 16384)]
        steps = [(1, 2048), (64, 2048), (8, 512), (1, 16384), (256, 1024), (16, 8192), (32, 256), (128, 256)]
        batches, dtypes = [(1, 4096), (8, 1024), (2, 512)], ["bf16"]
    else:
        widths = [(768, 12, 4, 2048, 32000), (256, 4, 4, 1024, 4096), (1024, 16, 8, 3072, 65536)]
        prompts = [(1, 128), (1, 512), (4, 64), (4, 256)]
        steps = [(1, 128), (8, 256), (1, 1024), (16, 128), (4, 512)]
        batches, dtypes = [(2, 128), (4, 256)], ["bf16", "fp32"]
    for dtype in dtypes:
        for place, width in enumerate(widths):
            config = _decoder(*width)
            if place == 1:
                yield from _variants(_decoder(*widths[0]), dtype, gpu)
                yield from _unaligned(dtype) if gpu else ()
            for batch, context in prompts:
                yield Trial(config, Setting("prefill", batch, context, dtype))
            for batch, context in steps:
                yield Trial(config, Setting("decode", batch, context, dtype))
            # On a CPU, steps of the widest model would take the time of all the rest.
            for batch, context in batches if gpu or place < 2 else ():
                # Masters are the widest optimizer, states as narrow as the weights the leanest; and packed documents.
                yield _training(config, batch, context, dtype, Update(masters=True))
                yield _training(config, batch, max(context // 4, 16), dtype, Update(state_dtype="bf16"))
                yield _training(config, batch, context, dtype, Update(), max(context // 8, 16))


def _training(
    config: ModelConfig, batch: int, context: int, dtype: str, update: Update, document_length: int = 0
) -> Trial:
    recipe = Recipe(clip=1.0, update=update, document_length=document_length)
    return Trial(config, Setting("train", batch, context, dtype, recipe=recipe))


def _unaligned(dtype: str) -> Iterator[Trial]:
    """GPT-2's width and its vocabulary, which is no multiple of 8: products over it take other kernels."""
    odd = _decoder(768, 12, 12, 3072, 50257)
    for batch, context in ((8, 1024), (1, 512)):
        yield Trial(odd, Setting("prefill", batch, context, dtype))
        yield Trial(odd, Setting("train", batch, context, dtype))


def _variants(base: ModelConfig, dtype: str, gpu: bool) -> Iterator[Trial]:
    """What other families add: LayerNorm, GELU and multi-head attention; experts; windows; naive attention."""
    context = 1024 if gpu else 256
    # Multi-head, as the models with LayerNorm and GELU are: attention then has another shape too.
    plain = replace(base, norm="layer", activation="gelu_tanh", gated=False, kv_heads=base.heads)
    plain = replace(plain, qkv_bias=True, mlp_bias=True, out_bias=True)
    experts = replace(
        base,
        layers=same_layers(2, 0, base.layers[0].rope, sparse=True),
        moe=MoE(experts=8, top_k=2, width=base.ffn_width // 4),
        qk_norm=True,
    )
    capped = replace(base, layers=same_layers(2, context // 2, base.layers[0].rope), attention_softcap=50.0)
    for config in (plain, experts, capped):
        yield Trial(config, Setting("prefill", 1, context, dtype))
        yield Trial(config, Setting("decode", 4, context, dtype))
        yield Trial(config, Setting("decode", 1, 2 * context, dtype))
        yield Trial(config, Setting("train", 1, context, dtype))
    for phase, batch in (("prefill", 1), ("decode", 4), ("train", 1)):
        yield Trial(base, Setting(phase, batch, context, dtype, attention="naive"))


def operation_samples(timer: Timer) -> list[Sample]:
    """Samples of every operation that decoders run, in all phases, within what is left of the timer's budget."""
    found: dict[tuple[Any, ...], Sample] = {}
    for sample in _between(timer.device):
        found[(sample.curve, sample.precision, sample.size, 0)] = sample
    began = timer.remaining
    done = 0
    for trial in _trials(timer.device):
        # Widths come in order of importance; what is left of the list when time is short is dropped, and said.
        if timer.remaining < 0.04 * began:
            timer.say(f"operations: out of time after {done} trials; the rest will be interpolated")
            break
        collect = _on_gpu if timer.device.type == "cuda" else _on_cpu
        for key, sample in collect(trial, timer, found):
            found[key] = sample
        done += 1
    timer.say(f"operations: {len(found)} samples from {done} trials")
    return list(found.values())


def _between(device: torch.device) -> Iterator[Sample]:
    """Python between operations, from decoders too small for anything else to take time.

    The run's time less its calls' own, over the number of calls: module calls, autograd, the walk over the layers.
    """
    tiny = _decoder(64, 4, 2, 128, 256, layers=same_layers(8, 0, Rope(10000.0, 16)))
    for curve, phase in ((BETWEEN_INFERENCE, "decode"), (BETWEEN_TRAINING, "train")):
        program = _build(Trial(tiny, Setting(phase, 2, 16, "bf16")), device)
        for _ in range(3):
            program.step(None)
        wholes, traces = [], []
        for _ in range(_TINY_RUNS):
            _wait(device)
            start = wall_clock()
            program.step(None)
            _wait(device)
            wholes.append(wall_clock() - start)
            traces.append([record.seconds or 0.0 for record in walks.record(program, clock=wall_clock).trace.records])
        calls = [statistics.median(column) for column in zip(*traces, strict=True)]
        between = max(statistics.median(wholes) - sum(calls), 0.0) / len(calls)
        yield Sample(curve, "any", (len(calls),), {}, 0.0, max(between, 1e-9))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _build(trial: Trial, device: torch.device) -> programs.Program:
    model = programs.build_model(trial.config, trial.setting.dtype, device).initialize()
    return programs.decoder(trial.config, trial.setting, device, fold=False, model=model)


def _key(name: str, cost: Cost) -> tuple[Any, ...]:
    return (
        curve_of(cost, name),
        cost.precision or "any",
        tuple(int(n) for n in cost.size),
        round(float(cost.total_bytes)),
    )


def _sample(name: str, cost: Cost, seconds: float, host_seconds: float | None) -> Sample:
    return Sample(
        curve=curve_of(cost, name),
        precision=cost.precision or "any",
        size=tuple(int(n) for n in cost.size),
        flops={precision: float(count) for precision, count in cost.flops.items() if count},
        bytes=float(cost.total_bytes),
        seconds=seconds,
        host_seconds=host_seconds,
    )


def _worth(cost: Cost) -> bool:
    """Whether a call can be a sample: it has a size, and does something."""
    return bool(cost.size) and bool(cost.total_bytes) and all(int(n) > 0 for n in cost.size)


def _on_cpu(trial: Trial, timer: Timer, found: dict[Any, Sample]) -> Iterator[tuple[Any, Sample]]:
    program = _build(trial, timer.device)
    program.step(None)
    start = wall_clock()
    runs = [walks.record(program, clock=wall_clock).trace.records]
    spent = wall_clock() - start
    while len(runs) < _CPU_RUNS and spent < _SOURCE_RUN_SECONDS and timer.remaining > 2 * spent / len(runs):
        start = wall_clock()
        runs.append(walks.record(program, clock=wall_clock).trace.records)
        spent += wall_clock() - start
    times: dict[Any, tuple[Record, list[float]]] = {}
    for position, record in enumerate(runs[0]):
        if _worth(record.cost):
            # The same call stands in each layer: all of them are calls of one sample.
            _, seen = times.setdefault(_key(record.name, record.cost), (record, []))
            seen.extend(run[position].seconds or 0.0 for run in runs)
    for key, (record, seconds) in times.items():
        if key not in found:
            yield key, _sample(record.name, record.cost, statistics.median(seconds), None)


def _on_gpu(trial: Trial, timer: Timer, found: dict[Any, Sample]) -> Iterator[tuple[Any, Sample]]:
    program = _build(trial, timer.device)
    calls: dict[Any, tuple[Record, Any, tuple[Any, ...], dict[str, Any]]] = {}

    def keep(record: Record, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = _key(record.name, record.cost)
        if _worth(record.cost) and key not in found and key not in calls:
            calls[key] = (record, func, args, kwargs)

    program.step(None)
    walks.record(program, keep=keep)
    cache = float(torch.cuda.get_device_properties(timer.device).L2_cache_size)
    with torch.no_grad():
        for key, (record, func, args, kwargs) in calls.items():
            if timer.remaining <= 0:
                return
            cold = record.name in _COLD
            copies = copies_beyond(cache, float(record.cost.bytes_read)) if cold else 1
            turns = [_call(func, args, kwargs)] + [_call(func, _copied(args), kwargs) for _ in range(copies - 1)]
            timing = timer(turns, budget_seconds=0.05)
            yield key, _sample(record.name, record.cost, timing.seconds, timing.host_seconds)


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map_only(Tensor, lambda tensor: tensor.clone(), args)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return lambda: func(*args, **kwargs)
