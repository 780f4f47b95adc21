"""How many parameters a model has, and how many of them one token uses."""

from __future__ import annotations

import re

import torch

from rooflight.models.config import ModelConfig
from rooflight.models.transformer import Transformer

_LAYER = re.compile(r"layers\.(\d+)\.")


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """{total, active, embedding}: all parameters, those that one token passes through, and those of the embedding.

    active leaves out the routed experts that a token does not visit: of E experts it counts K, as model cards do.
    embedding is the table of tokens and of learned positions; a tied head is counted once, in it. Counted on the meta
    device over the distinct layers, each times how often it stands in the model, so the largest takes milliseconds.
    """
    folded, times = config.folded()
    with torch.device("meta"):
        model = Transformer(folded)
    total = active = embedding = 0
    for name, parameter in model.named_parameters():
        layer = _LAYER.match(name)
        count = parameter.numel() * (times[int(layer.group(1))] if layer else 1)
        total += count
        visited = count
        if config.moe is not None and ".ffn.experts." in name:
            visited = count // config.moe.experts * config.moe.top_k
        active += visited
        if name.startswith("embedding."):
            embedding += count
    return {"total": total, "active": active, "embedding": embedding}
