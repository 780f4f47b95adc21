"""Group a timed walk into report rows: by component, layer, operation, primitive, or one row for each call site."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.hardware.machine import Machine
from rooflight.ops.cost import Access, Movement, Primitive
from rooflight.workload.explanation import Division, Row
from rooflight.workload.record import Record
from rooflight.workload.roofline import Timed, least_sure, weights_of_parts
from rooflight.workload.walk import general_path

_FIRST_INDEX = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")
GROUPINGS = ("component", "layer", "op", "primitive")
COMPONENTS = (
    "embedding",
    "QKV",
    "rotary",
    "KV cache write",
    "KV gather",
    "scores",
    "softmax",
    "context",
    "output projection",
    "routing",
    "feed-forward",
    "norm and residual",
    "head",
    "loss",
    "sampling",
    "optimizer",
    "communication",
)
# Operations that are a component of their own wherever they stand.
_BY_OPERATION = {
    "rms_norm": "norm and residual",
    "add_rms_norm": "norm and residual",
    "rms_norm_backward": "norm and residual",
    "layer_norm": "norm and residual",
    "add_layer_norm": "norm and residual",
    "layer_norm_backward": "norm and residual",
    "rotary": "rotary",
    "rotary_qkv": "rotary",
    "rotary_qkv_backward": "rotary",
    "rotary_table": "rotary",
    "attention_schedule": "scores",
    "write_kv": "KV cache write",
    "gather_kv": "KV gather",
    "attention_scores": "scores",
    "attention_scores_backward": "scores",
    "attention_softmax": "softmax",
    "attention_softmax_backward": "softmax",
    "attention_context": "context",
    "attention_context_backward": "context",
    "route": "routing",
    "route_backward": "routing",
    "permute": "routing",
    "permute_backward": "routing",
    "unpermute": "routing",
    "unpermute_backward": "routing",
    "head_linear": "QKV",
    "greedy": "sampling",
    "sample": "sampling",
}

# What runs outside of every module: the gradient that a backward starts from, the last tokens that go to the head.
_OUTSIDE = {"aten.ones_like": "loss", "aten.index": "head"}


def component_of(record: Record) -> str:
    """The report component of a record: the optimizer's and the links' by phase, else by operation, else by module."""
    if record.phase in ("optimizer", "communication"):
        return record.phase
    if record.name in _BY_OPERATION:
        return _BY_OPERATION[record.name]
    if record.component:
        return record.component
    return _top_module(record.path) or _OUTSIDE.get(record.name, "other")


def _top_module(path: str) -> str:
    """For a module of somebody else's: its outermost named part, the layer's part for a decoder."""
    parts = general_path(path).split(".")
    return ".".join(parts[:3] if parts[0] == "layers" else parts[:1])


def _block(path: str) -> str:
    """A path up to its first index, which is what repeats: model.layers.3; without one its outermost part."""
    indexed = _FIRST_INDEX.match(path)
    return indexed.group() if indexed else path.split(".")[0]


@dataclass(slots=True)
class Piece:
    """A record, or one part of a fused record, with all of its calls in the whole run added up."""

    record: Record
    component: str
    count: int
    flops: dict[str, Any]
    bytes_read: Any
    bytes_written: Any
    traffic: Any
    roof_seconds: float
    expected_seconds: float
    measured_seconds: float | None
    bounds: dict[str, float]
    provenance: str
    layer: int | None


def pieces(timed: Timed, machine: Machine, measured: list[float] | None, *, by_layer: bool = False) -> list[Piece]:
    """Every record with its calls added up, fused ones divided into their parts.

    measured: seconds of each of the whole run's steps when it was also run wet, in the same order.
    """
    sums: dict[tuple[int, int | None], list[Any]] = {}
    for index, step in enumerate(timed.walk.steps):
        key = (step.record, step.layer if by_layer else None)
        entry = sums.setdefault(key, [0, 0.0, 0.0, {}])
        entry[0] += 1
        entry[1] += timed.seconds[index]
        entry[2] += measured[index] if measured is not None else 0.0
        entry[3][timed.bounds[index]] = entry[3].get(timed.bounds[index], 0.0) + timed.seconds[index]
    found = []
    for (index, layer), (count, seconds, wet, bounds) in sums.items():
        record, priced = timed.walk.trace.records[index], timed.priced[index]
        cost = record.cost
        traffic = cost.traffic if cost.traffic is not None else cost.total_bytes
        common = {"count": count, "provenance": priced.provenance, "layer": layer}
        if not cost.parts:
            found.append(
                Piece(
                    record,
                    component_of(record),
                    flops={name: n * count for name, n in cost.flops.items()},
                    bytes_read=cost.bytes_read * count,
                    bytes_written=cost.bytes_written * count,
                    traffic=traffic * count,
                    roof_seconds=priced.roof_seconds * count,
                    expected_seconds=seconds,
                    measured_seconds=wet if measured is not None else None,
                    bounds=bounds,
                    **common,
                )
            )
            continue
        for part, share in weights_of_parts(record, machine):
            found.append(
                Piece(
                    record,
                    part.component or component_of(record),
                    flops={name: n * count for name, n in part.flops.items()},
                    bytes_read=part.bytes_read * count,
                    bytes_written=part.bytes_written * count,
                    traffic=traffic * count * share,
                    roof_seconds=priced.roof_seconds * count * share,
                    expected_seconds=seconds * share,
                    measured_seconds=wet * share if measured is not None else None,
                    bounds={name: value * share for name, value in bounds.items()},
                    **common,
                )
            )
    return found


def _ordered(names: Iterable[str], order: tuple[str, ...]) -> list[str]:
    """Names that `order` knows, in its order, then the others as they came."""
    found = list(names)
    return [name for name in order if name in found] + [name for name in found if name not in order]


def _join(values: Iterable[str], limit: int = 3) -> str:
    unique = list(dict.fromkeys(value for value in values if value))
    return ", ".join(unique[:limit]) + (f" +{len(unique) - limit}" if len(unique) > limit else "")


def _dominant(group: list[Piece], name: Callable[[Piece], str]) -> str:
    weight: dict[str, float] = {}
    for piece in group:
        weight[name(piece)] = weight.get(name(piece), 0.0) + piece.expected_seconds
    return max(weight, key=lambda key: weight[key])


def make_row(path: str, op: str, component: str, group: list[Piece]) -> Row:
    """One row from pieces that belong together; bound, primitive and access are those that most of its time has."""
    flops: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for piece in group:
        for name, count in piece.flops.items():
            flops[name] = flops.get(name, 0) + int(count)
        for name, seconds in piece.bounds.items():
            bounds[name] = bounds.get(name, 0.0) + seconds
    read = sum(int(piece.bytes_read) for piece in group)
    written = sum(int(piece.bytes_written) for piece in group)
    total_flops = sum(flops.values())
    wet = [piece.measured_seconds for piece in group if piece.measured_seconds is not None]
    moves = dict.fromkeys(str(move) for piece in group for move in piece.record.cost.movement)
    return Row(
        path=path,
        op=op,
        component=component,
        phase=_join((piece.record.phase for piece in group), limit=5),
        # The parts of one record are one call.
        count=sum({(id(piece.record), piece.layer): piece.count for piece in group}.values()),
        flops=total_flops,
        flops_by_precision=flops,
        bytes_read=read,
        bytes_written=written,
        traffic=sum(float(piece.traffic) for piece in group),
        intensity=total_flops / (read + written) if read + written else 0.0,
        bound=max(bounds, key=lambda key: bounds[key]),
        primitive=_dominant(group, lambda piece: str(piece.record.cost.primitive)),
        access=_dominant(group, lambda piece: str(piece.record.cost.access)),
        movement=list(moves),
        roof_seconds=sum(piece.roof_seconds for piece in group),
        expected_seconds=sum(piece.expected_seconds for piece in group),
        measured_seconds=sum(wet) if wet else None,
        provenance=least_sure({piece.provenance for piece in group if piece.expected_seconds > 0}),
    )


def _group(all_pieces: list[Piece], key: Callable[[Piece], Any]) -> dict[Any, list[Piece]]:
    groups: dict[Any, list[Piece]] = {}
    for piece in all_pieces:
        groups.setdefault(key(piece), []).append(piece)
    return groups


def component_rows(all_pieces: list[Piece]) -> list[Row]:
    """Rows by component, in the order of a decoder; a module of somebody else's in the order in which it ran."""
    groups = _group(all_pieces, lambda piece: piece.component)
    order = COMPONENTS if set(groups) <= set(COMPONENTS) else ()
    return [
        make_row(
            _join(general_path(piece.record.path) for piece in groups[name]),
            _join(piece.record.name for piece in groups[name]),
            name,
            groups[name],
        )
        for name in _ordered(groups, order)
    ]


