"""Advice: for each change that could win time or memory, walk the changed program and say what it predicts.

Nothing here is a rule of thumb: every gain is the difference between two predictions of this machine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from rooflight.hardware.machine import Machine
from rooflight.ops.cost import ALIGNMENT, Primitive
from rooflight.workload import split
from rooflight.workload.case import Case
from rooflight.workload.explanation import Advice
from rooflight.workload.record import Record
from rooflight.workload.roofline import Timed, time_walk

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
_PADDED = 64
_WORTH = 0.005  # of the step's time or memory: less is not worth a line


def advise(case: Case) -> list[Advice]:
    """Changes worth a line, the most time first; one that only saves memory is worth it when memory is short."""
    found = []
    for advice in _candidates(case):
        saves_time = advice.saves_seconds > _WORTH * case.timed.expected_seconds
        saves_memory = advice.saves_bytes > _WORTH * case.memory.total
        tight = case.memory.total > 0.8 * case.memory.capacity
        makes_fit = not case.memory.fits and case.memory.total - advice.saves_bytes <= case.memory.capacity
        if saves_time or makes_fit or (saves_memory and (tight or advice.saves_seconds >= 0)):
            found.append(advice)
    return sorted(found, key=lambda advice: (-advice.saves_seconds, -advice.saves_bytes))


def _candidates(case: Case) -> Iterator[Advice]:
    config, setting = case.config, case.setting
    if setting.attention == "naive":
        yield case.gain(
            "flash attention (--attention flash)",
            "the scores are never written to memory, nor the keys that no query sees multiplied",
            config,
            replace(setting, attention="flash"),
        )
    if config.vocab_size % ALIGNMENT:
        padded = -(-config.vocab_size // _PADDED) * _PADDED
        yield case.gain(
            f"pad the vocabulary to {padded:,}",
            f"{config.vocab_size:,} is no multiple of {ALIGNMENT}, and matrix products over it run on slower kernels",
            replace(config, vocab_size=padded),
            setting,
        )
    if setting.phase != "train":
        yield from _inference(case)
    else:
        yield from _training(case)
    yield from fusion(case.timed, case.machine)
    yield from split.tensor(case)
    if not case.memory.fits:
        yield from split.until_it_fits(case)


def _inference(case: Case) -> Iterator[Advice]:
    config, setting = case.config, case.setting
    if setting.phase == "decode":
        larger = replace(setting, batch=setting.batch * 8)
        seconds, size = case.variant(config, larger)
        yield Advice(
            f"larger batch (--batch {larger.batch})",
            case.timed.expected_seconds - seconds / 8,
            case.memory.total - size,
            f"the weights are read once for {larger.batch} sequences: time a token falls by what is saved here, "
            f"while a step takes {seconds * 1e3:.3g} ms",
        )
    for name, ratio in (("FP8 or INT8", 1), ("INT4", 0.5)):
        if _BYTES[setting.dtype] > ratio:
            yield _quantized(case, name, ratio)
    kv = setting.kv_dtype or setting.dtype
    if _BYTES[kv] > 1 and case.memory.kv_cache:
        yield case.gain(
            "FP8 KV cache (--kv-cache-dtype fp8)",
            f"each cached key and value takes 1 byte instead of {_BYTES[kv]}",
            config,
            replace(setting, kv_dtype="fp8"),
        )
    if config.latent is None and config.kv_heads == config.heads and config.heads % 8 == 0:
        grouped = replace(config, kv_heads=config.heads // 8)
        yield case.gain(
            f"grouped-query attention with {grouped.kv_heads} key heads (needs training)",
            "eight query heads share each key head, so the cache and its reads shrink eightfold",
            grouped,
            setting,
        )


def _is_weight_product(record: Record) -> bool:
    return record.name in (
        "linear",
        "norm_linear",
        "add_linear",
        "grouped_linear",
        "grouped_gated_linear",
        "head_linear",
    )


def _weight_bytes(record: Record) -> float:
    """Bytes of weights that a linear reads: of one matrix, or what it reads beyond its activations."""
    cost = record.cost
    m, n, k = (float(n) for n in cost.size[:3])
    itemsize = next((_BYTES[name] for name in cost.flops if name in _BYTES and name == cost.precision), 2)
    if record.name != "head_linear" and len(cost.size) == 3:
        return n * k * itemsize
    return max(float(cost.bytes_read) - m * k * itemsize, 0.0)


def _quantized(case: Case, name: str, bytes_per_weight: float) -> Advice:
    """The same walk with every linear's weights at fewer bytes; arithmetic stays as it is (weight-only)."""
    ratio = bytes_per_weight / _BYTES[case.setting.dtype]
    walk, counts = case.timed.walk, case.timed.walk.counts()
    records, saved = [], 0.0
    for record, count in zip(walk.trace.records, counts, strict=True):
        if not _is_weight_product(record):
            records.append(record)
            continue
        less = _weight_bytes(record) * (1 - ratio)
        saved += less * count
        records.append(replace(record, cost=replace(record.cost, bytes_read=float(record.cost.bytes_read) - less)))
    changed = replace(walk, trace=replace(walk.trace, records=records))
    seconds = time_walk(changed, case.machine, graph=case.graph).expected_seconds
    # Dequantising inside the product is hidden as long as memory is the bound, which is where this gains at all.
    return Advice(
        f"{name} weights",
        case.timed.expected_seconds - seconds,
        saved if case.config.moe is None else saved * _expert_share(case),
        f"a linear reads {bytes_per_weight:g} byte a weight instead of {_BYTES[case.setting.dtype]}; "
        "weight-only, the arithmetic stays as it is",
    )


