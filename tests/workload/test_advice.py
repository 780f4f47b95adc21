"""Advice: what a line promises is what `explain` says of the changed program, and unfused modules are told so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rooflight.hardware.figures import Link
from rooflight.models.config import ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.workload import program
from rooflight.workload.advice import fusion
from rooflight.workload.any_module import any_module
from rooflight.workload.explain import explain_decoder, explain_module
from rooflight.workload.explanation import Advice, Explanation
from rooflight.workload.program import Setting
from rooflight.workload.roofline import time_walk
from tests.workload.machines import BANDWIDTH, GPU, GRAPH, changed
from tests.workload.setups import FAMILIES, PHASES, llama, walked

# Wide enough for the work, and not the launches, to decide.
MODEL = llama(4, width=512, heads=16, kv_heads=16, head_dim=32, ffn_width=2048, vocab_size=1024)
SMALL_MEMORY = changed(GPU, memory_bytes=1e6)


@pytest.fixture(autouse=True)
def no_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of an explanation's time and have tests of their own."""
    monkeypatch.setattr("rooflight.workload.explain._write_formulas", lambda *_: None)


@cache
def explained(config: ModelConfig, setting: Setting) -> Explanation:
    return explain_decoder("model", config, SMALL_MEMORY, setting)


def line(found: Explanation, start: str) -> Advice:
    (advice,) = [advice for advice in found.advice if advice.change.startswith(start)]
    return advice


DECODE = Setting("decode", 4, 4096)
PREFILL = Setting("prefill", 2, 1024)
TRAIN = Setting("train", 2, 1024, optimizer="adamw-master")


@pytest.mark.parametrize(
    ("setting", "start", "changes"),
    [
        (replace(PREFILL, attention="naive"), "flash attention", {"attention": "flash"}),
        (replace(TRAIN, attention="naive"), "flash attention", {"attention": "flash"}),
        (replace(DECODE, attention="naive"), "flash attention", {"attention": "flash"}),
        (DECODE, "FP8 KV cache", {"kv_dtype": "fp8"}),
        (PREFILL, "FP8 KV cache", {"kv_dtype": "fp8"}),
        (TRAIN, "recompute activations (--recompute selective)", {"recompute": "selective"}),
        (TRAIN, "recompute activations (--recompute full)", {"recompute": "full"}),
        (replace(TRAIN, recompute="full"), "recompute less (--recompute selective)", {"recompute": "selective"}),
        (TRAIN, "optimizer states in bf16", {"optimizer": "adamw-bf16"}),
    ],
)
def test_a_change_saves_what_explain_says_of_the_changed_program(
    setting: Setting, start: str, changes: dict[str, str]
) -> None:
    before, after = explained(MODEL, setting), explained(MODEL, replace(setting, **changes))
    advice = line(before, start)
    assert advice.saves_seconds == pytest.approx(before.totals.expected_seconds - after.totals.expected_seconds)
    assert advice.saves_bytes == pytest.approx(before.memory.total - after.memory.total)
    # It is worth a line: it wins time or memory.
    assert advice.saves_seconds > 0 or advice.saves_bytes > 0
    # The option that it names is the one that was changed.
    assert all(value in advice.change for value in changes.values())


def test_signs_are_those_of_a_trade() -> None:
    train = explained(MODEL, TRAIN)
    for kind in ("selective", "full"):
        advice = line(train, f"recompute activations (--recompute {kind})")
        assert advice.saves_seconds < 0 < advice.saves_bytes
    assert (
        line(train, "recompute activations (--recompute full)").saves_bytes
        > line(train, "recompute activations (--recompute selective)").saves_bytes
    )
    naive = line(explained(MODEL, replace(PREFILL, attention="naive")), "flash attention")
    assert naive.saves_seconds > 0 and naive.saves_bytes > 0
    # Four bytes of moments a parameter, and the four of the master.
    states = line(train, "optimizer states in bf16")
    assert states.saves_bytes == pytest.approx(8 * parameter_counts(MODEL)["total"], rel=0.01)


def test_a_larger_batch_saves_time_a_sequence() -> None:
    before, after = explained(MODEL, DECODE), explained(MODEL, replace(DECODE, batch=32))
    advice = line(before, "larger batch (--batch 32)")
    assert advice.saves_seconds == pytest.approx(before.totals.expected_seconds - after.totals.expected_seconds / 8)
    assert advice.saves_bytes == pytest.approx(before.memory.total - after.memory.total)
    assert advice.saves_bytes < 0


def test_fewer_key_heads_shrink_the_cache_eightfold() -> None:
    before, after = explained(MODEL, DECODE), explained(replace(MODEL, kv_heads=2), DECODE)
    advice = line(before, "grouped-query attention with 2 key heads")
    assert advice.saves_seconds == pytest.approx(before.totals.expected_seconds - after.totals.expected_seconds)
    assert after.memory.kv_cache == before.memory.kv_cache / 8


def test_quantized_weights_save_the_bytes_of_the_linears_and_not_more_than_their_time() -> None:
    found = explained(MODEL, DECODE)
    # Every weight matrix but the embedding, of which a step reads a row for each token.
    linears = 4 * (4 * 512 * 512 + 3 * 512 * 2048) + 1024 * 512
    for name, bytes_less in (("FP8 or INT8 weights", 1.0), ("INT4 weights", 1.5)):
        advice = line(found, name)
        assert advice.saves_bytes == pytest.approx(bytes_less * linears)
        # At most what those bytes take at full bandwidth: the arithmetic and the launches stay.
        assert 0 < advice.saves_seconds <= bytes_less * linears / BANDWIDTH * (1 + 1e-9)
        assert found.totals.expected_seconds - advice.saves_seconds > len(found.points) * GRAPH


