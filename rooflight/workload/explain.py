"""`explain`: walk a model dry, time it on a machine, group it into rows, and say what would win the headroom back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rooflight.errors import InvalidValue, RooflightError
from rooflight.hardware.machine import Machine
from rooflight.models.config import ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.ops.cost import PRECISIONS
from rooflight.workload import advice as advices
from rooflight.workload import formulas, program, rows, walk
from rooflight.workload.align import align
from rooflight.workload.case import Case
from rooflight.workload.explanation import Explanation, MachineFacts, Row, Totals
from rooflight.workload.memory import over_time
from rooflight.workload.parts import name_parts
from rooflight.workload.program import Program, Setting
from rooflight.workload.record import tensors_in
from rooflight.workload.roofline import PROVENANCES, Timed, time_walk

_NOT_SHOWN = ("phase", "batch", "context", "dtype", "text", "recipe")
_OF_TRAINING = ("recompute", "optimizer")
_OF_MODULES = (("launch",), ("launch", "optimizer"))  # settings that reach a module that is not ours: dry, and training


@dataclass(frozen=True, slots=True)
class Measured:
    """What a wet run showed: its operations in order with their seconds, the whole run's seconds, peak bytes."""

    names: list[str]
    seconds: list[float]
    total_seconds: float
    peak_bytes: float | None = None
    notes: list[str] = field(default_factory=list)


def _uses_graph(machine: Machine, setting: Setting) -> bool:
    """Decode steps are replayed as CUDA graphs, as every engine does; the rest is launched eagerly."""
    return machine.kind != "cpu" and setting.phase == "decode"


def machine_facts(machine: Machine) -> MachineFacts:
    """What reports say of a machine: peaks, bandwidth and ceilings."""
    matmul = {
        name.split(".", 1)[1]: figure.value for name, figure in machine.measured.items() if name.startswith("matmul.")
    }
    copy = machine.measured.get("copy")
    return MachineFacts(
        name=machine.name,
        title=machine.title,
        peaks={name: figure.value for name, figure in machine.peaks.items()},
        memory_bandwidth=machine.memory_bandwidth.value,
        memory_bytes=machine.memory_bytes.value,
        measured_peaks=matmul,
        measured_bandwidth=copy.value if copy else None,
    )


def check_setting(config: ModelConfig, setting: Setting) -> None:
    """Raise InvalidValue where the model cannot run the setting."""
    if setting.context > config.max_context:
        raise InvalidValue(
            f"--context {setting.context} is beyond the model's {config.max_context} positions; "
            f"use 1 to {config.max_context}"
        )


def explain_decoder(
    name: str,
    config: ModelConfig,
    machine: Machine,
    setting: Setting,
    *,
    by: str = "component",
    measured: Measured | None = None,
) -> Explanation:
    """The explanation of one decoder, phase and machine; with `measured` beside what a wet run showed."""
    check_setting(config, setting)

    def predict(changed: ModelConfig, at: Setting) -> walk.Walk:
        return walk.dry(lambda: program.decoder(changed, replace(at, text=None), "cpu", fold=True))

    timed = time_walk(predict(config, setting), machine, graph=_uses_graph(machine, setting))
    result = _assemble(name, machine, setting, timed, by, measured)
    result.params = parameter_counts(config)
    result.advice = advices.advise(Case(config, setting, machine, timed.graph, timed, result.memory, predict))
    _write_formulas(result, config, setting)
    return result


