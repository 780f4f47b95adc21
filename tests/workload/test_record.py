"""The recorder: where each operation belongs, what recomputation repeats, and that wet and dry do the same work."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from rooflight.errors import UnpricedOp
from rooflight.ops.collective import all_reduce
from rooflight.workload.memory import over_time
from rooflight.workload.program import Setting
from rooflight.workload.record import BACKWARD, COMMUNICATION, FORWARD, OPTIMIZER, RECOMPUTE, Record, Recorder
from rooflight.workload.walk import Walk, fake_tensors
from tests.workload.setups import FAMILIES, KINDS, PHASES, llama, randomised, run_wet, walked

LAYER = (
    ("attention_norm", "add_rms_norm", "norm and residual"),
    ("attention.qkv", "linear", "QKV"),
    ("attention", "rotary_qkv", "QKV"),
    ("attention", "attention", "QKV"),
    ("attention.out", "linear", "output projection"),
    ("ffn_norm", "add_rms_norm", "norm and residual"),
    ("ffn.up", "linear", "feed-forward"),
    ("ffn", "gated_activation", "feed-forward"),
    ("ffn.down", "linear", "feed-forward"),
)
CHEAP = {"add_rms_norm", "rotary_qkv", "gated_activation"}


def train(recompute: str = "none", attention: str = "flash", layers: int = 3) -> Walk:
    setting = Setting("train", 2, 16, recompute=recompute, attention=attention)
    return walked(llama(layers), setting, fold=False)


def of(walk: Walk, phase: str, *names: str) -> list[Record]:
    return [r for r in walk.trace.records if r.phase == phase and (not names or r.name in names)]


def places(records: list[Record]) -> list[tuple[str, str, str]]:
    """(path below layer 1, name, component) of what belongs to layer 1."""
    return [(r.path.removeprefix("layers.1."), r.name, r.component) for r in records if r.path.startswith("layers.1")]


def test_forward_operations_stand_in_order_at_their_module_paths() -> None:
    walk = train()
    assert places(of(walk, FORWARD)) == list(LAYER)
    outside = [(r.path, r.name) for r in of(walk, FORWARD) if not r.path.startswith("layers")]
    assert outside[:2] == [("embedding", "embedding"), ("", "rotary_table")]
    assert outside[2:4] == [("norm", "add_rms_norm"), ("head", "linear_cross_entropy_with_grad")]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["flash", "naive"])
def test_backward_operations_belong_to_the_module_of_their_forward(recompute: str, attention: str) -> None:
    walk = train(recompute, attention)
    forward = Counter((r.path, r.component) for r in of(walk, FORWARD, "linear"))
    # Every linear has two gradients, each at the path of the linear itself, recomputed or not.
    for name in ("linear_input_grad", "linear_weight_grad"):
        assert Counter((r.path, r.component) for r in of(walk, BACKWARD, name)) == forward
    for name, back in (
        ("gated_activation", "gated_activation_backward"),
        ("attention", "attention_backward"),
        ("attention_scores", "attention_scores_backward"),
        ("attention_softmax", "attention_softmax_backward"),
        ("rotary_qkv", "rotary_qkv_backward"),
        ("embedding", "embedding_backward"),
    ):
        assert Counter(r.path for r in of(walk, BACKWARD, back)) == Counter(r.path for r in of(walk, FORWARD, name))
    norms = of(walk, FORWARD, "rms_norm", "add_rms_norm")
    assert Counter(r.path for r in of(walk, BACKWARD, "rms_norm_backward")) == Counter(r.path for r in norms)
    # Only the gradient of the loss itself has no module.
    assert {r.name for r in walk.trace.records if not r.path} <= {"rotary_table", "aten.ones_like", "adamw"}


def test_backwards_run_from_the_last_layer_to_the_first() -> None:
    layers = [int(r.path.split(".")[1]) for r in of(train(), BACKWARD) if r.path.startswith("layers.")]
    assert layers == sorted(layers, reverse=True)
    assert set(layers) == {0, 1, 2}


# Stands where a product that nobody needs was left out: memory without contents.
EMPTY = "aten.new_empty"


def test_nothing_is_recomputed_unless_asked() -> None:
    assert not of(train(), RECOMPUTE)


def test_selective_recomputes_norms_rotary_and_activation_but_no_product() -> None:
    walk = train("selective")
    assert places(of(walk, RECOMPUTE)) == [place for place in LAYER if place[1] in CHEAP]
    naive = {name for _, name, _ in places(of(train("selective", "naive"), RECOMPUTE))}
    assert naive - CHEAP == {"attention_scores", "attention_softmax", "attention_context"}


def test_full_recomputes_every_operation_that_a_backward_needs_and_nothing_else() -> None:
    walk = train("full")
    # A layer adds its output to the stream itself, so that one tensor enters the next: its first norm has nothing to
    # add. The last product and the sum, which no backward needs, are all that is not run again.
    assert LAYER[-1][:2] == ("ffn.down", "linear")
    again = [r for r in of(walk, RECOMPUTE) if r.name != EMPTY]
    assert places(again) == [("attention_norm.norm", "rms_norm", "norm and residual"), *LAYER[1:-1]]
    first = Counter((r.path, r.name) for r in of(walk, FORWARD) if r.path.startswith("layers."))
    left_out = [(f"layers.{i}", "aten.add") for i in range(3)] + [(f"layers.{i}.ffn.down", "linear") for i in range(3)]
    assert first - Counter((r.path, r.name) for r in again) == Counter(left_out)
    assert not Counter((r.path, r.name) for r in again) - first
    assert not any(r.cost.total_flops or r.cost.total_bytes for r in of(walk, RECOMPUTE) if r.name == EMPTY)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_recomputed_operation_costs_what_it_cost_at_first_and_shows_twice(recompute: str) -> None:
    walk = train(recompute)
    first = {(r.path, r.name): r.cost for r in of(walk, FORWARD)}
    for record in of(walk, RECOMPUTE):
        if record.name != EMPTY:
            assert record.cost == first[record.path, record.name]
    norms = [r for r in walk.trace.records if r.name in ("rms_norm", "add_rms_norm")]
    # Two in each of three layers, run twice, and the last one, which no layer holds, once.
    assert len(norms) == 2 * 2 * 3 + 1
    assert len(of(train(), FORWARD, "rms_norm", "add_rms_norm")) == 2 * 3 + 1


def test_recompute_changes_neither_forward_nor_backward_nor_optimizer() -> None:
    def work(walk: Walk) -> list[tuple[str, str, str, Any]]:
        return [(r.phase, r.path, r.name, r.cost) for r in walk.trace.records if r.phase != RECOMPUTE]

    assert work(train("selective")) == work(train())

    def products(walk: Walk) -> list[tuple[str, str, str, Any]]:
        return [entry for entry in work(walk) if entry[3].size and "bf16" in entry[3].flops]

    # With full recomputation the residual is added elsewhere; every product is where it was.
    assert products(train("full")) == products(train())


def test_the_optimizer_is_one_operation_of_its_own_phase() -> None:
    # Norms do not decay: they are a call of their own.
    matrices, norms = of(train(), OPTIMIZER)
    assert matrices.name == norms.name == "adamw"
    assert matrices.cost.size == (64 * 32 * 2 + 3 * (32 * 64 + 32 * 32 + 32 * 96 + 48 * 32),)
    assert norms.cost.size == (32 + 3 * 2 * 32,)


class Sharded(nn.Module):
    component = "feed-forward"

    def __init__(self, group: str):
        super().__init__()
        self.inner, self.group = nn.Linear(8, 8), group

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(self.inner(x), self.group)


def test_collectives_are_communication_wherever_they_stand() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        model = nn.Sequential(Sharded(dist.distributed_c10d._get_default_group().group_name))
        with fake_tensors(), Recorder(model) as recorder:
            model(torch.empty(4, 8))
    finally:
        dist.destroy_process_group()
    (reduce,) = [r for r in recorder.records if r.phase == COMMUNICATION]
    assert (reduce.name, reduce.path) == ("all_reduce", "0")
    # A ring sends 2·(n−1)/n of the message.
    assert reduce.cost.link_bytes == 2 * 3 * (4 * 8 * 4) // 4
    assert all(r.phase == FORWARD for r in recorder.records if r is not reduce)


WIDE = """
import resource
from rooflight.models.config import ModelConfig, Rope, same_layers
from rooflight.workload import program, walk
layers = same_layers(3, 0, Rope(10000.0, 128))
wide = ModelConfig("llama", 128256, 65536, 512, 64, 128, 4 * 65536, layers, 8192)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# Its smallest weight takes more than this: one real tensor would end the run.
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**30, resource.RLIM_INFINITY))
found = walk.dry(lambda: program.decoder(wide, program.Setting("train", 8, 8192), "cpu", fold=False))
print(sum(found.standing.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_block_of_width_65536_takes_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    standing, grown_kib = map(int, done.stdout.split())
    assert standing > 10**12
    assert grown_kib < 200 * 1024


def test_an_operation_without_a_price_is_refused_by_name_and_shapes() -> None:
    with torch.library._scoped_library("rooflight_test", "FRAGMENT") as library:
        library.define("mystery(Tensor x, Tensor y) -> Tensor")
        library.impl("mystery", lambda x, y: x + y, "CPU")
        call = torch.ops.rooflight_test.mystery
        with pytest.raises(UnpricedOp, match=r"mystery") as caught, Recorder():
            call(torch.zeros(3, 5), torch.zeros(7, 3, 5))
    text = str(caught.value)
    assert "rooflight_test" in text
    assert "3, 5" in text and "7, 3, 5" in text
    assert "\n" not in text


def test_a_composite_is_priced_by_its_pieces_under_inference_mode_too() -> None:
    """Under inference mode the dispatcher hands composites over whole; elsewhere it has taken them apart by then.

    matmul has a price of its own there, so the prices are compared and not the names.
    """
    y_BHQE = torch.zeros(3, 2, 5, 4)

    def run(mode: Any) -> list[tuple[str, Any]]:
        with mode, Recorder() as recorder:
            scores = torch.matmul(y_BHQE, y_BHQE.transpose(-1, -2)).softmax(-1)
            torch.einsum("bhqk,bhke->bqhe", scores, y_BHQE).var(dim=-1)
            torch.nn.functional.cross_entropy(y_BHQE.flatten(0, 2), torch.zeros(30, dtype=torch.int64))
        return [(r.name, r.cost) for r in recorder.records]

    plain, whole = run(torch.no_grad()), run(torch.inference_mode())
    assert [cost for _, cost in whole] == [cost for _, cost in plain]
    assert [cost.flops["fp32"] for name, cost in plain if name == "aten.bmm"] == [2 * 6 * 5 * 5 * 4] * 2
    assert "aten._softmax" in dict(whole) and "aten.nll_loss_forward" in dict(whole)


SMALL = {**{name: FAMILIES[name] for name in KINDS}, **{f"{name}*": randomised(name, 1) for name in KINDS}}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SMALL)
def test_a_wet_run_does_what_the_dry_one_said(name: str, phase: str) -> None:
    """The same operations at the same places with the same prices, in the same order, and the same memory."""
    for attention in ("flash", "naive") if name in KINDS else ("flash",):
        setting = Setting(phase, 2, 19, "fp32", attention=attention)
        _equal(walked(SMALL[name], setting, fold=False), run_wet(SMALL[name], setting))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_a_wet_run_recomputes_what_the_dry_one_said(name: str, recompute: str) -> None:
    setting = Setting("train", 2, 19, "fp32", recompute=recompute)
    _equal(walked(FAMILIES[name], setting, fold=False), run_wet(FAMILIES[name], setting))


def _equal(dry: Walk, wet: Walk) -> None:
    def facts(walk: Walk) -> list[tuple[Any, ...]]:
        return [(r.name, r.path, r.component, r.phase, r.cost, r.shapes) for r in walk.trace.records]

    for ours, theirs in zip(facts(dry), facts(wet), strict=True):
        assert ours == theirs
    assert dry.standing == wet.standing
    assert over_time(dry, 1e9).total == over_time(wet, 1e9).total


def test_the_clock_times_every_operation() -> None:
    ticks = iter(range(1000))
    with Recorder(clock=lambda: float(next(ticks))) as recorder:
        torch.add(torch.zeros(4), torch.ones(4))
    assert [r.seconds for r in recorder.records] == [1.0] * len(recorder.records)
    assert len(recorder.records) == 3


def test_a_tensor_without_elements_is_no_operation() -> None:
    """torch 2.11's checkpoint makes one before each layer, where 2.13's makes none."""

    class Dummy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.empty((0,)).sum() + torch.empty((3,)).sum()

    recorder = Recorder(module := Dummy())
    with recorder:
        module(torch.zeros(3))
    assert [record.name for record in recorder.trace().records].count("aten.empty") == 1
