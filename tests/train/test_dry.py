"""The dry run: figures that follow from one another by hand, rows that add up, moments that hold the peak."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.models.count import parameter_counts
from rooflight.train.accounting import predict
from rooflight.train.dry import GRADIENTS, DryRun, dry_run, evenly
from rooflight.train.settings import TrainSettings
from rooflight.workload.roofline import Timed
from tests.workload.machines import BF16, CPU, GPU, changed
from tests.workload.setups import llama

CONFIG = llama(3, width=64, vocab_size=128)


def ran(machine: Any = GPU, tokens: int = 0, usd: float | None = None, **given: Any) -> DryRun:
    base: dict[str, Any] = {"batch_size": 8, "context": 64, "dtype": "bf16", "steps": 5}
    at = replace(TrainSettings(), **base | given).check()
    return dry_run("small", CONFIG, at, machine, tokens=tokens, usd_per_hour=usd)


@pytest.mark.parametrize("machine", [GPU, CPU])
@pytest.mark.parametrize("given", [{}, {"micro_batch_size": 4}, {"micro_batch_size": 1, "gradient_dtype": "fp32"}])
def test_rows_add_up_to_the_step(machine: Any, given: dict[str, Any]) -> None:
    run = ran(machine, **given)
    assert sum(row.expected_seconds for row in run.components) == pytest.approx(run.totals.expected_seconds, rel=0.01)
    assert sum(row.roof_seconds for row in run.components) == pytest.approx(run.totals.roof_seconds, rel=0.01)
    assert sum(row.flops for row in run.components) == run.totals.flops
    assert sum(row.expected_seconds for row in run.points) == pytest.approx(run.totals.expected_seconds, rel=0.01)


def test_products_are_the_same_in_any_micro_batches() -> None:
    # 2·N·T forward and twice that backward, however the rows are divided.
    whole = {row.component: row.flops_by_precision.get("bf16", 0) for row in ran().components}
    for size in (4, 2, 1):
        divided = {
            row.component: row.flops_by_precision.get("bf16", 0) for row in ran(micro_batch_size=size).components
        }
        assert {name: flops for name, flops in divided.items() if flops} == {k: v for k, v in whole.items() if v}


def test_sums_of_gradients_are_a_row_of_their_own() -> None:
    n = parameter_counts(CONFIG)["total"]
    assert GRADIENTS not in [row.component for row in ran().components]
    row = next(row for row in ran(micro_batch_size=2).components if row.component == GRADIENTS)
    assert row.bytes_written == 3 * 2 * n  # three of four micro-batches add to 2 bytes a parameter
    names = [row.component for row in ran(micro_batch_size=2).components]
    assert names.index(GRADIENTS) == names.index("optimizer") - 1
    assert "other" not in names


def test_rates_follow_from_the_step() -> None:
    run = ran()
    assert run.tokens_per_step == 8 * 64
    assert run.tokens_per_second == pytest.approx(512 / run.totals.expected_seconds)
    assert run.tokens_per_day == pytest.approx(86400 * run.tokens_per_second)
    # 6·N for the weights that multiply, 6·L·T·d for causal attention: PaLM, appendix B.
    counts = parameter_counts(CONFIG)
    per_token = 6 * (counts["total"] - counts["embedding"]) + 6 * 3 * 64 * CONFIG.heads * CONFIG.head_dim
    assert run.mfu == pytest.approx(per_token * run.tokens_per_second / BF16)
    assert run.mfu is not None and run.mfu_full is not None and run.mfu < run.mfu_full
    assert run.of_ceiling is None  # this machine has no measured ceiling


def test_the_budget_by_hand() -> None:
    run = ran(usd=2.0)
    assert run.budget is not None
    assert (run.budget.tokens, run.budget.steps) == (5 * 512, 5)
    hours = 5 * run.totals.expected_seconds / 3600
    assert run.budget.gpu_hours == pytest.approx(hours)
    assert run.budget.days == pytest.approx(hours / 24)
    assert run.budget.usd == pytest.approx(2 * hours)
    # A budget that is no whole number of steps takes one more.
    told = ran(tokens=1000).budget
    assert told is not None and (told.tokens, told.steps, told.usd) == (1000, 2, None)
    assert ran(steps=0).budget is None
    priced = ran(changed(GPU, price_per_hour=3.0)).budget
    assert priced is not None and (priced.usd_per_hour, priced.source) == (3.0, "test")


@pytest.mark.parametrize("usd", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(usd: float) -> None:
    with pytest.raises(InvalidValue, match="--usd-per-hour"):
        ran(usd=usd)


@pytest.mark.parametrize("given", [{}, {"micro_batch_size": 2}, {"recompute": "full"}])
def test_the_moments_hold_the_peak(given: dict[str, Any]) -> None:
    run = ran(**given)
    sums = [sum(moment.bytes.values()) for moment in run.memory.timeline]
    assert max(sums) == run.memory.total
    assert run.memory.timeline[sums.index(max(sums))].label == run.memory.peak_label
    assert run.walked_micro_batches == min(8 // given.get("micro_batch_size", 8), 2)
    assert bool(run.notes) == (given.get("micro_batch_size") == 2)


def test_moments_are_evenly_spaced_in_time() -> None:
    found = predict(CONFIG, TrainSettings(batch_size=2, context=32, dtype="bf16"), GPU).timed
    assert found is not None
    steps = found.walk.steps
    # One operation with half of all the time: half of all moments are its own.
    seconds = [0.0] * len(steps)
    seconds[0], seconds[-1] = 1.0, 1.0
    moments = list(evenly(Timed(found.walk, found.priced, seconds, found.bounds, False), 10))
    assert len(moments) == 10
    first = moments[0].label
    assert [moment.label == first for moment in moments[:5]] == [True] * 5
    # The highest of all between stands in the slice in which they ran.
    assert max(sum(m.bytes.values()) for m in moments) == pytest.approx(
        predict(CONFIG, TrainSettings(batch_size=2, context=32, dtype="bf16"), GPU).peak_bytes
    )


def test_what_does_not_fit_comes_with_alternatives() -> None:
    run = ran(changed(GPU, memory_bytes=0.8 * ran().memory.total))
    assert not run.fits
    assert run.alternatives
    assert run.verdict.startswith("does not fit")
    assert ran().fits and ran().alternatives == []


def test_the_run_is_plain_data() -> None:
    found = json.loads(json.dumps(ran().to_json()))
    assert found["memory"]["total"] > 0
    assert found["settings"]["optimizer"] == "adamw"
    assert found["settings"]["master_weights"] is True
    assert "master_weights" not in ran(dtype="fp32").settings
