"""transformers' LlamaForCausalLM with its SDPA attention and torch's fused AdamW, compiled or eager.

Legend: B sequences  T tokens
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers import Job, Step, torch_step
from rooflight.models.config import ModelConfig
from rooflight.models.huggingface import config_to_hf


def config_of(config: ModelConfig) -> LlamaConfig:
    """transformers' config of the same decoder."""
    if config.family != "llama":
        raise ValueError(f"the transformers peer is a Llama; {config.name or config.family} is not one")
    settings = {key: value for key, value in config_to_hf(config).items() if key not in ("architectures", "model_type")}
    settings |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return LlamaConfig(**settings, **{"use_cache": False, "attn_implementation": "sdpa"})


def model_of(job: Job, device: str) -> LlamaForCausalLM:
    """The model with random weights of the job's dtype, recomputing each layer where the job says so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(job.torch_dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config_of(job.config))
    finally:
        torch.set_default_dtype(before)
    model.train()
    if job.recompute == "full":
        # transformers 5.17 knows only the older name, of which 5.23 warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def loss_of(model: LlamaForCausalLM) -> Step:
    """tokens_BT, targets_BT → the loss that transformers computes; targets are already shifted."""

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return model(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss

    return loss


def build(job: Job, device: str, *, compiled: bool | None = None) -> Step:
    """The peer's training step; compiled on a GPU and eager on a CPU unless told otherwise."""
    model = model_of(job, device)
    loss = loss_of(model)
    if compiled if compiled is not None else device == "cuda":
        loss = torch.compile(loss, dynamic=False)
    return torch_step(loss, model.parameters(), job.clip)