def explain_module(
    name: str,
    factory: Callable[[], Program],
    machine: Machine,
    setting: Setting,
    *,
    by: str = "component",
    measured: Measured | None = None,
) -> Explanation:
    """The explanation of any torch module on its example arguments; `factory` makes its program on fake tensors."""
    programs: list[Program] = []

    def build() -> Program:
        programs.append(factory())
        return programs[-1]

    walked = walk.dry(build)
    module, example = programs[-1].module, programs[-1].example
    name_parts(walked.trace.records, module)
    timed = time_walk(walked, machine, graph=False)
    if measured is not None:
        names = [walked.trace.records[step.record].name for step in walked.steps]
        seconds, told = align(names, measured.names, measured.seconds)
        if told:
            measured = replace(measured, names=names, seconds=seconds, notes=[*measured.notes, *told])
    setting = replace(setting, dtype=_dtype_of(module, example))
    result = _assemble(name, machine, setting, timed, by, measured)
    result.params = _parameters(module)
    result.settings = {"arguments": _written(example)} | {
        key: value for key, value in result.settings.items() if key in _OF_MODULES[setting.phase == "train"]
    }
    result.advice = [
        advice for advice in advices.fusion(timed, machine) if advice.saves_seconds > 0.005 * timed.expected_seconds
    ]
    return result


def _parameters(module: nn.Module) -> dict[str, int]:
    """Parameters of any module, shared ones once; all count as active, for which are used depends on the data."""
    total = sum(p.numel() for p in module.parameters())
    tables = {id(m.weight): m.weight for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return {"total": total, "active": total, "embedding": sum(w.numel() for w in tables.values())}


def _dtype_of(module: nn.Module, example: Any) -> str:
    """What most of a module's parameters are stored in, else the first of its arguments."""
    sizes: dict[torch.dtype, int] = {}
    for p in module.parameters():
        sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    most = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else next((t.dtype for t in tensors_in(example)), None)
    return PRECISIONS.get(most, str(most).removeprefix("torch.")) if most is not None else ""


def _written(example: Any) -> str:
    """Example arguments by type and shape: int64 [2, 64], float32 [2, 8]."""
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors_in(example)) or "none"


def _assemble(
    name: str, machine: Machine, setting: Setting, timed: Timed, by: str, wet: Measured | None
) -> Explanation:
    seconds, notes = _match(timed, wet) if wet is not None else (None, [])
    all_pieces = rows.pieces(timed, machine, seconds)
    grouped = rows.pieces(timed, machine, seconds, by_layer=True) if by == "layer" else all_pieces
    points = rows.site_rows(all_pieces)
    flops = sum(row.flops for row in points)
    read, written = sum(row.bytes_read for row in points), sum(row.bytes_written for row in points)
    if wet is not None:
        notes += _residuals(points)
    memory = over_time(timed.walk, machine.memory_bytes.value)
    memory.measured_peak = wet.peak_bytes if wet is not None else None
    primitives, access, movement = rows.divisions(all_pieces)
    hidden = _NOT_SHOWN if setting.phase == "train" else (*_NOT_SHOWN, *_OF_TRAINING)
    settings = {key: value for key, value in asdict(setting).items() if key not in hidden and value is not None}
    return Explanation(
        model=name,
        machine=machine_facts(machine),
        phase=setting.phase,
        batch=setting.batch,
        context=setting.context,
        dtype=setting.dtype,
        settings={**settings, "launch": "CUDA graph" if timed.graph else "eager"},
        params={},
        totals=Totals(
            flops=flops,
            bytes_read=read,
            bytes_written=written,
            intensity=flops / (read + written) if read + written else 0.0,
            roof_seconds=timed.roof_seconds,
            expected_seconds=timed.expected_seconds,
            measured_seconds=wet.total_seconds if wet is not None else None,
        ),
        rows=rows.rows_by(by, grouped),
        by=by,
        components=rows.component_rows(all_pieces),
        points=points,
        primitives=primitives,
        access=access,
        movement=movement,
        memory=memory,
        advice=[],
        provenance=provenance(machine, timed, points),
        notes=notes,
    )


