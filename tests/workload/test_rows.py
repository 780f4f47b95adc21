"""Rows: however the work is grouped, the sums are those of the whole run; fused operations divide over components."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from torch import nn

from rooflight.errors import InvalidValue
from rooflight.workload import program, rows, walk
from rooflight.workload.any_module import any_module
from rooflight.workload.explanation import Row
from rooflight.workload.program import Setting
from rooflight.workload.roofline import Timed, time_walk
from rooflight.workload.rows import COMPONENTS, GROUPINGS, component_rows, divisions, pieces, rows_by, site_rows
from tests.workload.machines import GPU
from tests.workload.setups import FAMILIES, KINDS, PHASES, flops_by_component, llama, walked


def timed_walk(name: str, phase: str, attention: str = "flash") -> Timed:
    setting = Setting(phase, 2, 19, attention=attention)
    return time_walk(walked(FAMILIES[name], setting), GPU, graph=phase == "decode")


def measured_seconds(timed: Timed) -> list[float]:
    random = Random(0)
    return [random.random() for _ in timed.walk.steps]


def check_sums(found: list[Row], timed: Timed, measured: list[float]) -> None:
    """Each figure of a run, added up here from its steps, is the sum of the rows' figures."""
    records = [timed.walk.trace.records[step.record] for step in timed.walk.steps]
    assert sum(row.flops for row in found) == sum(r.cost.total_flops for r in records)
    assert sum(row.bytes_read for row in found) == sum(r.cost.bytes_read for r in records)
    assert sum(row.bytes_written for row in found) == sum(r.cost.bytes_written for r in records)
    traffic = sum(r.cost.total_bytes if r.cost.traffic is None else r.cost.traffic for r in records)
    assert sum(row.traffic for row in found) == pytest.approx(traffic)
    assert sum(row.roof_seconds for row in found) == pytest.approx(timed.roof_seconds)
    assert sum(row.expected_seconds for row in found) == pytest.approx(timed.expected_seconds)
    assert sum(row.measured_seconds or 0.0 for row in found) == pytest.approx(sum(measured))
    by_precision: Counter[str] = Counter()
    for row in found:
        assert sum(row.flops_by_precision.values()) == row.flops
        by_precision.update(row.flops_by_precision)
        moved = row.bytes_read + row.bytes_written
        assert row.intensity == (row.flops / moved if moved else 0.0)
        assert row.bound in ("compute", "memory", "launch", "communication")
    for name in ("bf16", "fp32"):
        assert by_precision[name] == sum(r.cost.flops.get(name, 0) for r in records)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_grouping_add_up_to_the_run(name: str, phase: str) -> None:
    timed = timed_walk(name, phase)
    measured = measured_seconds(timed)
    whole = pieces(timed, GPU, measured)
    by_layer = pieces(timed, GPU, measured, by_layer=True)
    for grouping in GROUPINGS:
        check_sums(rows_by(grouping, by_layer if grouping == "layer" else whole), timed, measured)
    check_sums(site_rows(whole), timed, measured)


def test_an_unknown_grouping_is_refused() -> None:
    with pytest.raises(InvalidValue, match="component, layer, op, primitive"):
        rows_by("colour", pieces(timed_walk("llama3", "prefill"), GPU, None))


def test_without_a_wet_run_nothing_is_measured() -> None:
    found = component_rows(pieces(timed_walk("llama3", "prefill"), GPU, None))
    assert {row.measured_seconds for row in found} == {None}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", KINDS)
def test_components_stand_in_the_order_of_a_decoder(name: str, phase: str) -> None:
    timed = timed_walk(name, phase)
    found = component_rows(pieces(timed, GPU, None))
    names = [row.component for row in found]
    assert names == [known for known in COMPONENTS if known in names]
    assert {row.component: row.flops for row in found if row.flops} == flops_by_component(timed.walk)
    # What an engineer looks for is there, whatever the family.
    assert {"embedding", "QKV", "scores", "softmax", "context", "output projection", "feed-forward", "head"} <= set(
        names
    )
    assert ("optimizer" in names) == (phase == "train")
    assert ("routing" in names) == (name in ("mixtral", "deepseek_v3"))


@pytest.mark.parametrize("attention", ["flash", "naive"])
def test_scores_softmax_and_context_are_rows_of_their_own_with_either_attention(attention: str) -> None:
    timed = timed_walk("llama3", "train", attention=attention)
    found = {row.component: row for row in component_rows(pieces(timed, GPU, None))}
    records = [timed.walk.trace.records[step.record] for step in timed.walk.steps]
    core = [i for i, r in enumerate(records) if r.name.startswith("attention")]
    parts = [found[name] for name in ("scores", "softmax", "context")]
    # Together they are the operations of attention, to the last FLOP, byte and second.
    assert sum(row.flops for row in parts) == sum(records[i].cost.total_flops for i in core)
    assert sum(row.bytes_read for row in parts) == sum(records[i].cost.bytes_read for i in core)
    assert sum(row.bytes_written for row in parts) == sum(records[i].cost.bytes_written for i in core)
    assert sum(row.expected_seconds for row in parts) == pytest.approx(sum(timed.seconds[i] for i in core))
    assert all(row.flops and row.expected_seconds for row in parts)


