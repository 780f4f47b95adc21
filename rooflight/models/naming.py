"""Which tensors of a Hugging Face checkpoint make up each of ours: one table a family, read in both directions.

Legend: X experts  D width  F feed-forward width  N = 2·F stacked gate and up
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig

Place = tuple[slice | int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One of our tensors as the stack, along its output rows, of the named ones.

    {i} is the layer and {x} the expert. rows: how the stack divides, qkv | latent | even. transposed: the checkpoint
    keeps inputs before outputs, as GPT-2's Conv1D and gpt-oss's experts do.
    """

    theirs: tuple[str, ...]
    rows: str = "even"
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint and the part of ours that it fills."""

    name: str
    ours: str
    place: Place
    transposed: bool

    def view(self, tensor: Tensor) -> Tensor:
        """The part of our tensor, turned as the checkpoint keeps it; writing to it writes ours."""
        part = tensor[self.place] if self.place else tensor
        return part.transpose(-1, -2) if self.transposed and part.dim() > 1 else part


Table = Mapping[str, Rule]


def _rule(*theirs: str, rows: str = "even", transposed: bool = False) -> Rule:
    return Rule(theirs, rows, transposed)


_LAYER = "model.layers.{i}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."


def _mlp(ours: str, theirs: str) -> Table:
    return {
        f"{ours}.up": _rule(theirs + "gate_proj", theirs + "up_proj"),
        f"{ours}.down": _rule(theirs + "down_proj"),
    }


_OUTSIDE: Table = {
    "embedding": _rule("model.embed_tokens"),
    "norm.norm": _rule("model.norm"),
    "head": _rule("lm_head"),
}
_LLAMA: Table = {
    **_OUTSIDE,
    **_mlp("layers.{i}.ffn", _MLP),
    "layers.{i}.attention_norm.norm": _rule(_LAYER + "input_layernorm"),
    "layers.{i}.attention.qkv": _rule(*(f"{_ATTENTION}{x}_proj" for x in "qkv"), rows="qkv"),
    "layers.{i}.attention.q_norm": _rule(_ATTENTION + "q_norm"),
    "layers.{i}.attention.k_norm": _rule(_ATTENTION + "k_norm"),
    "layers.{i}.attention.out": _rule(_ATTENTION + "o_proj"),
    "layers.{i}.ffn_norm.norm": _rule(_LAYER + "post_attention_layernorm"),
}
_GEMMA: Table = {
    **_LLAMA,
    "layers.{i}.attention_post_norm": _rule(_LAYER + "post_attention_layernorm"),
    "layers.{i}.ffn_norm.norm": _rule(_LAYER + "pre_feedforward_layernorm"),
    "layers.{i}.ffn_post_norm": _rule(_LAYER + "post_feedforward_layernorm"),
}
_PHI3: Table = {
    **_LLAMA,
    "layers.{i}.attention.qkv": _rule(_ATTENTION + "qkv_proj"),
    "layers.{i}.ffn.up": _rule(_MLP + "gate_up_proj"),
}
_GPT2_LAYER = "transformer.h.{i}."
_GPT2: Table = {
    "embedding": _rule("transformer.wte"),
    "embedding.positions": _rule("transformer.wpe.weight"),
    "norm.norm": _rule("transformer.ln_f"),
    "head": _rule("lm_head"),
    "layers.{i}.attention_norm.norm": _rule(_GPT2_LAYER + "ln_1"),
    "layers.{i}.attention.qkv": _rule(_GPT2_LAYER + "attn.c_attn", transposed=True),
    "layers.{i}.attention.out": _rule(_GPT2_LAYER + "attn.c_proj", transposed=True),
    "layers.{i}.ffn_norm.norm": _rule(_GPT2_LAYER + "ln_2"),
    "layers.{i}.ffn.up": _rule(_GPT2_LAYER + "mlp.c_fc", transposed=True),
    "layers.{i}.ffn.down": _rule(_GPT2_LAYER + "mlp.c_proj", transposed=True),
}
_MIXTRAL_MOE = _LAYER + "block_sparse_moe."
_MIXTRAL: Table = {
    **_LLAMA,
    "layers.{i}.ffn.router": _rule(_MIXTRAL_MOE + "gate"),
    "layers.{i}.ffn.experts.up_XND": _rule(
        _MIXTRAL_MOE + "experts.{x}.w1.weight", _MIXTRAL_MOE + "experts.{x}.w3.weight"
    ),
    "layers.{i}.ffn.experts.down_XDF": _rule(_MIXTRAL_MOE + "experts.{x}.w2.weight"),
}
_EXPERT = _MLP + "experts.{x}."
_QWEN3_MOE: Table = {
    **_LLAMA,
    "layers.{i}.ffn.router": _rule(_MLP + "gate"),
    "layers.{i}.ffn.experts.up_XND": _rule(_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    "layers.{i}.ffn.experts.down_XDF": _rule(_EXPERT + "down_proj.weight"),
}
_GPT_OSS: Table = {
    **_LLAMA,
    "layers.{i}.attention.core.sinks_H": _rule(_ATTENTION + "sinks"),
    "layers.{i}.ffn.router": _rule(_MLP + "router"),
    "layers.{i}.ffn.experts.up_XND": _rule(_MLP + "experts.gate_up_proj", transposed=True),
    "layers.{i}.ffn.experts.up_bias": _rule(_MLP + "experts.gate_up_proj_bias"),
    "layers.{i}.ffn.experts.down_XDF": _rule(_MLP + "experts.down_proj", transposed=True),
    "layers.{i}.ffn.experts.down_bias": _rule(_MLP + "experts.down_proj_bias"),
}
_DEEPSEEK: Table = {
    **_QWEN3_MOE,
    **_mlp("layers.{i}.ffn.shared", _MLP + "shared_experts."),
    "layers.{i}.attention.down": _rule(_ATTENTION + "q_a_proj", _ATTENTION + "kv_a_proj_with_mqa", rows="latent"),
    "layers.{i}.attention.q_norm": _rule(_ATTENTION + "q_a_layernorm"),
    "layers.{i}.attention.q_up": _rule(_ATTENTION + "q_b_proj"),
    "layers.{i}.attention.kv_norm": _rule(_ATTENTION + "kv_a_layernorm"),
    "layers.{i}.attention.kv_up": _rule(_ATTENTION + "kv_b_proj"),
    "layers.{i}.ffn.choice_bias_X": _rule(_MLP + "gate.e_score_correction_bias"),
}
_DEEPSEEK_PLAIN_QUERY: Table = {
    **_DEEPSEEK,
    "layers.{i}.attention.down": _rule(_ATTENTION + "kv_a_proj_with_mqa"),
    "layers.{i}.attention.q_up": _rule(_ATTENTION + "q_proj"),
}
TABLES: Mapping[str, Table] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _PHI3,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "gpt_oss": _GPT_OSS,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}
# What published checkpoints hold besides the decoder: masks and frequencies that older releases stored, towers of other
# modalities, and layers that predict tokens further ahead.
IGNORED = re.compile(
    r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
    r"|(model\.)?(vision_tower|multi_modal_projector)\..*"
)
_LAYER_NUMBER = re.compile(r"layers\.(\d+)\.")


def ignored(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the decoder has no place for it."""
    if IGNORED.fullmatch(name) or (config.tied and name == "lm_head.weight"):
        return True
    number = _LAYER_NUMBER.search(name)
    return config.family == "deepseek_v3" and number is not None and int(number.group(1)) >= len(config.layers)


