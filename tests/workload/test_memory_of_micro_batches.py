"""Memory of a step of several micro-batches, against a real step; and workspace, on a run worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rooflight.models.count import parameter_counts
from rooflight.ops.cost import Cost
from rooflight.workload import program
from rooflight.workload.memory import ACTIVATIONS, WORKSPACE, over_time, play
from rooflight.workload.optimizers import Update
from rooflight.workload.program import Setting
from rooflight.workload.record import Record, Trace
from rooflight.workload.training import Recipe
from rooflight.workload.walk import Step, Walk
from tests.workload.setups import llama, walked
from tests.workload.test_memory import CAPACITY, live_bytes, tensors_peak


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_predicted_peak_is_that_of_a_real_step_of_micro_batches(
    micro_batches: int, fp32: bool, recompute: Any
) -> None:
    config = llama(4)
    recipe = Recipe(recompute, 1.0, fp32, micro_batches, Update(masters=True))
    setting = Setting("train", 2, 19, "bf16", recipe=recipe)
    # Micro-batches after the second hold what the second holds, and the loss so far: one scalar.
    two = replace(setting, recipe=replace(recipe, micro_batches=min(micro_batches, 2)))
    folded, whole = walked(config, two), walked(config, two, fold=False)
    model = program.build_model(config, "bf16", "cpu").initialize()
    run = program.decoder(config, setting, "cpu", fold=False, model=model)
    with live_bytes(run) as mode:
        run.step(None)
    assert tensors_peak(whole) == tensors_peak(folded)
    assert mode.peak - tensors_peak(whole) in ((0, 4) if micro_batches > 2 else (0,))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_of_micro_batches_stand_once(micro_batches: int) -> None:
    config = llama(4)
    n = parameter_counts(config)["total"]
    for fp32, each in ((False, 2), (True, 4)):
        recipe = Recipe("none", 1.0, fp32, micro_batches, Update(masters=True))
        found = over_time(walked(config, Setting("train", 2, 19, "bf16", recipe=recipe)), CAPACITY)
        assert (found.weights, found.gradients, found.optimizer) == (2 * n, each * n, 12 * n)
        # fp32 sums stand from the start, the weights' own gradients come with the backward.
        assert found.timeline[0].bytes["gradients"] == (each * n if fp32 else 0)
        last = [m for m in found.timeline if m.label.startswith("optimizer")][-1]
        assert last.bytes["gradients"] == each * n


def program_of(*records: tuple[list[tuple[int, int]], int]) -> Walk:
    """A run of operations that make and free these bytes, each with its workspace, on 100 bytes of weights."""
    made = [
        Record(f"op{index}", "", "", "forward", Cost(workspace=workspace), changes=list(changes))
        for index, (changes, workspace) in enumerate(records)
    ]
    return Walk(Trace(made, [], {3: "gradients"}), [Step(index, None) for index in range(len(made))], {"weights": 100})


def test_workspace_stands_only_while_its_operation_runs() -> None:
    # Makes 10; makes 5 with 50 of workspace; frees 10 after it ran with 20; a gradient of 7; all freed.
    found = program_of(
        ([(1, 10)], 0), ([(2, 5)], 50), ([(1, -10)], 20), ([(3, 7)], 0), ([(2, -5), (3, -7)], 0), ([], 0)
    )
    by_hand = [(10, 0, 0), (15, 50, 0), (15, 20, 0), (5, 0, 7), (5, 0, 7), (0, 0, 0)]
    assert [(now[ACTIVATIONS], now[WORKSPACE], now["gradients"]) for now in play(found)] == by_hand
    result = over_time(found, CAPACITY)
    assert result.total == 100 + 15 + 50
    assert result.peak_label == "forward: op1 (op1)"
    assert result.at_peak == [("weights", 100.0), (WORKSPACE, 50.0), (ACTIVATIONS, 15.0)]
    assert (result.activations_peak, result.gradients) == (15.0, 7.0)
    assert [sum(moment.bytes.values()) for moment in result.timeline] == [100, *(100 + sum(at) for at in by_hand)]


def test_a_peak_can_be_made_by_workspace_alone() -> None:
    found = over_time(program_of(([(1, 30), (1, -30)], 0), ([], 31)), CAPACITY)
    assert (found.total, found.peak_label) == (131.0, "forward: op1 (op1)")


def test_the_fused_loss_holds_its_workspace_at_its_own_moment() -> None:
    setting = Setting("train", 2, 64, "bf16")
    found = walked(llama(2, vocab_size=512), setting)
    held = {
        found.trace.records[step.record].name: now[WORKSPACE]
        for step, now in zip(found.steps, play(found), strict=True)
        if now[WORKSPACE]
    }
    assert set(held) == {"linear_cross_entropy_with_grad"}
    # At the least the logits of some tokens, in the weights' own type.
    assert held["linear_cross_entropy_with_grad"] >= 2 * 512
