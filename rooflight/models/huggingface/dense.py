"""Families without experts: GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3."""

from __future__ import annotations

from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig, Rope, layers_from, same_layers
from rooflight.models.huggingface.common import (
    ACTIVATIONS,
    FULL,
    SLIDING,
    Defaults,
    Family,
    checked,
    decoder,
    every_window,
    head_dim,
    layer_count,
    one_rope,
    one_window,
    read_dtype,
    sliding_window,
    windows,
    write_decoder,
    write_layer_types,
)
from rooflight.models.huggingface.fields import Fields
from rooflight.models.huggingface.rope import read_rope, read_scaling, write_rope, write_scaling


def _read_gpt2(fields: Fields) -> ModelConfig:
    for key, value in (("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        fields.only(key, value)
    width, heads = fields.integer("n_embd"), fields.integer("n_head")
    if width % heads:
        raise InvalidValue(f"{fields.where}: n_head {heads} does not divide n_embd {width}; correct one of them")
    context = fields.integer("n_positions", 1024)
    return checked(
        fields,
        ModelConfig(
            family="gpt2",
            vocab_size=fields.integer("vocab_size", 50257),
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            ffn_width=fields.integer("n_inner", 4 * width),
            layers=same_layers(layer_count(fields, "n_layer")),
            max_context=context,
            norm="layer",
            norm_eps=fields.number("layer_norm_epsilon", 1e-5),
            activation=ACTIVATIONS[fields.choice("activation_function", ACTIVATIONS, "gelu_new")],
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
            learned_positions=context,
            tied=fields.flag("tie_word_embeddings", True),
            dtype=read_dtype(fields, "float32"),
        ),
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_layer": len(config.layers),
        "n_inner": config.ffn_width,
        "n_positions": config.max_context,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale is None,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.dtype,
    }


def _read_llama(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=2048)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, head_dim(fields), context)
    bias = fields.flag("attention_bias", False)
    return decoder(
        fields,
        "llama",
        same_layers(layer_count(fields), rope=rope),
        defaults,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(
        config,
        attention_bias=config.qkv_bias,
        mlp_bias=config.mlp_bias,
        **write_rope(one_rope(config), config.max_context),
    )


def _read_mistral(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=131_072, kv_heads=8)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, head_dim(fields), context)
    layers = same_layers(layer_count(fields), sliding_window(fields, 4096), rope)
    return decoder(fields, "mistral", layers, defaults)


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(one_rope(config), config.max_context)
    return write_decoder(config, sliding_window=every_window(config), **rope)


def _qwen_layers(fields: Fields, rope: Rope) -> Any:
    count = layer_count(fields)
    window = sliding_window(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    first = fields.integer("max_window_layers", 28, minimum=0)
    return layers_from(windows(fields, count, window, lambda i: i >= first), [rope] * count, [False] * count)


def _read_qwen2(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=32_768)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, head_dim(fields), context)
    return decoder(fields, "qwen2", _qwen_layers(fields, rope), defaults, qkv_bias=True)


def _read_qwen3(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=32_768, head_dim=128)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, head_dim(fields, 128), context)
    bias = fields.flag("attention_bias", False)
    return decoder(fields, "qwen3", _qwen_layers(fields, rope), defaults, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    window = one_window(config)
    out = write_decoder(
        config,
        use_sliding_window=window is not None,
        sliding_window=window,
        layer_types=write_layer_types(config),
        **write_rope(one_rope(config), config.max_context),
    )
    return out if config.family == "qwen2" else out | {"attention_bias": config.qkv_bias}


def _gemma_settings(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have alike (2408.00118, 2503.19786)."""
    fields.only("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias", False)
    key = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": ACTIVATIONS[fields.choice(key, ACTIVATIONS, "gelu_pytorch_tanh")],
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_scale": fields.integer("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": fields.integer("hidden_size", 2304) ** 0.5,
    }


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    return write_decoder(
        config,
        hidden_activation="gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        attention_bias=config.qkv_bias,
        query_pre_attn_scalar=round(config.scale**-2),
        attn_logit_softcapping=config.attention_softcap or None,
        final_logit_softcapping=config.logits_softcap or None,
        sliding_window=one_window(config) or 4096,
        layer_types=write_layer_types(config),
    )


def _read_gemma2(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=8192, tied=True, kv_heads=4, head_dim=256)
    count = layer_count(fields)
    rope = read_rope(fields, head_dim(fields, 256), fields.integer("max_position_embeddings", 8192))
    kinds = windows(fields, count, sliding_window(fields, 4096), lambda i: i % 2 == 0)
    settings = _gemma_settings(fields) | {
        "attention_softcap": _softcap(fields, "attn_logit_softcapping", 50.0),
        "logits_softcap": _softcap(fields, "final_logit_softcapping", 30.0),
    }
    return decoder(fields, "gemma2", layers_from(kinds, [rope] * count, [False] * count), defaults, **settings)


def _softcap(fields: Fields, key: str, default: float) -> float:
    """0 when null: the key is there and switches the cap off."""
    return 0.0 if key in fields.data and not fields.has(key) else fields.number(key, default)


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    return _write_gemma(config) | write_rope(one_rope(config), config.max_context)


# The published multimodal configs leave out what equals the class's own values, which are those of no released size.
_GEMMA3_SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def _read_gemma3(fields: Fields) -> ModelConfig:
    given = {key: value for key, value in fields.data.items() if value is not None or key not in _GEMMA3_SIZES}
    fields = Fields(_GEMMA3_SIZES | given, fields.where, fields.prefix)
    defaults = Defaults(max_context=131_072, tied=True, kv_heads=4, head_dim=256)
    count, dim = layer_count(fields), head_dim(fields, 256)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    period = fields.integer("sliding_window_pattern", 6)
    kinds = windows(fields, count, sliding_window(fields, 4096), lambda i: (i + 1) % period != 0)
    full, local = _gemma3_ropes(fields, dim, context)
    settings = _gemma_settings(fields) | {
        "qk_norm": True,
        "attention_softcap": _softcap(fields, "attn_logit_softcapping", 0.0),
        "logits_softcap": _softcap(fields, "final_logit_softcapping", 0.0),
    }
    layers = layers_from(kinds, [local if window else full for window in kinds], [False] * count)
    return decoder(fields, "gemma3_text", layers, defaults, **settings)


def _gemma3_ropes(fields: Fields, dim: int, context: int) -> tuple[Rope, Rope]:
    """Of full and of sliding layers: only the former are stretched."""
    empty = Fields({}, fields.where)
    nested = fields.section("rope_parameters") or empty
    full = nested.section(FULL) or fields.section("rope_scaling") or empty
    local = nested.section(SLIDING) or empty
    theta = full.number("rope_theta", fields.number("rope_theta", 1_000_000.0))
    local_theta = local.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0))
    return read_scaling(full, fields, theta, dim, context), read_scaling(local, fields, local_theta, dim, context)


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    full = next((kind.rope for kind in config.layers if not kind.window), None)
    local = next((kind.rope for kind in config.layers if kind.window), None)
    out = _write_gemma(config)
    if local is not None:
        out["rope_local_base_freq"] = local.theta
    if full is not None:
        out |= {"rope_theta": full.theta, "rope_scaling": write_scaling(full, config.max_context)}
    return out


def _read_phi3(fields: Fields) -> ModelConfig:
    defaults = Defaults(max_context=4096, norm_eps=1e-5)
    context = fields.integer("max_position_embeddings", defaults.max_context)
    rope = read_rope(fields, head_dim(fields), context)
    return decoder(fields, "phi3", same_layers(layer_count(fields), sliding_window(fields), rope), defaults)


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    rope = one_rope(config)
    out = write_decoder(config, sliding_window=every_window(config), **write_rope(rope, config.max_context))
    out |= {
        "partial_rotary_factor": rope.dims / config.head_dim,
        "original_max_position_embeddings": rope.original_context or config.max_context,
        # The class's own padding token lies outside a small vocabulary and is then refused.
        "pad_token_id": None,
    }
    return out


DENSE: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2),
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", _read_gemma3, _write_gemma3),
    "phi3": Family("Phi3ForCausalLM", _read_phi3, _write_phi3),
}
