"""What the families of Hugging Face configs share: sizes, windows by layer, and the keys that all of them write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.config import LayerKind, ModelConfig, Rope
from rooflight.models.huggingface.fields import Fields

MAX_LAYERS = 10_000
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`: how its config is read and written, and the class that transformers builds from it."""

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a config may leave out, with the value that its class in transformers then takes."""

    max_context: int
    norm_eps: float = 1e-6
    tied: bool = False
    kv_heads: int = 0  # 0: as many as there are query heads
    head_dim: int = 0  # 0: width over query heads
    dtype: str = "bfloat16"


def layer_count(fields: Fields, key: str = "num_hidden_layers") -> int:
    return fields.integer(key, maximum=MAX_LAYERS)


def head_dim(fields: Fields, default: int = 0) -> int:
    """`head_dim`, or the family's default, or the width divided by the query heads."""
    if default or fields.has("head_dim"):
        return fields.integer("head_dim", default)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if width % heads:
        raise InvalidValue(
            f"{fields.where}: {heads} attention heads do not divide the hidden size {width}; "
            "correct one of them or give head_dim"
        )
    return width // heads


def decoder(
    fields: Fields, family: str, layers: tuple[LayerKind, ...], defaults: Defaults, **settings: Any
) -> ModelConfig:
    """A config in Llama's spelling, which all families but GPT-2 use for what they have in common."""
    heads = fields.integer("num_attention_heads")
    common: dict[str, Any] = {
        "family": family,
        "vocab_size": fields.integer("vocab_size"),
        "width": fields.integer("hidden_size"),
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", defaults.kv_heads or heads),
        "head_dim": 0 if "head_dim" in settings else head_dim(fields, defaults.head_dim),
        "ffn_width": fields.integer("intermediate_size"),
        "layers": layers,
        "max_context": fields.integer("max_position_embeddings", defaults.max_context),
        "norm_eps": fields.number("rms_norm_eps", defaults.norm_eps),
        "activation": ACTIVATIONS[fields.choice("hidden_act", ACTIVATIONS, "silu")],
        "tied": fields.flag("tie_word_embeddings", defaults.tied),
        "dtype": read_dtype(fields, defaults.dtype),
    }
    return checked(fields, ModelConfig(**(common | settings)))


def checked(fields: Fields, config: ModelConfig) -> ModelConfig:
    """The config, or InvalidValue that also names the file it came from."""
    try:
        return config.check()
    except InvalidValue as error:
        raise InvalidValue(f"{fields.where}: {error}") from error


def read_dtype(fields: Fields, default: str) -> str:
    """`dtype`, in older files `torch_dtype`."""
    return fields.choice("dtype" if fields.has("dtype") else "torch_dtype", DTYPES, default)


def windows(fields: Fields, count: int, window: int, slides: Callable[[int], bool]) -> list[int]:
    """Each layer's window, 0 where it sees everything: from `layer_types`, or by the family's own rule."""
    types = fields.data.get("layer_types")
    if types is None:
        return [window if window and slides(i) else 0 for i in range(count)]
    if not isinstance(types, list) or len(types) != count or not set(types) <= {SLIDING, FULL}:
        raise fields.refuse("layer_types", f"a list of {count} entries, each {SLIDING} or {FULL}")
    if SLIDING in types and not window:
        raise fields.refuse("sliding_window", f"a positive integer, for layer_types has {SLIDING}")
    return [window if kind == SLIDING else 0 for kind in types]


def sliding_window(fields: Fields, default: int = 0) -> int:
    """`sliding_window`, 0 when null (present but null switches it off, absent takes the family's default)."""
    return (
        fields.integer("sliding_window")
        if fields.has("sliding_window")
        else (0 if "sliding_window" in fields.data else default)
    )


def write_decoder(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """The keys that all families but GPT-2 share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _HF_ACTIVATIONS.get(config.activation, "silu"),
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.dtype,
        **more,
    }


def write_layer_types(config: ModelConfig) -> list[str]:
    return [SLIDING if kind.window else FULL for kind in config.layers]


def one_window(config: ModelConfig) -> int | None:
    """The window of the layers that have one, None when none has; a config.json cannot hold two sizes."""
    sizes = {kind.window for kind in config.layers if kind.window}
    if len(sizes) > 1:
        raise InvalidValue(f"a config.json holds one sliding window, the model has {sorted(sizes)}; make them equal")
    return sizes.pop() if sizes else None


def every_window(config: ModelConfig) -> int | None:
    """The window of a family whose layers all have the same one, None for none."""
    if len({kind.window for kind in config.layers}) > 1:
        raise InvalidValue(f"a {config.family} config holds one window for all layers; give each layer the same")
    return config.layers[0].window or None


def one_rope(config: ModelConfig) -> Rope:
    """The rotary positions of a family whose layers all share them."""
    ropes = {kind.rope for kind in config.layers}
    rope = config.layers[0].rope
    if rope is None or len(ropes) > 1:
        raise InvalidValue(f"a {config.family} config holds one kind of rotary positions; give each layer the same")
    return rope