def _match(timed: Timed, wet: Measured) -> tuple[list[float] | None, list[str]]:
    """Seconds for each predicted step; a wet run that did other work than the dry one is said, never hidden."""
    predicted = [timed.walk.trace.records[step.record].name for step in timed.walk.steps]
    if predicted != wet.names:
        first = next(
            (i for i, pair in enumerate(zip(predicted, wet.names, strict=False)) if pair[0] != pair[1]),
            min(len(predicted), len(wet.names)),
        )
        raise RooflightError(
            f"the wet run did {len(wet.names)} operations, the dry one {len(predicted)}; they part at number {first}: "
            f"{wet.names[first : first + 1]} against {predicted[first : first + 1]}; please report this"
        )
    total = sum(wet.seconds)
    error = timed.expected_seconds / wet.total_seconds - 1 if wet.total_seconds else 0.0
    where = "Python and dispatch between them" if total < wet.total_seconds else "overlap when they run together"
    notes = [
        f"predicted {timed.expected_seconds * 1e3:.4g} ms, measured {wet.total_seconds * 1e3:.4g} ms: "
        f"the prediction is off by {error:+.1%}",
        f"operations measured one by one add up to {total * 1e3:.4g} ms; the difference is {where}",
        *wet.notes,
    ]
    return wet.seconds, notes


def _residuals(points: list[Row], most: int = 3) -> list[str]:
    """The operations whose prediction is furthest off in time, with what their prediction rests on."""

    def off(row: Row) -> float:
        return row.expected_seconds - (row.measured_seconds or 0.0)

    by_operation: dict[tuple[str, str], list[Row]] = {}
    for row in points:
        by_operation.setdefault((row.op, row.phase), []).append(row)
    ranked = sorted(by_operation.items(), key=lambda item: -abs(sum(off(row) for row in item[1])))
    lines = []
    for (op, phase), found in ranked[:most]:
        measured = sum(row.measured_seconds or 0.0 for row in found)
        sources = ", ".join(dict.fromkeys(row.provenance for row in found))
        residual = sum(off(row) for row in found)
        lines.append(f"{op} ({phase}) {residual * 1e3:+.3g} ms of {measured * 1e3:.3g} ms measured, {sources}")
    return ["largest residuals, predicted less measured: " + "; ".join(lines)] if lines else []


def provenance(machine: Machine, timed: Timed, points: list[Row]) -> dict[str, str]:
    """Where each kind of figure comes from, the expected times by their share."""
    shares: dict[str, float] = dict.fromkeys((str(name) for name in PROVENANCES), 0.0)
    for row in points:
        shares[row.provenance] += row.expected_seconds
    total = sum(shares.values()) or 1.0
    division = ", ".join(f"{share / total:.0%} {name}" for name, share in shares.items() if share)
    return {
        "roof": _roof_source(machine),
        "expected": f"{division} (by expected time); samples: {machine.samples_source or _borrowed(machine)}",
        "flops and bytes": "counted from the operations that the model itself ran on fake tensors",
        "launch": "nodes of a CUDA graph" if timed.graph else "eager launches",
    }


def _roof_source(machine: Machine) -> str:
    """What the roofs are: a datasheet's, or on a machine without one the best that was measured."""
    if machine.memory_bandwidth.source.startswith("measured"):
        return f"the best that this machine reached: {machine.memory_bandwidth.source}"
    return f"datasheet peaks and bandwidth of {machine.title}"


def _borrowed(machine: Machine) -> str:
    """Where efficiencies come from on a machine that nobody has measured."""
    reference = machine.reference
    return f"none of this machine, those of {reference.title} at the same work" if reference else "none of this machine"


def _write_formulas(result: Explanation, config: ModelConfig, setting: Setting) -> None:
    found = formulas.terms(config, setting)
    written = formulas.grouped(found, "component")
    for row in result.components:
        row.formula = written.get(row.component, "")
    names = {"component": "component", "op": "op", "primitive": "path"}
    if result.by in names:
        by = written if result.by == "component" else formulas.grouped(found, result.by)
        for row in result.rows:
            row.formula = by.get(getattr(row, names[result.by]), "")
    used = "".join(written.values())
    result.legend = {name: what for name, what in formulas.LEGEND.items() if name[0] in used}


__all__ = ["Measured", "check_setting", "explain_decoder", "explain_module", "machine_facts", "provenance"]