def canonical(config: ModelConfig, name: str) -> str:
    """A tensor's name in our tables: GPT-2 is also published without its prefix, Gemma 3 inside a multimodal model."""
    if config.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    if config.family == "gemma3_text":
        name = name.removeprefix("language_model.")
        return re.sub(r"^model\.language_model\.", "model.", name)
    return name


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a checkpoint holds, by our name: parameters, tied ones once, and persistent buffers."""
    kept = model.state_dict(keep_vars=True)
    out: dict[str, Tensor] = dict(model.named_parameters())
    out.update({name: tensor for name, tensor in model.named_buffers() if name in kept})
    return out


def pieces(config: ModelConfig, ours: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The tensors of the family's checkpoint, in our order, and where each lies in ours."""
    table = TABLES.get(config.family)
    if table is None:
        raise InvalidValue(f"model family {config.family!r} has no checkpoint; use one of {', '.join(TABLES)}")
    if config.latent is not None and not config.latent.q_rank:
        table = _DEEPSEEK_PLAIN_QUERY
    for name, tensor in ours.items():
        number = _LAYER_NUMBER.match(name)
        layer = number.group(1) if number else ""
        rule, theirs = _lookup(table, _LAYER_NUMBER.sub("layers.{i}.", name, count=1), config.family)
        theirs = tuple(their.replace("{i}", layer) for their in theirs)
        if "{x}" not in theirs[0]:
            for their, rows in zip(theirs, _rows(config, rule, len(theirs), tensor.shape[0]), strict=True):
                yield Piece(their, name, (rows,) if len(theirs) > 1 else (), rule.transposed)
            continue
        for expert in range(tensor.shape[0]):
            for their, rows in zip(theirs, _rows(config, rule, len(theirs), tensor.shape[1]), strict=True):
                yield Piece(their.replace("{x}", str(expert)), name, (expert, rows), rule.transposed)


def _lookup(table: Table, key: str, family: str) -> tuple[Rule, tuple[str, ...]]:
    """The rule for a tensor, by its own name or by its module's: then weight and bias are named alike on both sides."""
    if key in table:
        return table[key], table[key].theirs
    module, _, kind = key.rpartition(".")
    if module not in table:
        raise InvalidValue(f"the tensor {key} has no name in a {family} checkpoint; use a family that has it")
    return table[module], tuple(f"{their}.{kind}" for their in table[module].theirs)


def _rows(config: ModelConfig, rule: Rule, count: int, total: int) -> list[slice]:
    """How `total` output rows divide over `count` tensors."""
    sizes = [total // count] * count
    if count > 1 and rule.rows == "qkv":
        kv = config.kv_heads * config.head_dim
        sizes = [config.heads * config.head_dim, kv, kv]
    elif count > 1 and rule.rows == "latent" and config.latent is not None:
        sizes = [config.latent.q_rank, config.latent.kv_rank + config.latent.rope_dim]
    starts = [sum(sizes[:i]) for i in range(count)]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
