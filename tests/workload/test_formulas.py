"""Formulas: with the sizes put in, each gives exactly the FLOPs that the concrete walk counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from rooflight.models.config import ModelConfig
from rooflight.workload.formulas import component_formulas
from rooflight.workload.program import Setting
from tests.workload.setups import FAMILIES, PHASES, flops_by_component, llama, randomised, walked

_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def sizes_of(config: ModelConfig, setting: Setting) -> dict[str, Fraction]:
    sizes = {
        "B": setting.batch,
        "T": 1 if setting.phase == "decode" else setting.context,
        "S": setting.context,
        "L": len(config.layers),
        "D": config.width,
        "H": config.heads,
        "K": config.kv_heads,
        "E": config.head_dim,
        "F": config.ffn_width,
        "V": config.vocab_size,
    }
    return {name: Fraction(size) for name, size in sizes.items()}


def value(formula: str, sizes: dict[str, Fraction]) -> Fraction:
    """What a printed formula says, read as a person reads it; its only names are those of the legend."""
    text = re.sub(f"[{_DIGITS}]+", lambda m: "**" + "".join(str(_DIGITS.index(c)) for c in m.group()), formula)
    text = re.sub(r"⌈(.*?)/(\d+)⌉", r"ceiling(\1, \2)", text.replace("·", "*"))
    text = re.sub(r"(?<![\w*])(\d+)", r"whole(\1)", text)
    known: dict[str, Callable[..., Any]] = {
        "whole": Fraction,
        "ceiling": lambda a, b: Fraction(-(-a // b)),
        "Δ": lambda n: n * (n + 1) / 2 if n > 0 else Fraction(0),
        "Min": min,
        "Max": max,
    }
    return eval(text, {"__builtins__": {}, **known, **sizes})


def check(traced: ModelConfig, at: Setting, config: ModelConfig, setting: Setting) -> None:
    """The formulas of one model at one setting, with the sizes of another put in, against the other's own walk."""
    formulas = component_formulas(traced, at)
    counted = flops_by_component(walked(config, replace(setting, optimizer="none")))
    sizes = sizes_of(config, setting)
    assert {name: value(text, sizes) for name, text in formulas.items()} == counted


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_a_formula_gives_the_counted_flops(name: str, phase: str) -> None:
    setting = Setting(phase, 2, 19)
    check(FAMILIES[name], setting, FAMILIES[name], setting)


@pytest.mark.parametrize(("name", "phase"), [("llama3", "train"), ("gemma2", "decode"), ("deepseek_v2", "prefill")])
def test_a_formula_gives_the_counted_flops_of_naive_attention(name: str, phase: str) -> None:
    setting = Setting(phase, 2, 19, attention="naive")
    check(FAMILIES[name], setting, FAMILIES[name], setting)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["flash", "naive"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_formula_gives_the_counted_flops_in_every_family(name: str, phase: str, attention: str) -> None:
    setting = Setting(phase, 3, 21, attention=attention)
    check(FAMILIES[name], setting, FAMILIES[name], setting)


@pytest.mark.parametrize("recompute", ["full"])
def test_a_formula_counts_what_is_recomputed(recompute: str) -> None:
    setting = Setting("train", 2, 19, recompute=recompute)
    check(FAMILIES["qwen3"], setting, FAMILIES["qwen3"], setting)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["mistral"])
def test_a_formula_holds_for_other_sizes_than_those_it_was_traced_at(name: str, phase: str) -> None:
    """More sequences, a longer context than the windows, other widths and heads: the text is the model's, not a fit."""
    other = randomised(name, 5)
    assert other != FAMILIES[name]
    check(FAMILIES[name], Setting(phase, 2, 19), other, Setting(phase, 5, 44))


def test_the_number_of_layers_is_a_symbol_too() -> None:
    setting = Setting("prefill", 2, 19)
    check(llama(3), setting, llama(11), setting)


def test_the_formulas_of_a_plain_decoder_read_as_in_textbooks() -> None:
    found = component_formulas(llama(4), Setting("prefill", 2, 64, attention="naive"))
    assert found["QKV"] == "2·B·D·E·L·T·(H + 2·K)"
    assert found["output projection"] == "2·B·D·E·H·L·T"
    assert found["context"] == "2·B·E·H·L·T²"
    decode = component_formulas(llama(4), Setting("decode", 2, 64))
    assert decode["QKV"] == "2·B·D·E·L·(H + 2·K)"
    assert decode["head"] == "2·B·D·V"


def test_attention_grows_with_the_square_of_the_context_and_feed_forward_with_the_widths() -> None:
    """Scores and context are O(T²·d), feed-forward O(T·d·F): seen in the formulas' growth, not in their spelling."""
    config, setting = llama(4, head_dim=64, width=256), Setting("train", 2, 64, optimizer="none")
    formulas = component_formulas(config, setting)
    base = sizes_of(config, setting)

    def growth(component: str, **changes: int) -> float:
        large = {name: size * 2**20 for name, size in base.items()}
        changed = {name: large[name] * factor for name, factor in changes.items()}
        return float(value(formulas[component], large | changed) / value(formulas[component], large))

    for component in ("scores", "context"):
        assert growth(component, T=2) == pytest.approx(4, rel=1e-5)
        assert growth(component, E=2) == pytest.approx(2, rel=1e-5)
        assert growth(component, F=2, V=2, D=2) == 1
    assert growth("feed-forward", T=2) == 2
    assert growth("feed-forward", D=2) == pytest.approx(2, rel=1e-5)
    assert growth("feed-forward", F=2) == 2
    assert growth("feed-forward", H=2, K=2, E=2, V=2) == 1
