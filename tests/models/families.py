"""Small random checkpoints of every family, made by transformers, with all that a family can have switched on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
# Longer than any window below, and than the context from which Phi-3's long factors apply.
PROMPTS = ([5, 17, 3, 88, 41, 9, 62, 30, 11, 7, 55, 23, 71, 2, 90, 14, 36, 49, 8], [60, 4, 33, 12, 77, 21, 95])
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9, "beta_fast": 32, "beta_slow": 1}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class Case:
    """A family's settings; `sizes` are those of a Llama-like config unless a family names its own."""

    model_type: str
    more: dict[str, Any] = field(default_factory=dict)
    sizes: bool = True

    def config(self) -> dict[str, Any]:
        sizes = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
        }
        # A copy: transformers writes its defaults into the mappings that it is given.
        return {"model_type": self.model_type, **(sizes if self.sizes else {}), **NO_TOKENS, **deepcopy(self.more)}


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
}
CASES: dict[str, Case] = {
    "gpt2": Case(
        "gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128, "n_inner": 96}, False
    ),
    "llama2": Case("llama", {"num_key_value_heads": 4, "rope_theta": 10000.0}),
    "llama3": Case("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "head_dim": 16}),
    "llama-biased": Case(
        "llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    ),
    "llama-yarn": Case("llama", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {"sliding_window": 6}),
    "qwen2": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True}
    ),
    "qwen3": Case("qwen3", {"head_dim": 16, "rope_theta": 1e6, "attention_bias": True}),
    "gemma2": Case("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": Case("phi3", {"sliding_window": 7, "original_max_position_embeddings": 128}),
    "phi3-longrope": Case(
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 6, "rope_scaling": LONGROPE},
    ),
    "gpt_oss": Case(
        "gpt_oss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "head_dim": 16,
            "rope_scaling": {**YARN, "truncate": False},
        },
    ),
    "mixtral": Case("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9}),
    "qwen3_moe": Case(
        "qwen3_moe", {**EXPERTS, "num_experts": 6, "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": [1]}
    ),
    "qwen3_moe-sparse-step": Case(
        "qwen3_moe", {**EXPERTS, "num_experts": 6, "norm_topk_prob": False, "decoder_sparse_step": 2}
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": 20, "topk_method": "group_limited_greedy", "rope_scaling": DEEPSEEK_YARN},
    ),
    "deepseek_v2-lite": Case(
        "deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "attention_bias": True}
    ),
    "deepseek_v3": Case("deepseek_v3", {**DEEPSEEK, "q_lora_rank": 20, "rope_scaling": DEEPSEEK_YARN}),
}


def reference(name: str, seed: int = 0) -> PreTrainedModel:
    """transformers' own model of a case in fp32, every tensor random: no zero bias or unit norm hides a mistake."""
    config = AutoConfig.for_model(**CASES[name].config())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                centre = 1.0 if "norm" in key or ".ln_" in key else 0.0
                spread = 0.3 if tensor.dim() == 1 else 0.12
                tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    return model


def checkpoint(name: str, folder: Path, **options: Any) -> tuple[PreTrainedModel, Path]:
    """A case's model, and the directory that transformers saved it to."""
    model = reference(name)
    model.save_pretrained(folder, **options)
    return model, folder