def _expert_share(case: Case) -> float:
    """Weights stored over weights read in a step: a mixture of experts stores more than a step touches."""
    read = sum(
        _weight_bytes(r) * n
        for r, n in zip(case.timed.walk.trace.records, case.timed.walk.counts(), strict=True)
        if _is_weight_product(r)
    )
    return case.memory.weights / read if read else 1.0


def _training(case: Case) -> Iterator[Advice]:
    config, setting = case.config, case.setting
    if setting.recompute == "none":
        for kind, why in (
            ("selective", "cheap operations are run again in the backward instead of being kept"),
            ("full", "only each layer's input is kept; the forward is run again in the backward"),
        ):
            yield case.gain(
                f"recompute activations (--recompute {kind})", why, config, replace(setting, recompute=kind)
            )
    elif setting.recompute == "full":
        yield case.gain(
            "recompute less (--recompute selective)",
            "matrix products and attention are kept instead of run twice; it needs the memory",
            config,
            replace(setting, recompute="selective"),
        )
    if setting.optimizer in ("adamw", "adamw-master") and setting.dtype != "fp32":
        yield case.gain(
            "optimizer states in bf16 (--optimizer adamw-bf16)",
            "4 bytes of moments a parameter instead of 8; with stochastic rounding or care for small updates",
            config,
            replace(setting, optimizer="adamw-bf16"),
        )


def fusion(timed: Timed, machine: Machine) -> Iterator[Advice]:
    """Runs of elementwise work and norms that pass a tensor on which nobody else reads, and linears over one input."""
    saved_seconds, saved_bytes, chains = 0.0, 0.0, 0
    records, counts = timed.walk.trace.records, timed.walk.counts()
    for chain in _chains(records):
        once = sum(timed.priced[i].kernel_seconds for i in chain)
        between = 0.0
        for index, following in itertools.pairwise(chain):
            passed = set(records[index].outputs) & set(records[following].inputs)
            between += sum(float(timed.walk.trace.sizes[storage]) for storage in passed)
        moved = sum(float(records[i].cost.total_bytes) for i in chain)
        # Each tensor between two of them is written once and read once; fused, neither happens.
        fused = once * max(moved - 2 * between, 0.0) / moved if moved else once
        saved_seconds += (once - fused) * counts[chain[0]]
        saved_bytes += 2 * between * counts[chain[0]]
        chains += counts[chain[0]]
    if chains:
        yield Advice(
            f"fuse {chains:,} chains of norms and elementwise operations",
            saved_seconds,
            0.0,
            f"{saved_bytes / 2**20:,.1f} MiB that one operation writes and only the next one reads stay on the chip",
        )
    yield from _shared_inputs(timed, machine)


def _chains(records: list[Record]) -> Iterator[list[int]]:
    """Longest runs of neighbours, each of which reads what the one before made and nobody else reads."""
    light = (Primitive.ELEMENTWISE, Primitive.REDUCTION)
    readers: dict[int, int] = {}
    for record in records:
        for storage in set(record.inputs):
            readers[storage] = readers.get(storage, 0) + 1
    chain: list[int] = []
    for index, record in enumerate(records):
        if chain:
            passed = set(records[chain[-1]].outputs) & set(record.inputs)
            alone = any(readers.get(storage, 0) == 1 for storage in passed)
            if alone and record.cost.primitive in light and record.phase != "optimizer":
                chain.append(index)
                continue
            if len(chain) > 1:
                yield chain
        light_here = record.cost.primitive in light and record.phase != "optimizer"
        chain = [index] if light_here else []
    if len(chain) > 1:
        yield chain


def _shared_inputs(timed: Timed, machine: Machine) -> Iterator[Advice]:
    """Linears that read one and the same input, q, k and v projections for example, as one product."""
    records, counts = timed.walk.trace.records, timed.walk.counts()
    groups: dict[tuple[int, int, int], list[int]] = {}
    written: Counter[int] = Counter()  # times that a storage was: products before and after share no input
    for index, record in enumerate(records):
        cost = record.cost
        is_product = cost.primitive == Primitive.MATMUL and len(cost.size) == 3 and record.phase == "forward"
        for storage in record.inputs if is_product else ():
            # Only what the run made: a weight that several products share is tied, not a common input. What a product
            # is added to is not multiplied.
            if storage not in timed.walk.trace.kinds and storage not in record.outputs:
                groups.setdefault((storage, written[storage], int(cost.size[2])), []).append(index)
        written.update(record.outputs)
    saved, found = 0.0, 0
    for members in groups.values():
        if len(members) < 2:
            continue
        first = records[members[0]].cost
        m, _, k = (int(n) for n in first.size)
        n = sum(int(records[i].cost.size[1]) for i in members)
        read_once = _BYTES.get(first.precision or "bf16", 2) * m * k * (len(members) - 1)
        merged_bytes = sum(float(records[i].cost.total_bytes) for i in members) - read_once
        flops = {first.precision or "bf16": 2.0 * m * n * k}
        merged = machine.estimate("linear", first.precision, (m, n, k), flops, merged_bytes, str(first.primitive))
        apart = sum(timed.priced[i].kernel_seconds + timed.priced[i].host_seconds for i in members)
        gain = apart - merged.seconds - timed.priced[members[0]].host_seconds
        if gain > 0:
            saved += gain * counts[members[0]]
            found += counts[members[0]]
    if found:
        yield Advice(
            f"merge {found:,} groups of linears over one input (fused QKV, gate and up)",
            saved,
            0.0,
            "the input is read once, and one wider product fills the machine better than several narrow ones",
        )
