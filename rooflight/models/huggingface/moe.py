"""Families with experts: Mixtral, Qwen3-MoE, gpt-oss, DeepSeek-V2 and DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.config import Latent, ModelConfig, MoE, layers_from, same_layers
from rooflight.models.huggingface.common import (
    Defaults,
    Family,
    decoder,
    every_window,
    head_dim,
    layer_count,
    one_rope,
    one_window,
    sliding_window,
    windows,
    write_decoder,
    write_layer_types,
)
from rooflight.models.huggingface.fields import Fields
from rooflight.models.huggingface.rope import read_rope, write_rope

# The two constants of gpt-oss's activation, fixed in ops/activation.py.
_SWIGLU_LIMIT, _SWIGLU_ALPHA = 7.0, 1.702


def moe_of(config: ModelConfig) -> MoE:
    """The config's experts; a family of this file always has them."""
    if config.moe is None:
        raise InvalidValue(f"a {config.family} config needs experts; set ModelConfig.moe")
    return config.moe


def _read_mixtral(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=131_072, norm_eps=1e-5, kv_heads=8)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, head_dim(fields), context, theta=1_000_000.0)
    moe = MoE(
        experts=fields.integer("num_local_experts", 8),
        top_k=fields.integer("num_experts_per_tok", 2),
        width=fields.integer("intermediate_size"),
    )
    layers = same_layers(layer_count(fields), sliding_window(fields), rope, sparse=True)
    return decoder(fields, "mixtral", layers, defaults, moe=moe)


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return write_decoder(
        config,
        num_local_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        sliding_window=every_window(config),
        **write_rope(one_rope(config), config.max_context),
    )


def _read_qwen3_moe(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=32_768, kv_heads=4)
    count = layer_count(fields)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, head_dim(fields), context)
    experts = "num_experts" if fields.has("num_experts") else "num_local_experts"
    moe = MoE(
        experts=fields.integer(experts, 128),
        top_k=fields.integer("num_experts_per_tok", 8),
        width=fields.integer("moe_intermediate_size", 768),
        normalize=fields.flag("norm_topk_prob", False),
    )
    step, dense = fields.integer("decoder_sparse_step", 1), fields.indices("mlp_only_layers", count)
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(count)]
    window = sliding_window(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    bias = fields.flag("attention_bias", False)
    return decoder(
        fields,
        "qwen3_moe",
        layers_from([window] * count, [rope] * count, sparse),
        defaults,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        moe=moe,
    )


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    moe, window = moe_of(config), one_window(config)
    return write_decoder(
        config,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.width,
        norm_topk_prob=moe.normalize,
        decoder_sparse_step=1,
        mlp_only_layers=[i for i, kind in enumerate(config.layers) if not kind.sparse],
        attention_bias=config.qkv_bias,
        use_sliding_window=window is not None,
        sliding_window=window,
        **write_rope(one_rope(config), config.max_context),
    )


def _read_gpt_oss(fields: Fields) -> ModelConfig:
    fields.only("swiglu_limit", _SWIGLU_LIMIT)
    fields.only("swiglu_alpha", _SWIGLU_ALPHA)
    defaults = Defaults(max_context=131_072, norm_eps=1e-5, kv_heads=8, head_dim=64)
    count = layer_count(fields)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(_with_default_rope(fields), head_dim(fields, 64), context, theta=150_000.0)
    kinds = windows(fields, count, sliding_window(fields, 128), lambda i: i % 2 == 0)
    moe = MoE(
        experts=fields.integer("num_local_experts", 128),
        top_k=fields.integer("num_experts_per_tok", 4),
        width=fields.integer("intermediate_size"),
        scoring="softmax_topk",
        router_bias=True,
        expert_bias=True,
    )
    bias = fields.flag("attention_bias", True)
    return decoder(
        fields,
        "gpt_oss",
        layers_from(kinds, [rope] * count, [True] * count),
        defaults,
        activation="clamped_swiglu",
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        moe=moe,
    )


def _with_default_rope(fields: Fields) -> Fields:
    """The class stretches its positions even when the file says nothing of them."""
    if fields.has("rope_scaling") or fields.has("rope_parameters"):
        return fields
    rope = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    return Fields({**fields.data, "rope_scaling": rope}, fields.where, fields.prefix)


def _write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    moe = moe_of(config)
    rope = write_rope(one_rope(config), config.max_context)
    # Null would be read as the class's own YaRN.
    rope["rope_scaling"] = rope["rope_scaling"] or {"rope_type": "default"}
    return write_decoder(
        config,
        num_local_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        attention_bias=config.qkv_bias,
        sliding_window=one_window(config) or 128,
        layer_types=write_layer_types(config),
        swiglu_limit=_SWIGLU_LIMIT,
        swiglu_alpha=_SWIGLU_ALPHA,
        **rope,
    )


def _read_latent(fields: Fields) -> Latent:
    return Latent(
        q_rank=fields.integer("q_lora_rank", 0),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
    )


def _deepseek(
    fields: Fields, family: str, defaults: Defaults, moe: MoE, dense_layers: int, interleaved: bool
) -> ModelConfig:
    """Multi-head latent attention, `dense_layers` plain layers and then experts (2405.04434, 2412.19437)."""
    fields.only("moe_layer_freq", 1)
    count, latent = layer_count(fields), _read_latent(fields)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, latent.rope_dim, context, interleaved=interleaved)
    sparse = [i >= dense_layers for i in range(count)]
    bias = fields.flag("attention_bias", False)
    return decoder(
        fields,
        family,
        layers_from([0] * count, [rope] * count, sparse),
        defaults,
        head_dim=latent.nope_dim + latent.rope_dim,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=family == "deepseek_v2" and fields.flag("mlp_bias", False),
        moe=moe,
        latent=latent,
    )


