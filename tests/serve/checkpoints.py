"""A small checkpoint on disk, as a user has one: random weights, a trained tokenizer, a chat template."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from rooflight.models.huggingface import config_from_hf
from rooflight.models.tokenizer import Tokenizer
from rooflight.models.transformer import Transformer
from rooflight.models.weights import save
from rooflight.workload.program import build_model

VOCAB, CONTEXT, WIDTH = 352, 192, 32
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 0,
}
_WORDS = [
    "river",
    "bright",
    "stone",
    "carries",
    "winter",
    "light",
    "über",
    "café",
    "wonder",
    "12",
    "345",
    "naïve",
    "garden,",
    "house;",
    "never",
    "often",
    "日本",
    "said",
]


def text(words: int, seed: int) -> str:
    """Some words in a random order."""
    draw = random.Random(seed)
    return " ".join(draw.choice(_WORDS) for _ in range(words))


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of at most 340 tokens, so that the model's vocabulary is a little larger."""
    return Tokenizer.train([text(300, seed) for seed in range(4)], 340)


def model_of(**changed: Any) -> Transformer:
    """A model with random weights of twice the usual size: the likeliest token is no close call, and seldom the same.

    changed: keys of its config.json.
    """
    model = build_model(config_from_hf({**CONFIG, **changed}), "fp32", "cpu").initialize(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2.0
    return model


def checkpoint(directory: Path, max_shard_bytes: int = 1 << 30, generation: Any = None, **changed: Any) -> Path:
    """Write a whole checkpoint; `changed` are keys of its config.json, generation the generation_config.json."""
    save(model_of(**changed), directory, max_shard_bytes)
    own = tokenizer()
    Tokenizer(own.inner.to_str(), own.eos_id, {"chat_template.jinja": TEMPLATE}).save(directory)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory
