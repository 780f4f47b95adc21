"""A profiled step: what was recorded is what ran, it is laid beside the right prediction, and it changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rooflight.models.config import ModelConfig
from rooflight.models.layout import Layout
from rooflight.ops.batch import Batch
from rooflight.train.accounting import Prediction, predict, recipe
from rooflight.train.comparison import Profile, partners_of
from rooflight.train.kernel_trace import KernelTrace, read_trace, traced
from rooflight.train.profile import compare, profile_step
from rooflight.train.settings import TrainSettings
from rooflight.workload import program
from rooflight.workload.record import Recorder
from rooflight.workload.training import MicroBatch, Trainee
from tests.workload.machines import CPU, GPU
from tests.workload.setups import llama

CONFIG = llama(3)
DEVICE = torch.device("cpu")


def settings(**given: Any) -> TrainSettings:
    return replace(TrainSettings(batch_size=4, context=16, dtype="fp32", steps=3), **given).check()


def trainee(config: ModelConfig, at: TrainSettings) -> tuple[Trainee, list[MicroBatch]]:
    model = program.build_model(config, at.dtype, "cpu").initialize()
    made = program.make_trainee(model, recipe(at, config), at.optimizer, tuple(1 for _ in config.layers))
    made.optimizer.allocate()
    count = at.micro * at.context
    drawn = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, config.vocab_size, (2, count), generator=drawn) for _ in range(at.micro_batches)]
    positions = torch.arange(at.context).repeat(at.micro)
    facts = Batch.uniform(at.micro, at.context, at.context)
    layout = Layout((at.micro, at.context))
    return made, [MicroBatch(pair[0], pair[1], positions, layout, facts) for pair in tokens]


def profiled(at: TrainSettings, prediction: Prediction | None, extra: Any = None) -> Profile:
    made, micros = trainee(CONFIG, at)

    def take(recorder: Recorder) -> None:
        if extra is not None:
            extra()
        made.step(micros, targets=at.batch_size * at.context, recorder=recorder)

    return profile_step(take, made.model, DEVICE, prediction, step=7, micro_batches=at.micro_batches)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"micro_batch_size": 1},
        {"micro_batch_size": 2, "recompute": "full"},
        {"micro_batch_size": 1, "dtype": "bf16", "gradient_dtype": "fp32", "recompute": "selective"},
        {"optimizer": "muon"},
    ],
)
def test_the_step_does_what_was_predicted_in_that_order(given: dict[str, Any]) -> None:
    at = settings(**given)
    found = profiled(at, predict(CONFIG, at, CPU))
    assert found.notes == []
    assert [each.name for each in found.host] == [each.name for each in found.predicted]
    assert [each.phase for each in found.host] == [each.phase for each in found.predicted]
    inside = [(a.path, b.path) for a, b in zip(found.host, found.predicted, strict=True) if a.path.startswith("layers")]
    assert inside
    assert all(wet == dry for wet, dry in inside)
    # A step of one micro-batch counts its targets when it is predicted, and is handed their number when it is trained.
    flops = sum(each.flops for each in found.predicted)
    assert sum(each.flops for each in found.host) == pytest.approx(flops, rel=1e-4)
    assert found.predicted_seconds == pytest.approx(predict(CONFIG, at, CPU).seconds, rel=0.01)


def test_times_follow_one_another_within_the_step() -> None:
    at = settings(micro_batch_size=2)
    found = profiled(at, predict(CONFIG, at, CPU))
    for before, after in zip(found.host, found.host[1:], strict=False):
        assert 0 <= before.start <= before.start + before.seconds <= after.start + 1e-9
    assert found.host[-1].start + found.host[-1].seconds <= found.seconds
    assert found.measured == [each.seconds for each in found.host]
    assert 0 < sum(found.measured) < found.seconds
    for before, after in zip(found.predicted, found.predicted[1:], strict=False):
        assert before.start + before.seconds == pytest.approx(after.start)


def test_the_slow_operation_is_the_one_that_was_slow() -> None:
    at = settings()
    made, micros = trainee(CONFIG, at)
    busy = torch.randn(500, 500)

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                torch.mm(busy, busy)
            return x

    made.model.norm.register_forward_pre_hook(lambda module, args: (Slow()(args[0]), *args[1:]))
    found = profile_step(
        lambda recorder: void(made.step(micros, recorder=recorder)), made.model, DEVICE, predict(CONFIG, at, CPU)
    )
    assert found.rows[0].operation == "aten.mm"
    assert found.rows[0].calls == 20
    assert any("in the step alone: aten.mm ×20" in note for note in found.notes)


def void(_: Any) -> None:
    return None


def test_rows_add_up_and_are_ordered_by_headroom() -> None:
    at = settings(micro_batch_size=2)
    found = profiled(at, predict(CONFIG, at, CPU))
    assert sum(row.calls for row in found.rows) == len(found.host)
    assert sum(row.measured_seconds for row in found.rows) == pytest.approx(sum(found.measured))
    assert sum(row.expected_seconds or 0 for row in found.rows) == pytest.approx(found.predicted_seconds)
    room = [row.headroom_seconds for row in found.rows]
    assert room == sorted(room, reverse=True)
    by_hand = {}
    for each, seconds in zip(found.host, found.measured, strict=True):
        if (each.name, each.phase) == ("linear", "forward") and each.path.endswith("ffn.down"):
            by_hand[each.layer] = seconds - (each.roof_seconds or 0)
    row = next(row for row in found.rows if (row.operation, row.path) == ("linear", "layers.*.ffn.down"))
    assert set(by_hand) == {0, 1, 2}
    assert row.calls == 2 * len(by_hand)  # two micro-batches


def test_memory_is_that_of_the_prediction() -> None:
    at = settings(micro_batch_size=2)
    prediction = predict(CONFIG, at, CPU)
    found = profiled(at, prediction)
    highest = max(sum(held.bytes.values()) for held in found.memory)
    assert highest == pytest.approx(prediction.peak_bytes, rel=0.02)
    assert [held.start for held in found.memory] == sorted(held.start for held in found.memory)


def test_profiling_changes_no_bit() -> None:
    at = settings(micro_batch_size=2)
    weights = []
    for with_profile in (False, True):
        made, micros = trainee(CONFIG, at)
        for step in range(3):

            def take(recorder: Recorder | None, made: Trainee = made, micros: list[MicroBatch] = micros) -> None:
                made.step(micros, targets=64, recorder=recorder)

            if with_profile and step == 1:
                profile_step(take, made.model, DEVICE, predict(CONFIG, at, CPU), micro_batches=2)
            else:
                take(None)
        weights.append([p.detach().clone() for p in made.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_step_that_does_other_work_is_matched_and_told() -> None:
    at = settings()

    def extra() -> None:
        torch.stack([torch.zeros(2), torch.zeros(2)])

    found = profiled(at, predict(CONFIG, at, CPU), extra)
    assert any("matched by name and place" in note for note in found.notes)
    assert any("aten.stack ×1" in note and "in the step alone" in note for note in found.notes)
    linears = [each for each in found.host if each.name == "linear"]
    assert all(each.expected_seconds is not None for each in linears)
    assert len(found.host) == len(found.predicted) + 3


def test_operations_are_matched_in_their_order() -> None:
    at = settings(micro_batch_size=2)
    prediction = predict(CONFIG, at, CPU)
    made, micros = trainee(CONFIG, at)
    with Recorder(made.model) as recorder:
        torch.zeros(2)
        made.step(micros, targets=64, recorder=recorder)
    predicted = profiled(at, prediction).predicted
    found, notes = partners_of(recorder.records, predicted)
    assert found == [None, *range(len(predicted))]
    assert notes[1:] == ["in the step alone: aten.zeros ×1"]
    found, notes = partners_of(recorder.records[1:-1], predicted)
    assert found == list(range(len(predicted) - 1))
    assert notes[1:] == [f"predicted alone: {predicted[-1].name} ×1"]


def test_an_operator_without_a_price_does_not_stop_the_run() -> None:
    at = settings()
    found = profiled(at, predict(CONFIG, at, CPU), lambda: torch.ones(4).to_sparse())
    assert any("without a price" in note and "sparse" in note for note in found.notes)


def test_without_a_machine_there_is_still_a_profile() -> None:
    at = settings()
    for prediction in (None, predict(CONFIG, at, None, 1e9)):
        found = profiled(at, prediction)
        assert found.predicted == [] and found.machine == ""
        assert all(row.roof_seconds is None and row.headroom_seconds == row.measured_seconds for row in found.rows)
        assert json.dumps(found.to_json())


def test_what_the_step_raises_is_passed_on() -> None:
    def fails(recorder: Recorder) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        profile_step(fails, nn.Linear(2, 2), DEVICE, None)


# A trace as torch.profiler writes it for a GPU: ranges on two threads, launches by the runtime and by the driver, two
# streams, a kernel that came late, one that nobody launched, and names that are not ours.
TRACE = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
    {"ph": "X", "cat": "user_annotation", "name": "rooflight#0", "pid": 1, "tid": 11, "ts": 1000.0, "dur": 10.0},
    {"ph": "X", "cat": "user_annotation", "name": "rooflight#1", "pid": 1, "tid": 11, "ts": 1010.0, "dur": 1.0},
    {"ph": "X", "cat": "user_annotation", "name": "rooflight#1", "pid": 1, "tid": 11, "ts": 1012.0, "dur": 8.0},
    {"ph": "X", "cat": "user_annotation", "name": "rooflight#2", "pid": 1, "tid": 22, "ts": 1030.0, "dur": 5.0},
    {"ph": "X", "cat": "user_annotation", "name": "somebody else's", "pid": 1, "tid": 11, "ts": 900.0, "dur": 500.0},
    {"ph": "X", "cat": "gpu_user_annotation", "name": "rooflight#0", "pid": 0, "tid": 7, "ts": 1100.0, "dur": 30.0},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 11, "ts": 1002.0, "dur": 2.0,
     "args": {"correlation": 101}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 11, "ts": 1005.0, "dur": 2.0,
     "args": {"correlation": 102}},
    {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "pid": 1, "tid": 11, "ts": 1015.0, "dur": 2.0,
     "args": {"correlation": 103}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 22, "ts": 1031.0, "dur": 2.0,
     "args": {"correlation": 104}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemsetAsync", "pid": 1, "tid": 11, "ts": 1025.0, "dur": 2.0,
     "args": {"correlation": 105}},
    {"ph": "X", "cat": "kernel", "name": "late", "pid": 0, "tid": 7, "ts": 1200.0, "dur": 40.0,
     "args": {"correlation": 104, "stream": 7}},
    {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 1100.0, "dur": 20.0,
     "args": {"correlation": 101, "stream": 7}},
    {"ph": "X", "cat": "kernel", "name": "epilogue", "pid": 0, "tid": 7, "ts": 1120.0, "dur": 10.0,
     "args": {"correlation": 102, "stream": 7}},
    {"ph": "X", "cat": "kernel", "name": "norm", "pid": 0, "tid": 9, "ts": 1110.0, "dur": 5.0,
     "args": {"correlation": 103, "stream": 9}},
    {"ph": "X", "cat": "gpu_memset", "name": "Memset", "pid": 0, "tid": 7, "ts": 1140.0, "dur": 1.0,
     "args": {"correlation": 105, "stream": 7}},
]  # fmt: skip


def test_kernels_go_to_the_operation_that_launched_them() -> None:
    found = read_trace(TRACE)
    assert [(k.name, k.operation, k.stream) for k in found.kernels] == [
        ("gemm", 0, 7),
        ("norm", 1, 9),
        ("epilogue", 0, 7),
        ("Memset", None, 7),
        ("late", 2, 7),
    ]
    assert (found.kernels[0].start, found.kernels[0].seconds) == pytest.approx((100e-6, 20e-6))
    # Zero is the first range; the last range of a number is its own, the one before was a view's.
    assert found.ranges[0] == (0.0, pytest.approx(10e-6))
    assert found.ranges[1] == (pytest.approx(12e-6), pytest.approx(8e-6))
    assert read_trace([]) == KernelTrace()


def test_a_kernels_time_is_its_operations() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.ones(2, 4)
    with Recorder(module) as recorder:
        module(x)
    assert len(recorder.records) == 3
    found = compare(recorder.records, read_trace(TRACE), None, 1.0, "cuda", 3, 1)
    assert found.measured == pytest.approx([30e-6, 5e-6, 40e-6])
    assert [row.measured_seconds for row in found.rows] == pytest.approx([40e-6, 30e-6, 5e-6])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_profiler_that_sees_no_gpu_is_told_and_the_run_goes_on() -> None:
    done = []
    found = traced(lambda: done.append(torch.ones(3).sum()))
    assert len(done) == 1
    assert found.problem
    with pytest.raises(ValueError, match="mine"):
        traced(lambda: (_ for _ in ()).throw(ValueError("mine")))
    with Recorder(None) as recorder:
        torch.ones(3).sum()
    profile = compare(recorder.records, found, None, 1.0, "cuda", 3, 1)
    assert any("times are the host's" in note for note in profile.notes)


def test_bounds_on_a_gpu_are_those_of_the_prediction() -> None:
    at = settings()
    found = profiled(at, predict(CONFIG, at, GPU))
    assert {each.bound for each in found.host} == {each.bound for each in found.predicted}
