"""`probe`: measure the machine that this runs on, and write the file that `--on here` reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from rooflight.errors import InvalidValue
from rooflight.hardware import ceilings, collectives, host
from rooflight.hardware.figures import Figure, Link, Sample
from rooflight.hardware.machine import CACHE_REACH, Machine
from rooflight.hardware.store import HERE, match_device, save
from rooflight.hardware.timing import Timer

Say = Callable[[str], None]
Extra = Callable[[Timer], list[Sample]]

# The ceilings' part of the budget; collectives have a fixed number of calls, and the rest is for operations.
CEILINGS_SHARE = 0.35
COPY_SHARE = 0.2
CEILINGS = ("copy", "read", "linear")
MIN_BUDGET, MAX_BUDGET = 1.0, 3600.0


def _silent(line: str) -> None:
    """Say nothing."""


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidValue(f"unknown device {name!r}; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidValue(f"device {name!r} cannot be probed; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValue(f"device {name!r} is not here: torch sees no CUDA device; use cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _told(samples: Iterator[Sample], say: Say) -> list[Sample]:
    kept: list[Sample] = []
    for sample in samples:
        kept.append(sample)
        rate, unit = sum(sample.flops.values()) / sample.seconds / 1e9, "GFLOP/s"
        if sample.curve in ("copy", "read"):
            rate, unit = sample.bytes / sample.seconds / 1e9, "GB/s"
        size = "×".join(str(length) for length in sample.size)
        say(f"{sample.curve} {sample.precision} {size}: {sample.seconds * 1e6:,.1f} µs, {rate:,.1f} {unit}")
    return kept


def _collective_samples(device: torch.device, say: Say) -> list[Sample]:
    """Between torchrun's ranks where there are some, else between this host's GPUs."""
    if dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        own = not dist.is_initialized()
        if own:
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            say(f"collectives between {dist.get_world_size()} ranks")
            return collectives.measure(device, dist.get_rank(), dist.get_world_size())
        finally:
            if own:
                dist.destroy_process_group()
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        say(f"collectives between {torch.cuda.device_count()} GPUs")
        # The ranks are processes of their own, and one of them needs the memory that this one no longer uses.
        torch.cuda.empty_cache()
        return collectives.spawn("cuda", torch.cuda.device_count())
    return []


def _best(samples: Iterable[Sample], curve: str) -> dict[str, float]:
    """Highest FLOP/s by precision, of one curve or of "" for every curve."""
    best: dict[str, float] = {}
    for sample in samples:
        if curve in ("", sample.curve):
            for precision, count in sample.flops.items():
                best[precision] = max(best.get(precision, 0.0), count / sample.seconds)
    return best


def _ceilings(samples: Sequence[Sample], largest_cache: float, source: str) -> dict[str, Figure]:
    """Copy and read rates far beyond the caches, and the best matrix multiply of each precision."""
    found = {f"matmul.{name}": Figure(rate, source) for name, rate in _best(samples, "linear").items()}
    for curve in ("copy", "read"):
        rates = {s.bytes: s.bytes / s.seconds for s in samples if s.curve == curve}
        beyond = [rate for moved, rate in rates.items() if moved > CACHE_REACH * largest_cache]
        # Where memory is too small for buffers beyond the cache, the largest buffer tells most of memory.
        found[curve] = Figure(max(beyond, default=rates[max(rates)]), source)
    return found


def _raised(machine: Machine, source: str) -> Machine:
    """The machine with every roof at least as high as what was measured, cache by cache on a CPU.

    Main memory's only by data that was surely moved: other operations may find theirs in a GPU's cache.
    """
    peaks = dict(machine.peaks)
    for precision, rate in _best(machine.samples, "").items():
        if precision not in peaks or rate > peaks[precision].value:
            peaks[precision] = Figure(rate, source)
    levels = sorted((size.value * CACHE_REACH, level) for level, size in machine.caches.items())
    measured, memory = dict(machine.measured), machine.memory_bandwidth
    for sample in machine.samples:
        rate = sample.bytes / sample.seconds
        # The innermost cache that holds the data: an outer one's roof would be too high for data that only it holds.
        holding = next((f"bandwidth.{level}" for reach, level in levels if sample.bytes <= reach), None)
        if holding is not None and machine.kind == "cpu":
            if rate > max(memory.value, measured[holding].value if holding in measured else 0.0):
                measured[holding] = Figure(rate, source)
        elif sample.curve in CEILINGS and rate > memory.value:
            memory = Figure(rate, source)
    return replace(machine, peaks=peaks, measured=measured, memory_bandwidth=memory)


def _links(known: Machine | None, samples: Sequence[Sample], source: str) -> dict[str, Link]:
    """The catalog's links, or one from the best bandwidth and the least latency that the collectives reached."""
    if known is not None:
        return dict(known.links)
    shared = [sample for sample in samples if sample.link_bytes]
    if not shared:
        return {}
    rate = max(sample.link_bytes / sample.seconds for sample in shared)
    return {"measured": Link("measured", min(s.seconds for s in shared), rate, max(s.size[0] for s in shared), source)}


