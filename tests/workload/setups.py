"""Small decoders of every family, and the few ways in which the workload tests walk them."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from rooflight.models.config import ModelConfig, Rope, same_layers
from rooflight.models.huggingface import config_from_hf
from rooflight.workload import program, walk
from rooflight.workload.program import Setting
from rooflight.workload.walk import Walk
from tests.models.families import CASES

FAMILIES: dict[str, ModelConfig] = {name: config_from_hf(case.config(), name) for name, case in CASES.items()}
PHASES = ("prefill", "decode", "train")
# One of each kind of block: MHA with LayerNorm, GQA, alternating windows with post-norms, experts, latent attention.
KINDS = ("gpt2", "llama3", "gemma2", "mixtral", "deepseek_v3")


def llama(
    layers: int = 3,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    ffn_width: int = 48,
    vocab_size: int = 64,
    **changes: Any,
) -> ModelConfig:
    """A Llama of any size: rotary positions, RMSNorm, SwiGLU, no biases."""
    config = ModelConfig(
        family="llama",
        name="small",
        vocab_size=vocab_size,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=ffn_width,
        layers=same_layers(layers, 0, Rope(10000.0, head_dim)),
        max_context=1 << 20,
    )
    return replace(config, **changes).check()


def randomised(name: str, seed: int) -> ModelConfig:
    """A family's config with other sizes, drawn at random, of the kind that the family allows."""
    random, config = Random(seed), FAMILIES[name]
    kv_heads = random.choice((1, 2, 3))
    heads = kv_heads * random.choice((1, 2, 4))
    sizes: dict[str, Any] = {"width": 8 * random.randint(2, 9), "vocab_size": random.randint(40, 130)}
    sizes["ffn_width"] = 4 * random.randint(3, 20)
    if config.latent is None:
        sizes |= {"heads": heads, "kv_heads": kv_heads}
    else:
        sizes |= {"heads": heads, "kv_heads": heads}
    return replace(config, **sizes).check()


def walked(config: ModelConfig, setting: Setting, *, fold: bool = True) -> Walk:
    """The dry walk of a decoder, folded as `explain` walks it, or layer by layer."""
    return walk.dry(lambda: program.decoder(config, setting, "cpu", fold=fold))


def run_wet(config: ModelConfig, setting: Setting) -> Walk:
    """The same program on real tensors, recorded."""
    model = program.build_model(config, setting.dtype, "cpu").initialize()
    return walk.record(program.decoder(config, setting, "cpu", fold=False, model=model))


def flops_by_component(found: Walk, precision: str | None = None) -> dict[str, int]:
    """FLOPs of the whole run by report component: all of them, or those of one precision."""
    from rooflight.workload.rows import component_of

    sums: dict[str, int] = {}
    for step in found.steps:
        record = found.trace.records[step.record]
        shares = [(part.component or component_of(record), part.flops) for part in record.cost.parts]
        for component, flops in shares or [(component_of(record), record.cost.flops)]:
            count = sum(n for name, n in flops.items() if precision in (None, name))
            if count:
                sums[component] = sums.get(component, 0) + int(count)
    return sums
