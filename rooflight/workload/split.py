"""Advice on several ranks: tensor parallelism, and what makes a model fit that one device cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rooflight.hardware.machine import Machine
from rooflight.workload.case import Case
from rooflight.workload.explanation import Advice
from rooflight.workload.program import DTYPES

_RANKS = tuple(2**power for power in range(1, 11))
_USABLE = 0.95  # of the capacity: allocators and the runtime take the rest


def _collective(machine: Machine, kind: str, ranks: int, message: float, on_link: float) -> float:
    """Seconds of one collective: as measured between such ranks, and never below the ring's own time.

    Ring: 2(n−1)·α + bytes/W for an all-reduce, (n−1)·α + bytes/W for a gather or scatter. Across nodes NCCL runs one
    ring through each rank's port, so W is the ports of a node together, or the link inside it where that is less.
    """
    link, inside = machine.link_for(ranks), machine.link_for(2)
    rounds = (2 if kind == "all_reduce" else 1) * (ranks - 1)
    if ranks > inside.domain and kind != "send":
        together = min(inside.bandwidth_bytes_per_s, link.bandwidth_bytes_per_s * inside.domain)
        return rounds * link.latency_seconds + on_link / together
    ring = rounds * link.latency_seconds + on_link / link.bandwidth_bytes_per_s
    size = (ranks, int(message))
    found = machine.estimate(kind, "any", size, {}, 0, "data movement", link_bytes=on_link, link=link.name)
    return max(found.seconds, ring)


def _joins(machine: Machine, ranks: int) -> bool:
    return any(link.domain >= ranks for link in machine.links.values())


def _activation_bytes(case: Case) -> int:
    """Bytes of one hidden state of the step: what ranks hand to one another."""
    query = 1 if case.setting.phase == "decode" else case.setting.context
    return case.setting.batch * query * case.config.width * DTYPES[case.setting.dtype].itemsize


def tensor(case: Case) -> Iterator[Advice]:
    """Tensor parallelism over 2 and 8 ranks: the work of one rank, walked, plus its all-reduces."""
    config, machine = case.config, case.machine
    for ranks in (2, 8):
        divides = all(n % ranks == 0 for n in (config.heads, config.ffn_width, config.vocab_size))
        if not _joins(machine, ranks) or not divides or config.latent is not None or config.moe is not None:
            continue
        part = replace(
            config,
            heads=config.heads // ranks,
            kv_heads=max(1, config.kv_heads // ranks),
            ffn_width=config.ffn_width // ranks,
            vocab_size=config.vocab_size // ranks,
            attention_scale=config.scale,
        )
        if part.heads % part.kv_heads:
            continue
        seconds, size = case.variant(part, case.setting)
        message = _activation_bytes(case)
        # Megatron (1909.08053): two all-reduces a layer forward, two more backward.
        reduces = len(config.layers) * (4 if case.setting.phase == "train" else 2)
        each = _collective(machine, "all_reduce", ranks, message, 2 * (ranks - 1) / ranks * message)
        yield Advice(
            f"split over {ranks} ranks (tensor parallel, {machine.link_for(ranks).name})",
            case.timed.expected_seconds - seconds - reduces * each,
            case.memory.total - size,
            f"each rank does 1/{ranks} of the products and pays {reduces} all-reduces of {message:,} bytes, "
            f"{reduces * each * 1e3:.3g} ms altogether, none of them hidden",
        )


def until_it_fits(case: Case) -> Iterator[Advice]:
    """The fewest ranks over which the model fits: sharded states in training, a pipeline of layers in inference."""
    memory = case.memory
    training = case.setting.phase == "train"
    held = memory.weights + memory.gradients + memory.optimizer + memory.kv_cache
    room = _USABLE * memory.capacity - (memory.total - min(held, memory.total))
    most = len(case.config.layers) if not training else _RANKS[-1]
    ranks = next((n for n in _RANKS if n <= most and held / n <= room and _joins(case.machine, n)), None)
    if ranks is None:
        return
    link = case.machine.link_for(ranks)
    freed = held * (1 - 1 / ranks)
    if training:
        # ZeRO-3 (1910.02054): weights gathered in the forward and again in the backward, gradients scattered.
        on_link = memory.weights * (ranks - 1) / ranks
        kinds = ("all_gather", "all_gather", "reduce_scatter")
        exposed = sum(_collective(case.machine, kind, ranks, memory.weights, on_link) for kind in kinds)
        yield Advice(
            f"shard weights, gradients and optimizer over {ranks} ranks (ZeRO-3 or FSDP, {link.name})",
            -exposed,
            freed,
            f"then it fits; each rank keeps 1/{ranks} and moves 3 times the weights a step, "
            f"{exposed:.3g} s if nothing is hidden behind compute",
        )
        return
    message = _activation_bytes(case)
    exposed = (ranks - 1) * _collective(case.machine, "send", ranks, message, message)
    yield Advice(
        f"split the layers over {ranks} ranks (pipeline, {link.name})",
        -exposed,
        freed,
        f"then it fits; a token passes all ranks in turn, so one step gains nothing and pays {ranks - 1} sends of "
        f"{message:,} bytes; several batches in flight keep all ranks busy",
    )