def site_rows(all_pieces: list[Piece]) -> list[Row]:
    """One row for each operation at each place in the module tree and phase, its layers together."""
    groups = _group(
        all_pieces,
        lambda piece: (general_path(piece.record.path), piece.record.name, piece.record.phase, piece.component),
    )
    return [make_row(path, op, component, group) for (path, op, _, component), group in groups.items()]


def rows_by(grouping: str, all_pieces: list[Piece]) -> list[Row]:
    """Rows by component, layer (the pieces must carry layers), op or primitive."""
    if grouping == "component":
        return component_rows(all_pieces)
    if grouping == "op":
        groups = _group(all_pieces, lambda piece: piece.record.name)
        return [
            make_row(_join(general_path(p.record.path) for p in group), op, _join(p.component for p in group), group)
            for op, group in groups.items()
        ]
    if grouping == "primitive":
        groups = _group(all_pieces, lambda piece: str(piece.record.cost.primitive))
        order = tuple(str(primitive) for primitive in Primitive)
        return [
            make_row(name, _join(p.record.name for p in groups[name]), name, groups[name])
            for name in _ordered(groups, order)
        ]
    if grouping == "layer":
        groups = _group(
            all_pieces,
            lambda p: f"layers.{p.layer}" if p.layer is not None else _block(p.record.path) or p.component,
        )
        return [make_row(name, _join(p.record.name for p in group), name, group) for name, group in groups.items()]
    raise InvalidValue(f"--by {grouping!r} is unknown; use one of {', '.join(GROUPINGS)}")


def divisions(all_pieces: list[Piece]) -> tuple[list[Division], list[Division], list[Division]]:
    """The work by primitive, access pattern and movement; bytes count under each movement that an operation has."""

    def divide(names: Callable[[Piece], Iterable[str]], order: Iterable[Any]) -> list[Division]:
        found: dict[str, Division] = {}
        for piece in all_pieces:
            for name in names(piece):
                entry = found.setdefault(name, Division(name, 0.0, 0.0, 0.0))
                entry.flops += sum(int(n) for n in piece.flops.values())
                entry.bytes += int(piece.bytes_read) + int(piece.bytes_written)
                entry.expected_seconds += piece.expected_seconds
        return [found[str(name)] for name in order if str(name) in found]

    return (
        divide(lambda piece: (str(piece.record.cost.primitive),), Primitive),
        divide(lambda piece: (str(piece.record.cost.access),), Access),
        divide(lambda piece: (str(move) for move in piece.record.cost.movement), Movement),
    )
