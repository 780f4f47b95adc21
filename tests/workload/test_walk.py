"""Walking each distinct layer once is exact, and the FLOPs of a walk are those of textbooks and of FlopCounterMode."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rooflight.errors import UntraceableModule
from rooflight.models.config import ModelConfig, MoE, Rope, layers_from, same_layers
from rooflight.workload import program, walk
from rooflight.workload.any_module import any_module
from rooflight.workload.memory import over_time
from rooflight.workload.program import Setting
from rooflight.workload.walk import Walk, expand, layer_of
from tests.workload.setups import FAMILIES, KINDS, PHASES, flops_by_component, llama, randomised, walked

BF16 = "bf16"


def expanded(found: Walk) -> list[tuple[Any, ...]]:
    """Every step of the whole run, with the layer of the whole that it is in."""
    records = found.trace.records
    return [(records[s.record].name, records[s.record].phase, records[s.record].cost, s.layer) for s in found.steps]


def plain(found: Walk) -> list[tuple[Any, ...]]:
    """Every record of an unfolded walk, with the layer of its own path; what has none belongs to its neighbours."""
    return [(r.name, r.phase, r.cost, layer_of(r.path)) for r in found.trace.records]


def check_folding(config: ModelConfig, setting: Setting) -> tuple[Walk, Walk]:
    folded, whole = walked(config, setting), walked(config, setting, fold=False)
    for ours, wanted in zip(expanded(folded), plain(whole), strict=True):
        # A table or a gradient's zeros may stand between layers without a path of its own.
        assert ours[:3] == wanted[:3]
        assert wanted[3] is None or ours[3] == wanted[3]
    assert folded.standing == whole.standing
    return folded, whole


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_walk_is_the_whole_walk(name: str, phase: str) -> None:
    config = FAMILIES[name]
    folded, whole = check_folding(config, Setting(phase, 2, 19))
    ours, wanted = over_time(folded, 1e9), over_time(whole, 1e9)
    assert (ours.total, ours.at_peak, ours.peak_label) == (wanted.total, wanted.at_peak, wanted.peak_label)
    assert [m.bytes for m in ours.timeline] == [m.bytes for m in wanted.timeline]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_a_folded_walk_is_the_whole_walk_with_recomputation(name: str, recompute: str) -> None:
    config = FAMILIES[name]
    folded, whole = check_folding(config, Setting("train", 2, 19, attention="naive", recompute=recompute))
    ours, wanted = over_time(folded, 1e9), over_time(whole, 1e9)
    # Where dense layers turn into sparse ones, a sparse layer's selective checkpoint lets its output go sooner than a
    # dense one's, which shows in the layer after: one hidden state a layer may stand too long in the folded walk.
    slack = len(config.layers) * 2 * 19 * config.width * 2 if name == "deepseek_v3" and recompute == "selective" else 0
    assert wanted.total <= ours.total <= wanted.total + slack


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3_moe-sparse-step", "deepseek_v2"])
def test_folding_is_exact_for_other_sizes_and_depths(name: str, seed: int) -> None:
    config = randomised(name, seed)
    # More layers in another order: repeats of a kind that are not neighbours.
    deeper = replace(config, layers=(*config.layers, *reversed(config.layers), *config.layers[1:]))
    folded, whole = check_folding(deeper, Setting("train", 3, 11))
    assert over_time(folded, 1e9).total == over_time(whole, 1e9).total
    assert len(folded.trace.records) < len(whole.trace.records)


def test_layers_of_a_kind_are_walked_once_and_the_first_apart() -> None:
    rope = Rope(10000.0, 8)
    config = llama(7)
    alternating = replace(config, layers=layers_from([4, 0] * 3 + [4], [rope] * 7, [False] * 7))
    for decoder, kinds in ((config, 2), (alternating, 3)):
        folded = walked(decoder, Setting("prefill", 1, 16))
        assert len({layer_of(r.path) for r in folded.trace.records} - {None}) == kinds
        layers = Counter(s.layer for s in folded.steps if folded.trace.records[s.record].name == "linear")
        assert [layers[i] for i in range(7)] == [4] * 7


def test_steps_without_layers_are_the_records_themselves() -> None:
    records = walked(llama(2), Setting("prefill", 1, 16)).trace.records
    assert [(s.record, s.layer) for s in expand(records, ())] == [(i, None) for i in range(len(records))]


def test_a_program_that_asks_for_values_is_refused_in_one_line() -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    def build() -> program.Program:
        return any_module(Branches(), (torch.zeros(3),), Setting("prefill"))

    with pytest.raises(UntraceableModule, match="cannot be run on fake tensors") as caught:
        walk.dry(build)
    assert "\n" not in str(caught.value)


def pairs(queries: int, context: int, window: int = 0) -> int:
    """Key–query pairs that meet, by counting them."""
    first = context - queries
    seen = [range(max(0, q - window + 1) if window else 0, q + 1) for q in range(first, context)]
    return sum(len(keys) for keys in seen)


def by_hand(config: ModelConfig, phase: str, batch: int, context: int, naive: bool) -> dict[str, int]:
    """FLOPs of every matrix product in prefill or decode, by component: 2 for each weight and token, or each pair."""
    query = 1 if phase == "decode" else context
    tokens, width, heads, dim = batch * query, config.width, config.heads, config.head_dim
    found: Counter[str] = Counter()
    for kind in config.layers:
        met = query * context if naive else pairs(query, context, kind.window)
        if config.latent is not None:
            z = config.latent
            # The compressed query, latent and rope key; the query's way back up.
            found["QKV"] += 2 * tokens * width * ((z.q_rank or 0) + z.kv_rank + z.rope_dim)
            found["QKV"] += 2 * tokens * (z.q_rank or width) * heads * (z.nope_dim + z.rope_dim)
            # Whole sequences rebuild keys and values; over the cache the same weights meet query and output instead.
            found["QKV"] += 2 * tokens * z.kv_rank * heads * (z.nope_dim + z.value_dim)
            absorbed = phase == "decode"
            found["scores"] += 2 * batch * heads * met * ((z.kv_rank if absorbed else z.nope_dim) + z.rope_dim)
            found["context"] += 2 * batch * heads * met * (z.kv_rank if absorbed else z.value_dim)
            found["output projection"] += 2 * tokens * heads * z.value_dim * width
        else:
            found["QKV"] += 2 * tokens * width * (heads + 2 * config.kv_heads) * dim
            found["scores"] += 2 * batch * heads * met * dim
            found["context"] += 2 * batch * heads * met * dim
            found["output projection"] += 2 * tokens * heads * dim * width
        products = 3 if config.gated else 2
        if kind.sparse and config.moe is not None:
            moe = config.moe
            found["routing"] += 2 * tokens * width * moe.experts
            found["feed-forward"] += 2 * tokens * width * 3 * (moe.top_k * moe.width + moe.shared_width)
        else:
            found["feed-forward"] += 2 * tokens * width * products * config.ffn_width
    # Only the last token of each sequence is asked for the next one.
    found["head"] += 2 * batch * width * config.vocab_size
    return dict(found)


# In bf16 products stand under "bf16" and elementwise work under "fp32", so that the two can be told apart.
@pytest.mark.parametrize("attention", ["flash", "naive"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", FAMILIES)
def test_products_are_those_of_the_textbook(name: str, phase: str, attention: str) -> None:
    config, setting = FAMILIES[name], Setting(phase, 3, 19, attention=attention)
    found = flops_by_component(walked(config, setting), BF16)
    assert found == by_hand(config, phase, 3, 19, naive=attention == "naive")


@pytest.mark.parametrize("name", ["llama2", "qwen3", "gemma3", "mixtral", "deepseek_v3", "gpt2"])
def test_a_training_step_is_three_forwards_and_flash_attention_three_and_a_half(name: str) -> None:
    """Backward is two products for one; flash attention computes the scores again: five products for two."""
    config = FAMILIES[name]
    forward = by_hand(config, "prefill", 2, 19, naive=False)
    # The loss needs the logits of every token.
    forward["head"] *= 19
    wanted = {component: 3 * flops for component, flops in forward.items()}
    wanted["scores"] = 4 * forward["scores"]
    setting = Setting("train", 2, 19, optimizer="none")
    assert flops_by_component(walked(config, setting), BF16) == wanted
    wanted["scores"] = 3 * forward["scores"]
    naive = flops_by_component(walked(config, replace(setting, attention="naive")), BF16)
    wanted |= {part: 3 * by_hand(config, "prefill", 2, 19, naive=True)[part] for part in ("scores", "context")}
    assert naive == wanted


def test_six_n_t() -> None:
    """A step of a model with long vectors and a short context is 6·N·T to within the attention (2001.08361)."""
    config = llama(4, width=256, heads=4, kv_heads=4, head_dim=64, ffn_width=1024, vocab_size=512)
    matrices = 4 * (4 * 256 * 256 + 3 * 256 * 1024) + 512 * 256
    found = flops_by_component(walked(config, Setting("train", 8, 16, optimizer="none")), BF16)
    attention = found.pop("scores") + found.pop("context")
    assert sum(found.values()) == 6 * matrices * 8 * 16
    assert attention < 0.05 * sum(found.values())


def theirs(config: ModelConfig) -> LlamaForCausalLM:
    llama_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=len(config.layers),
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        use_cache=False,
    )
    llama_config._attn_implementation = "eager"
    return LlamaForCausalLM(llama_config)


def without_rotary(counter: FlopCounterMode) -> int:
    """All products but the rotary table's, which some releases of transformers write as a matrix product."""
    by_module = counter.get_flop_counts()
    rotary = sum(sum(found.values()) for name, found in by_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("sizes", [{}, {"width": 48, "heads": 6, "kv_heads": 1, "head_dim": 16, "ffn_width": 80}])
def test_products_are_what_flop_counter_mode_sees_in_transformers(sizes: dict[str, int]) -> None:
    """It counts matrix products, and eager attention over the full T×T: just what naive attention runs."""
    config, batch, context = llama(3, **sizes), 2, 24
    model, tokens = theirs(config), torch.zeros((batch, context), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, logits_to_keep=1)
    prefill = walked(config, Setting("prefill", batch, context, attention="naive"))
    assert sum(flops_by_component(prefill, BF16).values()) == without_rotary(counter)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    step = walked(config, Setting("train", batch, context, attention="naive", optimizer="none"))
    assert sum(flops_by_component(step, BF16).values()) == without_rotary(counter)


def test_flop_counter_mode_sees_the_same_products_in_our_own_wet_run() -> None:
    config = llama(2)
    setting = Setting("prefill", 2, 24, "fp32", attention="naive")
    model = program.build_model(config, "fp32", "cpu").initialize()
    run = program.decoder(config, setting, "cpu", fold=False, model=model)

    class Inner(TorchDispatchMode):
        """Takes our operations apart, so that the counter below sees what they run."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            from rooflight.ops.op import find

            op = find(func)
            return func(*args, **(kwargs or {})) if op is None else op.reference(*args, **(kwargs or {}))

    with FlopCounterMode(display=False) as counter, Inner():
        run.step(None)
    wanted = by_hand(config, "prefill", 2, 24, naive=True)
    assert counter.get_total_flops() == sum(wanted.values())


def test_experts_beyond_the_chosen_cost_nothing_and_the_chosen_their_share() -> None:
    base = llama(2)
    sparse = replace(base, layers=same_layers(2, 0, base.layers[0].rope, sparse=True))

    def work(experts: int, top_k: int) -> int:
        config = replace(sparse, moe=MoE(experts=experts, top_k=top_k, width=24))
        return flops_by_component(walked(config, Setting("prefill", 2, 16)), BF16)["feed-forward"]

    assert work(16, 2) == work(4, 2)
    assert work(16, 4) == 2 * work(16, 2)