def probe(
    device: str | None = None,
    budget_seconds: float = 100.0,
    extra_samples: Iterable[Extra] = (),
    *,
    path: Path | None = None,
    say: Say = _silent,
) -> Machine:
    """Measure this machine's ceilings, then what `extra_samples` add, and save the machine to `path` (`here`).

    device: "cpu" or "cuda"; None takes a GPU where there is one. Each of `extra_samples` gets a Timer, whose
    `remaining` is what is left of the budget, and returns samples; flops and bytes as its cost model counts them.
    A GPU that the catalog knows keeps its datasheet roofs; else the roofs are the best that was measured. Under
    torchrun every rank must call it, and rank 0 writes. Raises InvalidValue for a bad device or budget.
    """
    where = _device(device)
    host.keep_freed_memory()
    if not MIN_BUDGET <= budget_seconds <= MAX_BUDGET:
        raise InvalidValue(f"budget of {budget_seconds} s; use {MIN_BUDGET:.0f} to {MAX_BUDGET:.0f} seconds")
    timer = Timer(where, budget_seconds, say)
    known = match_device(torch.cuda.get_device_name(where)) if where.type == "cuda" else None
    source = f"measured by `rooflight probe`, {host.device_title(where)}, {host.versions(where)}"
    caches, memory = host.cpu_caches() if where.type == "cpu" else {}, host.memory_bytes(where)
    cache = ceilings.cache_bytes(where, caches)
    with torch.inference_mode():
        say(f"probing {host.device_title(where)}, at most {budget_seconds:.0f} s")
        eager, graph = ceilings.launch_seconds(timer)
        say(f"launch: eager {eager * 1e6:.2f} µs, in a graph {graph * 1e6:.2f} µs")
        share = CEILINGS_SHARE * budget_seconds
        samples = _told(ceilings.copy_samples(timer, cache, memory, COPY_SHARE * share), say)
        samples += _told(ceilings.linear_samples(timer, cache, (1 - COPY_SHARE) * share), say)
    samples += _collective_samples(where, say)
    # No inference mode here: a sample may well be a backward pass.
    for extra in extra_samples:
        samples += extra(timer)
    measured = _ceilings(samples, cache, source)
    bandwidth = max(measured["copy"], measured["read"], key=lambda figure: figure.value)
    machine = Machine(
        name=HERE,
        title=host.device_title(where),
        kind="gpu" if where.type == "cuda" else "cpu",
        peaks=dict(known.peaks) if known else {},
        memory_bandwidth=known.memory_bandwidth if known else bandwidth,
        memory_bytes=Figure(memory, "the operating system" if where.type == "cpu" else "the driver"),
        launch_eager_seconds=Figure(eager, source),
        launch_graph_seconds=Figure(graph, source),
        caches=dict(known.caches) if known else {k: Figure(v, "the operating system") for k, v in caches.items()},
        links=_links(known, samples, source),
        measured=measured,
        samples=tuple(samples),
        samples_source=source,
        power_watts=known.power_watts if known else None,
    )
    machine = _raised(machine, source)
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"wrote {save(machine, path)}")
    return machine
