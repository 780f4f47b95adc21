"""Collective bandwidth between the ranks of this machine, measured in one process a rank.

Shape suffixes: E elements of a rank's buffer, R ranks.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn as start_processes

from rooflight.hardware.figures import ANY, Sample

Run = Callable[[], object]
MESSAGES = (2**16, 2**20, 2**24, 2**28)
ROUNDS = 5


def link_bytes(collective: str, message: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring: all-reduce 2·(R−1)/R·V, gather and scatter (R−1)/R·V, send V.

    V is the whole message: the reduced buffer, or all ranks' shards together. Source: NCCL's bus bandwidth.
    """
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "send": 1.0}[collective] * message


def _calls(buffer_E: Tensor, shard_E: Tensor, rank: int) -> dict[str, Run]:
    def send() -> None:
        if rank == 0:
            dist.send(buffer_E, 1)
        elif rank == 1:
            dist.recv(buffer_E, 0)

    return {
        "all_reduce": lambda: dist.all_reduce(buffer_E),
        "all_gather": lambda: dist.all_gather_into_tensor(buffer_E, shard_E),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(shard_E, buffer_E),
        "send": send,
    }


def _seconds(call: Run, device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def measure(device: torch.device, rank: int, ranks: int, messages: tuple[int, ...] = MESSAGES) -> list[Sample]:
    """Samples of every collective by message size, from inside an initialised process group; all ranks must call it.

    The same number of repeats on every rank, or they would wait for one another for ever.
    """
    samples: list[Sample] = []
    for message in messages:
        repeats = max(2, min(20, 2**26 // message))
        elements = message // 4 // ranks * ranks
        # Zeros, for sums of random data repeated many times overflow.
        buffer_E = torch.zeros(elements, device=device)
        shard_E = torch.zeros(elements // ranks, device=device)
        for name, call in _calls(buffer_E, shard_E, rank).items():
            for _ in range(2):
                call()
            seconds = statistics.median(_seconds(call, device, repeats) for _ in range(ROUNDS))
            sent = link_bytes(name, 4.0 * elements, ranks)
            samples.append(Sample(name, ANY, (ranks, 4 * elements), {}, 0.0, seconds, None, sent))
    return samples


def _rank_main(rank: int, ranks: int, device_type: str, folder: str, messages: tuple[int, ...]) -> None:
    # NVLink multicast can hang hosts that share GPUs between guests; the ring that we price does not use it.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    meeting_place = (Path(folder) / "store").as_uri()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting_place, rank=rank, world_size=ranks)
    try:
        samples = measure(device, rank, ranks, messages)
        if rank == 0:
            rows = [[s.curve, s.size, s.seconds, s.link_bytes] for s in samples]
            (Path(folder) / "samples.json").write_text(json.dumps(rows), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def spawn(device_type: str, ranks: int, messages: tuple[int, ...] = MESSAGES) -> list[Sample]:
    """Start one process a rank on this host (NCCL on CUDA, gloo on CPU) and return what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank_main, args=(ranks, device_type, folder, messages), nprocs=ranks, join=True)
        rows = json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8"))
    return [Sample(name, ANY, tuple(size), {}, 0.0, seconds, None, sent) for name, size, seconds, sent in rows]