def test_layers_of_a_kind_are_equal_rows_and_what_stands_outside_has_its_own() -> None:
    timed = time_walk(walked(llama(6), Setting("prefill", 2, 64)), GPU, graph=False)
    found = {row.path: row for row in rows_by("layer", pieces(timed, GPU, None, by_layer=True))}
    layers = [found[f"layers.{i}"] for i in range(6)]
    assert len({(row.flops, row.bytes_read, row.bytes_written, row.count) for row in layers[1:]}) == 1
    # The first has no residual to add: fewer bytes, for the rest the same products.
    assert layers[0].bytes_read < layers[1].bytes_read
    assert layers[0].flops_by_precision["bf16"] == layers[1].flops_by_precision["bf16"]
    assert {"embedding", "norm", "head"} <= set(found)


@pytest.mark.parametrize("grouping", ["op", "layer", "primitive"])
def test_the_parts_of_a_fused_call_are_one_call(grouping: str) -> None:
    timed = timed_walk("llama3", "prefill")
    found = rows_by(grouping, pieces(timed, GPU, None, by_layer=grouping == "layer"))
    assert sum(row.count for row in found) == len(timed.walk.steps)


def test_counts_are_calls() -> None:
    timed = time_walk(walked(llama(6), Setting("prefill", 2, 64)), GPU, graph=False)
    found = {row.op: row.count for row in rows_by("op", pieces(timed, GPU, None))}
    # Four in each layer and the head.
    assert found["linear"] == 4 * 6 + 1
    assert found["add_rms_norm"] == 2 * 6
    assert found["rms_norm"] == found["embedding"] == 1


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", KINDS)
def test_primitives_and_access_patterns_each_divide_the_whole_work(name: str, phase: str) -> None:
    timed = timed_walk(name, phase)
    whole = pieces(timed, GPU, None)
    records = [timed.walk.trace.records[step.record] for step in timed.walk.steps]
    flops = sum(r.cost.total_flops for r in records)
    moved = sum(r.cost.total_bytes for r in records)
    primitives, access, movement = divisions(whole)
    for division in (primitives, access):
        assert sum(entry.flops for entry in division) == flops
        assert sum(entry.bytes for entry in division) == moved
        assert sum(entry.expected_seconds for entry in division) == pytest.approx(timed.expected_seconds)
        assert len({entry.name for entry in division}) == len(division)
    # An operation may broadcast and reduce at once, and counts under both.
    for entry in movement:
        of = [r for r in records if entry.name in [str(m) for m in r.cost.movement]]
        assert entry.bytes == sum(r.cost.total_bytes for r in of)
        assert 0 < entry.bytes <= moved
    assert next(entry for entry in primitives if entry.name == "matrix multiply").flops > 0


def test_a_row_is_bound_by_what_most_of_its_time_is() -> None:
    """A huge product is bound by compute, decode by memory, and toys by launches."""

    def bound(batch: int, context: int, phase: str, width: int, ffn: int) -> str:
        config = llama(2, width=width, heads=8, kv_heads=8, head_dim=width // 8, ffn_width=ffn)
        timed = time_walk(walked(config, Setting(phase, batch, context)), GPU, graph=phase == "decode")
        return {row.component: row.bound for row in component_rows(pieces(timed, GPU, None))}["feed-forward"]

    assert bound(4, 4096, "prefill", 4096, 16384) == "compute"
    assert bound(1, 4096, "decode", 4096, 16384) == "memory"
    assert bound(1, 4, "prefill", 32, 48) == "launch"


def test_a_module_of_somebody_elses_has_rows_by_its_own_names() -> None:
    model = nn.ModuleDict({"first": nn.Linear(8, 16), "second": nn.Linear(16, 4)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["second"](self.parts["first"](x).relu())

    def build() -> program.Program:
        import torch

        return any_module(Both(), (torch.zeros(5, 8),), Setting("prefill", dtype="fp32"))

    timed = time_walk(walk.dry(build), GPU, graph=False)
    paths = [(row.path, row.op) for row in site_rows(pieces(timed, GPU, None))]
    assert [path for path, _ in paths] == ["parts.first", "", "parts.second"]
    assert rows.component_of(timed.walk.trace.records[0]) != "other"
