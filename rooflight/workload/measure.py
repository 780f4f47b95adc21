"""Run a program wet and measure it: the whole run, and each operation by itself."""

from __future__ import annotations

import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from rooflight.errors import InvalidValue
from rooflight.hardware.host import keep_freed_memory
from rooflight.models.config import ModelConfig
from rooflight.workload import program as programs
from rooflight.workload import walk as walks
from rooflight.workload.any_module import any_module
from rooflight.workload.explain import Measured
from rooflight.workload.factory import Factory
from rooflight.workload.memory import over_time
from rooflight.workload.program import Program, Setting
from rooflight.workload.record import wall_clock

_RUNS = 5
_BUDGET_SECONDS = 30.0


def device_here() -> str:
    """The device that a wet run uses: the first GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_available(device: str) -> float:
    """Bytes that a wet run may take: the driver's free memory, or what the system says is available."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = dict(line.split(":", 1) for line in lines)
        return float(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def measure(build: Callable[[], Program], device: str, *, graph: bool = False, seed: int = 0) -> Measured:
    """Build the program, warm it up, time whole runs, then time runs operation by operation.

    graph: replay the run as a captured CUDA graph for the whole run's time, as an engine's decode step does.
    """
    # The command line starts without the collector; a wet run wants it back, but not over what is imported.
    gc.freeze()
    gc.enable()
    keep_freed_memory()
    torch.manual_seed(seed)
    try:
        return _measured(build(), device, graph)
    except torch.OutOfMemoryError as error:
        raise InvalidValue(
            f"the wet run ran out of memory on this machine's {device}; choose a smaller model, batch or context"
        ) from error


def _measured(program: Program, device: str, graph: bool) -> Measured:
    program.step(None)
    _wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    total = _graph_seconds(program) if graph and device == "cuda" else _whole_seconds(program, device)
    peak = float(torch.cuda.max_memory_allocated()) if device == "cuda" else None
    names, seconds = _each_on_gpu(program) if device == "cuda" else _each_on_cpu(program, total)
    return Measured(names, seconds, total, peak)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _whole_seconds(program: Program, device: str) -> float:
    """Median wall time of a run without a recorder, device work included."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() - began < _BUDGET_SECONDS / 3):
        start = time.perf_counter()
        program.step(None)
        _wait(device)
        times.append(time.perf_counter() - start)
        if time.perf_counter() - began > _BUDGET_SECONDS:
            break
    return statistics.median(times)


def _graph_seconds(program: Program) -> float:
    """Median time of a replay of the captured run."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        program.step(None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        program.step(None)
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[5:])


def _each_on_cpu(program: Program, whole: float) -> tuple[list[str], list[float]]:
    """Median over a few recorded runs of each call's time: on a CPU a call is over when it returns."""
    runs = max(1, min(_RUNS, int(_BUDGET_SECONDS / max(whole, 1e-6))))
    traces = [walks.record(program, clock=wall_clock).trace for _ in range(runs)]
    names = [record.name for record in traces[0].records]
    columns = zip(*([record.seconds or 0.0 for record in trace.records] for trace in traces), strict=True)
    return names, [statistics.median(column) for column in columns]


def _each_on_gpu(program: Program) -> tuple[list[str], list[float]]:
    """Kernel time of each operation as the profiler saw it, summed over the kernels that the call launched."""
    from torch.profiler import ProfilerActivity, profile, record_function

    @contextmanager
    def around(index: int) -> Any:
        with record_function(f"rooflight#{index}"):
            yield

    runs: list[list[float]] = []
    names: list[str] = []
    for _ in range(3):
        with warnings.catch_warnings():
            # torch warns that a profile without a schedule is one cycle, which is what is wanted.
            warnings.filterwarnings("ignore", message=".*clears events at the end of each cycle.*")
            profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        with profiler:
            names = [record.name for record in walks.record(program, around=around).trace.records]
            torch.cuda.synchronize()
        seconds = [0.0] * len(names)
        for event in profiler.events() or ():
            on_host = event.device_type == torch.autograd.DeviceType.CPU
            if on_host and event.name.startswith("rooflight#"):
                index = int(event.name.split("#")[1])
                # A view that was free left its range under the number of the next priced operation.
                if index < len(seconds):
                    seconds[index] += event.device_time_total / 1e6
        runs.append(seconds)
    return names, [statistics.median(column) for column in zip(*runs, strict=True)]


def check_fits(config: ModelConfig, setting: Setting, device: str) -> None:
    """Raise InvalidValue where the wet run's predicted peak would not fit this machine's memory."""
    available = memory_available(device)
    needed = over_time(
        walks.dry(lambda: programs.decoder(config, replace(setting, text=None), "cpu", fold=True)), available
    ).total
    if needed > available:
        name = config.name or "the model"
        raise InvalidValue(
            f"--measure needs {needed / 2**30:.1f} GiB at its peak for {name}, and the {device} here has "
            f"{available / 2**30:.1f} GiB free; choose a smaller model, batch, context or dtype"
        )


def wet_decoder(config: ModelConfig, setting: Setting, device: str) -> Program:
    """The whole decoder with random weights on a device, ready to run."""
    model = programs.build_model(config, setting.dtype, device).initialize()
    return programs.decoder(config, setting, device, fold=False, model=model)


def wet_module(make: Factory, setting: Setting, device: str) -> Program:
    """A factory's module and arguments on a device."""
    module, args = make()
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), args)
    return any_module(module.to(device), moved, setting)