def test_ranks_pay_for_their_all_reduces() -> None:
    wire = Link("wire", 1e-6, 1e13, 8, "test")
    machine = replace(SMALL_MEMORY, links={"wire": wire})
    scale = MODEL.head_dim**-0.5
    part = replace(MODEL, heads=8, kv_heads=8, ffn_width=1024, vocab_size=512, attention_scale=scale)
    before, after = (explain_decoder("model", config, machine, PREFILL) for config in (MODEL, part))
    advice = line(before, "split over 2 ranks")
    # Two all-reduces a layer of 2·1024 tokens · 512 · 2 bytes; on a ring of two each rank sends the message once.
    ring = 2 * wire.latency_seconds + 2 * 1024 * 512 * 2 / wire.bandwidth_bytes_per_s
    gain = before.totals.expected_seconds - after.totals.expected_seconds - 2 * 4 * ring
    assert advice.saves_seconds == pytest.approx(gain)
    assert advice.saves_bytes == pytest.approx(before.memory.total - after.memory.total)


SETTINGS = (DECODE, PREFILL, TRAIN, replace(PREFILL, attention="naive"), replace(TRAIN, recompute="full"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_is_promised_that_is_not_there(setting: Setting) -> None:
    found = explained(MODEL, setting)
    assert found.advice
    for advice in found.advice:
        # What is left takes time and memory still, and a program with less work has a lower roof, never none.
        assert advice.saves_seconds < found.totals.expected_seconds, advice.change
        assert advice.saves_bytes < found.memory.total, advice.change
        assert advice.saves_seconds > 0 or advice.saves_bytes > 0, advice.change
        assert advice.why
    order = [advice.saves_seconds for advice in found.advice]
    assert order == sorted(order, reverse=True)


def test_what_is_done_already_is_not_advised() -> None:
    starts = {a.change for a in explained(MODEL, replace(DECODE, kv_dtype="fp8")).advice}
    assert not any("KV cache" in change for change in starts)
    assert not any("flash" in change for setting in (DECODE, PREFILL, TRAIN) for change in changes_of(setting))
    assert not any("optimizer" in change for change in changes_of(replace(TRAIN, optimizer="adamw-bf16")))
    assert not any("recompute" in change for change in changes_of(replace(TRAIN, recompute="selective")))
    assert not any("grouped-query" in a.change for a in explained(replace(MODEL, kv_heads=2), DECODE).advice)


def changes_of(setting: Setting) -> list[str]:
    return [advice.change for advice in explained(MODEL, setting).advice]


def test_memory_alone_is_worth_a_line_only_where_it_is_short() -> None:
    roomy = explain_decoder("model", MODEL, changed(GPU, memory_bytes=1e15), TRAIN)
    assert not any("recompute" in advice.change for advice in roomy.advice)
    assert any("recompute" in change for change in changes_of(TRAIN))


class Unfused(nn.Module):
    """A block as people write it first: three projections, and a residual, norm and activation step by step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        q, k, v = self.q(h), self.k(h), self.v(h)
        a = F.gelu(q * k + v)
        a = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6)
        return a * self.weight


class Fused(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x * 1.5)


def module(make: Callable[[int], nn.Module]) -> Explanation:
    def build() -> program.Program:
        return any_module(make(1024), (torch.zeros(2048, 1024),), Setting("prefill", dtype="fp32"))

    return explain_module("module", build, GPU, Setting("prefill", dtype="fp32"))


def test_an_unfused_module_is_told_to_fuse() -> None:
    found = module(Unfused)
    changes = [advice.change for advice in found.advice]
    assert any(change.startswith("fuse") for change in changes), changes
    assert any(change.startswith("merge 1 groups") for change in changes), changes
    light = sum(row.expected_seconds for row in found.points if row.primitive in ("elementwise", "reduction"))
    fuse = line(found, "fuse")
    # It cannot win more than the light operations take.
    assert 0 < fuse.saves_seconds < light


def test_merged_projections_read_their_input_once() -> None:
    found = module(Unfused)
    merge = line(found, "merge")
    # Compute is the bound here, so what is left to win is two of three launches and floors.
    assert 0 < merge.saves_seconds <= 2 * (2048 * 1024 * 4) / BANDWIDTH + 2 * (10e-6 + GRAPH) + 1e-9


def test_a_fused_module_is_not() -> None:
    assert module(Fused).advice == []


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["llama3", "mistral", "phi3", "mixtral"])
def test_our_own_decoder_is_fused_already(name: str, phase: str) -> None:
    config = replace(FAMILIES[name], name=name)
    timed = time_walk(walked(config, Setting(phase, 2, 64)), GPU, graph=False)
    found = list(fusion(timed, GPU))
    assert not any("merge" in advice.change for advice in found)
    if phase != "train":
        assert found == []


def test_the_optimizer_is_no_part_of_a_chain() -> None:
    """A tied embedding's two gradients are added right before the optimizer reads them: that is not a chain to fuse."""
    config = FAMILIES["qwen2"]
    assert config.tied

    def chains(optimizer: str) -> list[str]:
        timed = time_walk(walked(config, Setting("train", 2, 64, optimizer=optimizer)), GPU, graph=False)
        return [advice.change for advice in fusion(timed, GPU)]

    assert chains("adamw") == chains("none")
