"""Rotary positions in a config.json: `rope_theta` with `rope_scaling`, or transformers 5's `rope_parameters`."""

from __future__ import annotations

from typing import Any

from rooflight.models.config import Rope
from rooflight.models.huggingface.fields import Fields

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
# Phi-3's first releases called LongRoPE by its working title.
_OLD_NAMES = {"su": "longrope"}


def read_rope(
    fields: Fields,
    head_dim: int,
    max_context: int,
    theta: float = 10_000.0,
    interleaved: bool = False,
    layer_type: str = "",
) -> Rope:
    """The rotary positions of a config, of one layer type where `rope_parameters` is nested by layer type."""
    scaling = fields.section("rope_scaling") or fields.section("rope_parameters") or Fields({}, fields.where)
    if layer_type:
        scaling = scaling.section(layer_type) or scaling
    theta = scaling.number("rope_theta", fields.number("rope_theta", theta))
    partial = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    return read_scaling(scaling, fields, theta, int(head_dim * partial), max_context, interleaved)


def read_scaling(
    scaling: Fields, fields: Fields, theta: float, dims: int, max_context: int, interleaved: bool = False
) -> Rope:
    """`Rope` from the mapping that holds the kind and its factors; a key that its kind does not read is left out."""
    key = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.choice(key, (*KINDS, *_OLD_NAMES), "default")
    kind = _OLD_NAMES.get(kind, kind)
    original = fields.integer(
        "original_max_position_embeddings", scaling.integer("original_max_position_embeddings", max_context)
    )
    rope: dict[str, Any] = {"theta": theta, "dims": dims, "interleaved": interleaved, "kind": kind}
    if kind == "linear":
        rope["factor"] = scaling.number("factor")
    elif kind == "llama3":
        rope |= {
            "factor": scaling.number("factor"),
            "low_freq_factor": scaling.number("low_freq_factor"),
            "high_freq_factor": scaling.number("high_freq_factor"),
            "original_context": original,
        }
    elif kind == "yarn":
        rope |= {
            "factor": scaling.number("factor", max_context / original),
            "original_context": original,
            "beta_fast": scaling.number("beta_fast", 32.0) or 32.0,
            "beta_slow": scaling.number("beta_slow", 1.0) or 1.0,
            "truncate": scaling.flag("truncate", True),
            "attention_factor": scaling.number("attention_factor") if scaling.has("attention_factor") else None,
            "mscale": scaling.number("mscale", 0.0),
            "mscale_all_dim": scaling.number("mscale_all_dim", 0.0),
        }
    elif kind == "longrope":
        rope |= {
            "factor": scaling.number("factor", max_context / original),
            "original_context": original,
            "attention_factor": scaling.number("attention_factor") if scaling.has("attention_factor") else None,
            "short_factors": scaling.numbers("short_factor", dims // 2),
            "long_factors": scaling.numbers("long_factor", dims // 2),
        }
    return Rope(**rope)


def write_rope(rope: Rope, max_context: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the spelling that every release of transformers reads."""
    return {"rope_theta": rope.theta, "rope_scaling": write_scaling(rope, max_context)}


def write_scaling(rope: Rope, max_context: int) -> dict[str, Any] | None:
    """The mapping that `read_scaling` reads, None for plain rotary positions."""
    if rope.kind == "default":
        return None
    out: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "longrope" or rope.factor != max_context / rope.original_context:
        out["factor"] = rope.factor
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        out |= {key: getattr(rope, key) for key in ("mscale", "mscale_all_dim") if getattr(rope, key)}
    if rope.kind == "longrope":
        out |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_context
    if rope.attention_factor is not None:
        out["attention_factor"] = rope.attention_factor
    return out
