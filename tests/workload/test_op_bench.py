"""`bench ops`: figures worked out by hand under a clock of ours, wrong results caught, peers that come and go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rooflight.errors import InvalidValue
from rooflight.hardware.ceilings import copies_beyond
from rooflight.hardware.figures import Figure
from rooflight.hardware.timing import Timing
from rooflight.ops import batch
from rooflight.workload import op_bench
from rooflight.workload.op_bench import BACKWARD, FORWARD, OPERATIONS, WHOLE, Row, measure
from rooflight.workload.op_bench.case import Absent, Draw, Operation, Peer
from rooflight.workload.op_bench.shapes import SHAPES
from rooflight.workload.record import Recorder
from tests.workload.machines import CPU

HERE, GPU = torch.device("cpu"), torch.device("cuda")
MACHINE = replace(CPU, measured={"copy": Figure(5e11, "test"), "matmul.fp32": Figure(5e12, "test")})
# Every operation at sizes of a moment.
TINY: dict[str, tuple[Any, ...]] = {
    "linear": (256, 16, 32),
    "norm_linear": (24, 32, 16, "silu"),
    "add_linear": (24, 16, 32),
    "rms_norm": (256, 32),
    "add_rms_norm": (256, 32),
    "layer_norm": (256, 32),
    "add_layer_norm": (256, 32),
    "softmax": (256, 32),
    "rotary": (256, 4, 2, 16),
    "rotary_qkv": (256, 4, 2, 16),
    "gated_activation": ("silu", 256, 16),
    "activation": ("gelu_tanh", 256, 16),
    "embedding": (256, 64, 16),
    "attention": (2, 4, 2, 24, 16),
    "packed_attention": (((1, 16), (3, 5)), 4, 2, 16),
    "paged_attention": (((2, 1, 40), (1, 24, 24), (1, 3, 20)), 4, 2, 16),
    "attention_schedule": (((2, 1, 40), (1, 3, 20)), 2, 64),
    "write_kv": (40, 4, 2, 16),
    "rotate_and_cache": (40, 4, 2, 16, True),
    "route": (256, 16, 3),
    "permute": (256, 8, 2, 16),
    "unpermute": (256, 8, 2, 16),
    "grouped_linear": (256, 4, 2, 24, 16),
    "grouped_gated_linear": (24, 4, 2, 24, 16),
    "linear_cross_entropy": (48, 16, 96),
    "cross_entropy": (48, 96),
    "adamw": ("fp32", 1, 16),
    "grad_norm": (1, 16),
    "greedy": (4, 96),
    "sample_plain": (4, 3000),
    "sample": (4, 5000, 20, 0.9),
}


class Clock:
    """Calls everything once and says one second for the first candidate, two for the next, and so on."""

    def __init__(self, unit: float = 1.0) -> None:
        self.unit, self.count, self.turns = unit, 0, 0

    def __call__(self, calls: Sequence[Callable[[], Any]], *, budget_seconds: float) -> Timing:
        assert budget_seconds > 0
        for call in calls:
            call()
        self.count, self.turns = self.count + 1, len(calls)
        return Timing(self.count * self.unit, None, 0.01)


def row(operation: Operation | str, which: str = FORWARD, sizes: Any = None, **setting: Any) -> Row:
    operation = OPERATIONS[operation] if isinstance(operation, str) else operation
    setting = {"device": HERE, "dtype": torch.float32, "machine": MACHINE} | setting
    clock = Clock(setting.pop("unit", 1.0))
    return measure.Bench(op_bench.Setting(**setting), clock).row(operation, sizes or TINY[operation.name], which)


def changed(name: str, ours: Callable[..., Any] | None = None, peers: Sequence[Peer] = (), **more: Any) -> Operation:
    operation = OPERATIONS[name]
    return replace(operation, ours=ours or operation.ours, peers=lambda device: list(peers), **more)


def test_a_product_by_hand() -> None:
    found = row("linear", sizes=(256, 1024, 1024), unit=107.3741824e-6)
    assert found.flops == {"fp32": 2 * 256 * 1024 * 1024}
    assert found.bytes == 4 * (256 * 1024 + 1024 * 1024 + 256 * 1024)
    # 536,870,912 FLOPs at 10¹³ a second.
    assert (found.roof_seconds, found.bound) == (pytest.approx(53.6870912e-6), "compute")
    assert found.share_of_roof == pytest.approx(0.5)
    assert found.share_of_ceiling == pytest.approx(1.0)
    assert found.by_compute and found.flop_per_s == pytest.approx(5e12)
    assert [(peer.name, peer.seconds) for peer in found.peers] == [("eager", pytest.approx(2 * 107.3741824e-6))]
    assert found.best_peer is found.peers[0] and found.speed_up == pytest.approx(2.0)
    assert found.ours.state == "right" and found.to_json()["pass"] == "forward"


def test_a_norm_by_hand() -> None:
    found = row("add_rms_norm", sizes=(512, 256), unit=1e-6)
    # x, residual and weight in; normed and sum out.
    assert found.bytes == 4 * (4 * 512 * 256 + 256)
    assert (found.roof_seconds, found.bound) == (pytest.approx(found.bytes / 1e12), "memory")
    assert found.share_of_ceiling == pytest.approx(2 * found.bytes / 1e12 / 1e-6)
    assert not found.by_compute and found.bytes_per_s == pytest.approx(found.bytes / 1e-6)
    back = row("add_rms_norm", BACKWARD, sizes=(512, 256))
    # Both incoming gradients, the sum and the weight in; one gradient for x and residual, and the weight's, out.
    assert back.bytes == 4 * (4 * 512 * 256 + 2 * 256)


def test_the_backward_of_softmax_moves_nothing_else() -> None:
    # Probabilities and their gradient in, the scores' out.
    assert row("softmax", BACKWARD, sizes=(512, 256)).bytes == 4 * 3 * 512 * 256


def test_a_pass_of_several_operations_takes_them_one_after_the_other() -> None:
    found = row("linear", BACKWARD, sizes=(256, 512, 1024))
    assert found.flops == {"fp32": 2 * 2 * 256 * 512 * 1024}
    assert found.roof_seconds == pytest.approx(2 * 2 * 256 * 512 * 1024 / 1e13)
    whole = row("linear_cross_entropy", WHOLE, sizes=(64, 16, 128))
    assert whole.flops["fp32"] > 6 * 64 * 16 * 128


def test_without_a_machine_there_is_no_roof() -> None:
    found = row("linear", machine=None, sizes=(256, 1024, 1024))
    assert found.roof_seconds is found.bound is found.share_of_roof is found.ceiling_seconds is None
    assert found.by_compute and not row("rms_norm", machine=None).by_compute


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_is_right_in_every_pass(name: str, dtype: torch.dtype) -> None:
    assert set(TINY) == set(SHAPES) == set(OPERATIONS)
    operation, sizes = OPERATIONS[name], TINY[name]
    for which in measure._passes(operation, sizes, True):
        found = row(operation, which, sizes, dtype=dtype)
        assert [(one.name, one.state, one.failure) for one in (found.ours, *found.peers)] == [
            (one.name, "right", "") for one in (found.ours, *found.peers)
        ]
        assert found.bytes > 0 and found.roof_seconds


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_shape_of_a_gpu_can_be_made_and_priced(name: str) -> None:
    operation = OPERATIONS[name]
    shapes = SHAPES[name].on(GPU, True)
    assert len({operation.label(*sizes) for sizes in shapes}) == len(shapes)
    assert set(SHAPES[name].on(GPU, False)) <= set(shapes)
    for sizes in shapes:
        force = batch.use(operation.batch(*sizes)) if operation.batch else contextlib.nullcontext()
        with FakeTensorMode(), torch.no_grad(), force:
            args = operation.make(Draw(HERE, torch.bfloat16, 0), *sizes)
            with Recorder() as recorder:
                operation.ours(*args)
        assert sum(record.cost.total_bytes for record in recorder.records) > 0


def test_inputs_take_turns_beyond_the_cache() -> None:
    clock = Clock()
    bench = measure.Bench(op_bench.Setting(HERE, torch.float32), clock)
    bench._cache = 1e6  # as a GPU's
    bench.row(OPERATIONS["rms_norm"], (64, 32), FORWARD)
    assert clock.turns == copies_beyond(1e6, 4 * (64 * 32 + 32)) > 100


def _first_row_missing(x: Any, weight: Any) -> Any:
    out = OPERATIONS["rms_norm"].ours(x, weight).clone()
    out[0] = float("nan")
    return out


RMS = OPERATIONS["rms_norm"].ours
WRONG: dict[str, tuple[Operation, str]] = {
    "off by a hundredth": (changed("rms_norm", lambda x, w: RMS(x, w) * 1.01), FORWARD),
    "not written": (changed("rms_norm", _first_row_missing), FORWARD),
    "another shape": (changed("rms_norm", lambda x, w: RMS(x, w)[1:]), FORWARD),
    "an output too few": (changed("add_rms_norm", lambda x, r, w: RMS(x + r, w)), FORWARD),
    "a wrong gradient": (changed("rms_norm", lambda x, w: RMS(2 * x - x.detach(), w)), BACKWARD),
    "the state unchanged": (changed("write_kv", lambda k, v, k_cache, v_cache, slots: (k_cache, v_cache)), FORWARD),
    "the next token": (changed("greedy", lambda logits: (logits.argmax(-1) + 1) % logits.shape[-1]), FORWARD),
    "the second likeliest": (changed("greedy", lambda logits: logits.topk(2).indices[:, 1]), FORWARD),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_result_is_told(what: str) -> None:
    found = row(*WRONG[what])
    assert found.ours.state == "wrong"
    assert found.ours.verdict and not found.ours.verdict.error <= found.ours.verdict.allowed
    assert found.peers[0].state == "right"
    result = op_bench.Result("cpu", "", "fp32", (), (found,))
    assert result.bad == [f"{found.label} (wrong)"]
    setting = op_bench.Setting(HERE, torch.float32, MACHINE)
    assert any("ours is WRONG" in note for note in measure._notes(setting, [found]))


def test_errors_up_to_twice_torchs_own_are_right() -> None:
    """A plain expression that rounds to bf16 on the way sets the measure; three times as far off is wrong."""

    def off(share: float) -> Callable[..., Any]:
        return lambda x, w: RMS(x, w) * (1 + share)

    operation = changed("rms_norm", off(1.5e-3), plain=off(1e-3), reference=OPERATIONS["rms_norm"].plain)
    assert row(operation).ours.state == "right"
    found = row(replace(operation, ours=off(3e-3)))
    assert found.ours.state == "wrong"
    assert found.ours.verdict and found.ours.verdict.allowed == pytest.approx(2e-3, rel=0.02)
    # A torch that is wrong altogether is no measure.
    found = row(replace(operation, ours=off(0.4), plain=off(0.3)))
    assert (found.ours.state, found.peers[0].state) == ("wrong", "wrong")


def _refuse(*_: Any) -> Any:
    raise Absent


def _break(*_: Any) -> Any:
    raise RuntimeError("no\nsuch kernel")


def test_peers_that_are_absent_fail_or_are_wrong() -> None:
    peers = [Peer("a", RMS, _refuse), Peer("b", _break), Peer("c", lambda x, w: x), Peer("d", RMS)]
    found = row(changed("rms_norm", peers=peers))
    assert [(peer.name, peer.state) for peer in found.peers] == [
        ("eager", "right"),
        ("b", "failed"),
        ("c", "wrong"),
        ("d", "right"),
    ]
    assert found.peers[1].failure == "RuntimeError: no such kernel"
    # The wrong one and the failed one are no peers to be measured against.
    assert found.best_peer and found.best_peer.name == "eager"
    assert [peer.name for peer in row(changed("rms_norm", peers=peers), peers=frozenset("d")).peers] == ["d"]
    assert not row("rms_norm", peers=frozenset()).peers


def test_what_fails_is_told_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "rms_norm", replace(SHAPES["rms_norm"], cpu=((8, 16),)))
    monkeypatch.setitem(SHAPES, "linear", replace(SHAPES["linear"], cpu=((1, 16, 16), (256, 16, 16))))
    said: list[str] = []
    operations = [changed("rms_norm", _break), changed("linear", reference=_break)]
    monkeypatch.setattr(measure, "_busy", lambda device: [])
    result = op_bench.run(operations, op_bench.Setting(HERE, torch.float32, None), Clock(), said.append)
    # One row of a norm and one of a product have no backward: that is decoding.
    assert [row.which for row in result.rows] == [FORWARD, FORWARD, FORWARD, BACKWARD]
    assert said == [row.label for row in result.rows]
    assert [row.ours.state for row in result.rows] == ["failed", "unchecked", "unchecked", "unchecked"]
    assert "not checked, for the reference failed: RuntimeError: no such kernel" in result.rows[1].ours.failure
    assert result.bad == [f"{result.rows[0].label} (failed)"]
    assert "rooflight probe" in result.notes[0] and len(result.notes) > 4
    no_backward = op_bench.Setting(HERE, torch.float32, None, backward=False)
    assert {row.which for row in op_bench.run([OPERATIONS["linear"]], no_backward, Clock()).rows} == {FORWARD}


def test_a_busy_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (2.5, 0.0, 0.0))
    assert "load 2.5 on 4 cores" in measure._busy(HERE)[0] and not measure._busy(GPU)
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (1.5, 9.0, 9.0))
    assert not measure._busy(HERE)


def test_choices_are_checked_over_many_rows() -> None:
    seen: list[int] = []

    def ours(logits: Any) -> Any:
        seen.append(logits.shape[0])
        return logits.argmax(-1)

    assert row(changed("greedy", ours), sizes=(1, 50)).ours.state == "right"
    assert seen[-1] == 128 and set(seen[:-1]) == {1}


def test_names() -> None:
    assert op_bench.chosen([]) == list(OPERATIONS.values())
    assert [operation.name for operation in op_bench.chosen(["SwiGLU", "rms-norm", "geglu"])] == [
        "gated_activation",
        "rms_norm",
    ]
    with pytest.raises(InvalidValue, match=r"'atention' is unknown; did you mean attention"):
        op_bench.chosen(["linear", "atention"])
    with pytest.raises(InvalidValue, match=r"'xyz' is unknown; use some of linear, rms_norm"):
        op_bench.chosen(["xyz"])


def test_the_machine_is_of_the_devices_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.host, "find_machine", lambda name, device: replace(CPU, kind="gpu"))
    assert measure.machine_for("", HERE) is None
    named = measure.machine_for("round-gpu", HERE)
    assert named and named.kind == "gpu"
    monkeypatch.setattr(measure.host, "find_machine", lambda name, device: CPU)
    assert measure.machine_for("", HERE) is CPU
