"""The probe and its timing: what it measures is true to the machine, loads again, and stays under its own roofs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.hardware import Machine, Sample, collectives, load
from rooflight.hardware.probe import probe
from rooflight.hardware.timing import Timer, time_call


def sleeping(timer: Timer) -> list[Sample]:
    """What an outer room adds: here an operation of known duration."""
    assert timer.remaining < 4.0
    timing = timer(lambda: time.sleep(0.002), budget_seconds=0.05)
    return [Sample("nap", "fp32", (3, 4), {"fp32": 12.0}, 48.0, timing.seconds)]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, Path, list[str], float]:
    path = tmp_path_factory.mktemp("probe") / "deep" / "here.toml"
    lines: list[str] = []
    started = time.perf_counter()
    machine = probe("cpu", 4.0, [sleeping], path=path, say=lines.append)
    return machine, path, lines, time.perf_counter() - started


def test_probe_writes_a_file_that_loads(probed: tuple[Machine, Path, list[str], float]) -> None:
    machine, path, lines, seconds = probed
    again = load(path)
    assert (again.name, again.kind) == ("here", "cpu")
    assert again.peaks.keys() == machine.peaks.keys()
    assert len(again.samples) == len(machine.samples)
    assert seconds < 20, "a budget of 4 s may overrun by its largest buffers, not by more"
    assert any("GB/s" in line for line in lines)
    assert str(path) in lines[-1]


def test_probe_measures_every_kind_of_ceiling(probed: tuple[Machine, Path, list[str], float]) -> None:
    machine = probed[0]
    curves = {sample.curve for sample in machine.samples}
    assert curves >= {"copy", "read", "linear", "nap"}
    assert {"fp32", "bf16"} <= {s.precision for s in machine.samples if s.curve == "linear"}
    assert {"copy", "read", "matmul.fp32"} <= machine.measured.keys()
    assert 1e-8 < machine.launch_eager_seconds.value < 1e-3


def test_roofs_hold_everything_that_was_measured(probed: tuple[Machine, Path, list[str], float]) -> None:
    machine = probed[0]
    for sample in machine.samples:
        assert machine.roof_seconds(sample.flops, sample.bytes)[0] <= sample.seconds * 1.0001, sample


def test_extra_samples_are_used(probed: tuple[Machine, Path, list[str], float]) -> None:
    found = load(probed[1]).estimate("nap", "fp32", (3, 4), {"fp32": 12.0}, 48.0, "elementwise")
    assert found.provenance == "measured"
    assert 0.002 < found.seconds < 0.02


@pytest.mark.parametrize(
    ("device", "budget", "complaint"),
    [
        ("abacus", 10.0, "unknown device 'abacus'; use cpu or cuda"),
        ("meta", 10.0, "'meta' cannot be probed"),
        ("cpu", 0.0, "budget of 0.0 s; use 1 to 3600"),
    ],
)
def test_bad_input_is_one_clear_line(device: str, budget: float, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=complaint):
        probe(device, budget, path=tmp_path / "here.toml")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="torch sees no CUDA device; use cpu"):
        probe("cuda", 10.0, path=tmp_path / "here.toml")


def test_time_call_tells_a_known_duration() -> None:
    timing = time_call(lambda: time.sleep(0.003), device="cpu", budget_seconds=0.1)
    assert 0.003 <= timing.seconds < 0.012
    assert timing.host_seconds is None
    slow = time_call(lambda: time.sleep(0.02), device="cpu", budget_seconds=0.001)
    assert 0.02 <= slow.seconds < 0.1


def test_time_call_takes_turns() -> None:
    called = [0, 0, 0]

    def call(index: int) -> None:
        called[index] += 1

    time_call([lambda index=index: call(index) for index in range(3)], device="cpu", budget_seconds=0.02)
    assert min(called) > 0
    assert max(called) - min(called) <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_time_call_captures_a_graph_and_survives_what_cannot_be_captured() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    captured = time_call(lambda: x @ x, device="cuda", budget_seconds=0.1)
    assert captured.captured and captured.host_seconds is not None
    assert 1e-5 < captured.seconds < 0.1
    waiting = time_call(lambda: x.sum().item(), device="cuda", budget_seconds=0.1)
    assert not waiting.captured and waiting.seconds > 0
    assert torch.isfinite(x @ x).all(), "the device still works after a capture that failed"


def test_ring_bytes_by_hand() -> None:
    assert collectives.link_bytes("all_reduce", 8.0, 4) == 12.0
    assert collectives.link_bytes("all_gather", 8.0, 4) == 6.0
    assert collectives.link_bytes("reduce_scatter", 8.0, 2) == 4.0
    assert collectives.link_bytes("send", 8.0, 2) == 8.0


def test_collectives_are_measured_between_real_ranks() -> None:
    samples = collectives.spawn("cpu", 2, (2**12, 2**20))
    assert {sample.curve for sample in samples} == {"all_reduce", "all_gather", "reduce_scatter", "send"}
    for sample in samples:
        assert sample.size[0] == 2
        assert 1e-6 < sample.seconds < 1
        assert 1e3 < sample.link_bytes / sample.seconds < 1e12