def _read_deepseek_v2(fields: Fields) -> ModelConfig:
    # transformers does not read this key; the released code renormalises and then skips the scaling factor.
    fields.only("norm_topk_prob", False)
    fields.only("scoring_func", "softmax")
    limited = fields.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
    width = fields.integer("moe_intermediate_size", 1407)
    moe = MoE(
        experts=fields.integer("n_routed_experts", 64),
        top_k=fields.integer("num_experts_per_tok"),
        width=width,
        shared_width=width * fields.integer("n_shared_experts", 2),
        normalize=False,
        scale=fields.number("routed_scaling_factor", 1.0),
        groups=fields.integer("n_group") if limited else 1,
        top_groups=fields.integer("topk_group") if limited else 1,
    )
    dense_layers = fields.integer("first_k_dense_replace", 0, minimum=0)
    return _deepseek(fields, "deepseek_v2", Defaults(max_context=2048), moe, dense_layers, interleaved=True)


def _read_deepseek_v3(fields: Fields) -> ModelConfig:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    experts = "n_routed_experts" if fields.has("n_routed_experts") else "num_local_experts"
    width = fields.integer("moe_intermediate_size", 2048)
    moe = MoE(
        experts=fields.integer(experts, 256),
        top_k=fields.integer("num_experts_per_tok", 8),
        width=width,
        shared_width=width * fields.integer("n_shared_experts", 1),
        scoring="sigmoid",
        normalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5),
        groups=fields.integer("n_group", 8),
        top_groups=fields.integer("topk_group", 4),
        group_score="top2",
        choice_bias=True,
    )
    dense_layers = fields.integer("first_k_dense_replace", 3, minimum=0)
    interleaved = fields.flag("rope_interleave", True)
    return _deepseek(fields, "deepseek_v3", Defaults(max_context=4096), moe, dense_layers, interleaved)


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
    moe, latent, rope = moe_of(config), config.latent, one_rope(config)
    if latent is None:
        raise InvalidValue(f"a {config.family} config needs latent attention; set ModelConfig.latent")
    out = write_decoder(
        config,
        q_lora_rank=latent.q_rank or None,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=latent.nope_dim,
        qk_rope_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        n_routed_experts=moe.experts,
        n_shared_experts=moe.shared_width // moe.width,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.width,
        routed_scaling_factor=moe.scale,
        n_group=moe.groups,
        topk_group=moe.top_groups,
        norm_topk_prob=moe.normalize,
        first_k_dense_replace=sum(not kind.sparse for kind in config.layers),
        attention_bias=config.qkv_bias,
        **write_rope(rope, config.max_context),
    )
    # The classes overwrite it with the rotary part alone.
    del out["head_dim"]
    if config.family == "deepseek_v2":
        method = "group_limited_greedy" if moe.groups > 1 else "greedy"
        return out | {"topk_method": method, "scoring_func": "softmax", "mlp_bias": config.mlp_bias}
    return out | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": rope.interleaved,
        "num_nextn_predict_layers": 0,
    }


MOE: dict[str, Family] = {
    "mixtral": Family("MixtralForCausalLM", _read_mixtral, _write_mixtral),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe),
    "gpt_oss": Family("GptOssForCausalLM", _read_gpt_oss, _write_gpt_oss),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _read_deepseek_v2, _write_deepseek),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _read_deepseek_v3, _write_deepseek),
}
