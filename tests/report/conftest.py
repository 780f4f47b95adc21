"""Explanations of a Llama-3-8B-like model on an H200-like machine, worked out from shapes, for the report tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from rooflight.workload.explanation import (
    Advice,
    Division,
    Explanation,
    MachineFacts,
    Memory,
    Moment,
    Row,
    Totals,
)

LAYERS, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, HEAD, VOCABULARY = 32, 4096, 14336, 32, 8, 128, 128256
PARAMETERS, EMBEDDING = 8_030_261_248, 525_336_576
GIB = 2**30

H200 = MachineFacts(
    name="h200",
    title="NVIDIA H200 SXM",
    peaks={"bf16": 989e12, "fp16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    memory_bandwidth=4.8e12,
    memory_bytes=141e9,
    measured_peaks={"bf16": 731e12, "fp8": 1344e12},
    measured_bandwidth=4.31e12,
)


def _row(
    path: str,
    op: str,
    component: str,
    count: int,
    flops: float,
    bytes_read: float,
    bytes_written: float,
    *,
    phase: str = "forward",
    precision: str = "bf16",
    primitive: str = "matrix multiply",
    access: str = "sequential",
    movement: tuple[str, ...] = (),
    formula: str = "",
    provenance: str = "measured",
    efficiency: float = 0.8,
) -> Row:
    total = bytes_read + bytes_written
    compute, memory = flops / H200.peaks[precision], total / H200.memory_bandwidth
    roof, launch = max(compute, memory), 1.3e-6 * count
    expected = max(roof / efficiency, launch)
    bound = "launch" if launch >= roof / efficiency else "compute" if compute > memory else "memory"
    return Row(
        path=path,
        op=op,
        component=component,
        phase=phase,
        count=count,
        flops=flops,
        flops_by_precision={precision: flops},
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        traffic=total,
        intensity=flops / total if total else float("inf"),
        bound=bound,
        primitive=primitive,
        access=access,
        movement=list(movement),
        roof_seconds=roof,
        expected_seconds=expected,
        formula=formula,
        provenance=provenance,
    )


def _linear(name: str, component: str, tokens: int, n: int, k: int, formula: str) -> Row:
    moves = ("broadcast", "reduction")
    return _row(
        name, "linear", component, 1, 2.0 * tokens * n * k, 2.0 * (n * k + tokens * k), 2.0 * tokens * n,
        movement=moves, formula=formula, provenance="interpolated",
    )  # fmt: skip


def _layer(tokens: int, sequences: int, context: int) -> list[Row]:
    """The operations of one decoder layer for `tokens` new tokens whose sequences hold `context` tokens."""
    kv_bytes = 2.0 * sequences * context * KV_HEADS * HEAD * 2
    pairs = tokens * context * HEADS
    stream = 2.0 * tokens * WIDTH
    vector = {"precision": "fp32", "provenance": "datasheet", "efficiency": 0.6}
    return [
        _row("norm_1", "add_rms_norm", "norm and residual", 1, 5.0 * tokens * WIDTH, 2 * stream, 2 * stream,
             primitive="elementwise", movement=("reduction", "broadcast"), formula="5*B*T*d", **vector),
        _linear("attention.qkv", "QKV", tokens, (HEADS + 2 * KV_HEADS) * HEAD, WIDTH, "2*B*T*d*(H + 2*K)*h"),
        _row("attention.rope", "rope", "QKV", 1, 6.0 * tokens * WIDTH, stream, stream, primitive="elementwise",
             access="strided", formula="6*B*T*d", **vector),
        _row("attention.scores", "flash_attention", "scores", 1, 2.0 * pairs * HEAD, kv_bytes / 2, 0.0,
             primitive="dynamic computation", access="random", movement=("gather",), formula="2*B*T*C*H*h"),
        _row("attention.softmax", "flash_attention", "softmax", 1, 5.0 * pairs, 0.0, 0.0,
             primitive="reduction", movement=("reduction",), formula="5*B*T*C*H", **vector),
        _row("attention.context", "flash_attention", "context", 1, 2.0 * pairs * HEAD, kv_bytes / 2, stream,
             primitive="dynamic computation", access="random", movement=("gather",), formula="2*B*T*C*H*h"),
        _linear("attention.out", "output projection", tokens, WIDTH, WIDTH, "2*B*T*d**2"),
        _linear("mlp.gate_up", "feed-forward", tokens, 2 * FEED_FORWARD, WIDTH, "4*B*T*d*f"),
        _row("mlp.swiglu", "swiglu", "feed-forward", 1, 5.0 * tokens * FEED_FORWARD, 4.0 * tokens * FEED_FORWARD,
             2.0 * tokens * FEED_FORWARD, primitive="elementwise", formula="5*B*T*f", **vector),
        _linear("mlp.down", "feed-forward", tokens, WIDTH, FEED_FORWARD, "2*B*T*d*f"),
    ]  # fmt: skip


def _points(tokens: int, sequences: int, context: int) -> list[Row]:
    stream = 2.0 * tokens * WIDTH
    points = [
        _row("embedding", "embedding", "embedding", 1, 0.0, stream, stream, primitive="data movement",
             access="random", movement=("gather",), provenance="extrapolated")
    ]  # fmt: skip
    for layer in range(LAYERS):
        points += [replace(row, path=f"layers.{layer}.{row.path}") for row in _layer(tokens, sequences, context)]
    return [*points, _linear("head", "head", tokens, VOCABULARY, WIDTH, "2*B*T*d*V")]


def _merged(points: list[Row], key: Callable[[Row], tuple[str, ...]]) -> list[Row]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    rows = []
    for members in groups.values():
        largest = max(members, key=lambda row: row.expected_seconds)
        by_precision: dict[str, float] = {}
        for member in members:
            for name, flops in member.flops_by_precision.items():
                by_precision[name] = by_precision.get(name, 0.0) + flops
        flops = sum(row.flops for row in members)
        read, written = sum(row.bytes_read for row in members), sum(row.bytes_written for row in members)
        measured = [row.measured_seconds for row in members if row.measured_seconds is not None]
        rows.append(
            replace(
                largest,
                path=largest.component,
                count=len(members),
                flops=flops,
                flops_by_precision=by_precision,
                bytes_read=read,
                bytes_written=written,
                traffic=read + written,
                intensity=flops / (read + written) if read + written else float("inf"),
                roof_seconds=sum(row.roof_seconds for row in members),
                expected_seconds=sum(row.expected_seconds for row in members),
                measured_seconds=sum(measured) if measured else None,
            )
        )
    return rows


def _divided(points: list[Row], names: Callable[[Row], list[str]]) -> list[Division]:
    parts: dict[str, Division] = {}
    for point in points:
        for name in names(point):
            part = parts.setdefault(name, Division(name, 0.0, 0.0, 0.0))
            part.flops += point.flops
            part.bytes += point.bytes_read + point.bytes_written
            part.expected_seconds += point.expected_seconds
    return list(parts.values())


def _explained(phase: str, batch: int, context: int, points: list[Row], memory: Memory) -> Explanation:
    rows = _merged(points, lambda row: (row.component, row.phase))
    measured = [row.measured_seconds for row in points if row.measured_seconds is not None]
    flops = sum(row.flops for row in points)
    read, written = sum(row.bytes_read for row in points), sum(row.bytes_written for row in points)
    return Explanation(
        model="llama-3-8b",
        machine=replace(H200),
        phase=phase,
        batch=batch,
        context=context,
        dtype="bf16",
        settings={"attention": "flash", "recompute": "none", "kv_cache_dtype": "bf16"},
        params={"total": PARAMETERS, "active": PARAMETERS, "embedding": EMBEDDING},
        totals=Totals(
            flops, read, written, flops / (read + written), sum(row.roof_seconds for row in points),
            sum(row.expected_seconds for row in points), sum(measured) if measured else None,
        ),
        rows=rows,
        by="component",
        components=rows,
        points=points,
        primitives=_divided(points, lambda row: [row.primitive]),
        access=_divided(points, lambda row: [row.access]),
        movement=_divided(points, lambda row: row.movement),
        memory=memory,
        advice=[
            Advice("store the KV cache in fp8", 4.1e-4, 1.0 * GIB, "half of the context bytes are read from it"),
            Advice("quantize weights to int4", 2.3e-3, 11.2 * GIB, "weights are 88% of what a step reads"),
            Advice("full recompute", -1.5e-3, 22.0 * GIB, "keeps one activation a layer and computes the rest again"),
        ],
        provenance={"h200": "datasheet; ceilings measured on one H200", "efficiency": "curves of the catalog"},
        legend={"B": "batch", "T": "new tokens", "C": "context length", "d": "model width", "f": "feed-forward width",
                "H": "heads", "K": "KV heads", "h": "head width", "V": "vocabulary"},
        notes=["launch cost is that of a node of a CUDA graph"],
    )  # fmt: skip


def _decode() -> Explanation:
    batch, context = 32, 4096
    kv_cache = 2.0 * LAYERS * KV_HEADS * HEAD * 2 * batch * context
    weights = 2.0 * PARAMETERS
    activations = 0.4 * GIB
    memory = Memory(
        weights=weights,
        gradients=0,
        optimizer=0,
        activations_peak=activations,
        kv_cache=kv_cache,
        total=weights + kv_cache + activations,
        capacity=H200.memory_bytes,
        peak_label="head",
        at_peak=[("weights", weights), ("KV cache", kv_cache), ("logits", activations)],
    )
    return _explained("decode", batch, context, _points(batch, batch, context), memory)


def _train() -> Explanation:
    batch, context = 1, 4096
    forward = _points(context, batch, context)
    backward = [
        replace(
            row,
            phase="backward",
            op=f"{row.op}_backward",
            flops=2 * row.flops,
            flops_by_precision={name: 2 * flops for name, flops in row.flops_by_precision.items()},
            bytes_read=2 * row.bytes_read,
            bytes_written=2 * row.bytes_written,
            roof_seconds=2 * row.roof_seconds,
            expected_seconds=2.2 * row.expected_seconds,
        )
        for row in reversed(forward)
    ]
    step = _row("optimizer", "adamw", "optimizer", 1, 12.0 * PARAMETERS, 16.0 * PARAMETERS, 12.0 * PARAMETERS,
                phase="optimizer", precision="fp32", primitive="elementwise", formula="12*P")  # fmt: skip
    reduce = replace(
        _row("layers.0", "all_reduce", "gradient all-reduce", 1, 0.0, 2.0 * PARAMETERS, 2.0 * PARAMETERS,
             phase="communication", primitive="data movement", movement=("reduction",)),
        bound="communication", roof_seconds=4.0e-2, expected_seconds=5.5e-2,
    )  # fmt: skip
    points = [replace(row, measured_seconds=1.1 * row.expected_seconds) for row in [*forward, *backward, reduce, step]]
    weights, optimizer = 2.0 * PARAMETERS, 8.0 * PARAMETERS
    timeline = []
    for index in range(2 * LAYERS + 1):
        depth = min(index, 2 * LAYERS - index)
        grown = max(0, index - LAYERS) / LAYERS
        timeline.append(
            Moment(
                f"layers.{min(depth, LAYERS - 1)} {'forward' if index <= LAYERS else 'backward'}",
                {"weights": weights, "optimizer": optimizer, "gradients": grown * weights,
                 "activations": 1.2 * GIB * depth},
            )
        )  # fmt: skip
    total = max(sum(moment.bytes.values()) for moment in timeline)
    memory = Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        activations_peak=1.2 * GIB * LAYERS,
        kv_cache=0,
        total=total,
        capacity=100e9,
        measured_peak=1.02 * total,
        peak_label="layers.31.mlp backward",
        at_peak=[("optimizer", optimizer), ("weights", weights), ("activations of 32 layers", 1.2 * GIB * LAYERS)],
        timeline=timeline,
    )
    return _explained("train", batch, context, points, memory)


@pytest.fixture
def decode() -> Explanation:
    return _decode()


@pytest.fixture
def train() -> Explanation:
    return _train()


@pytest.fixture(params=["decode", "train"])
def explanation(request: pytest.FixtureRequest) -> Explanation:
    return {"decode": _decode, "train": _train}[request.param]()
