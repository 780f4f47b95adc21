"""From and to a Hugging Face config.json, for every family in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.models.huggingface.common import Family
from rooflight.models.huggingface.dense import DENSE
from rooflight.models.huggingface.fields import Fields, read_json
from rooflight.models.huggingface.moe import MOE

__all__ = ["FAMILIES", "Family", "config_from_hf", "config_to_hf", "load_config", "read_json", "text_part"]

FAMILIES: dict[str, Family] = DENSE | MOE


def text_part(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own settings: of a multimodal Gemma 3 its `text_config`, else the whole."""
    if data.get("model_type") != "gemma3" or not isinstance(data.get("text_config"), dict):
        return data
    return {**data["text_config"], "model_type": "gemma3_text"}


def config_from_hf(data: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """`ModelConfig` of a config.json's content, in the old spelling or in that of transformers 5.

    Raises InvalidValue, naming `where`, the key and what is allowed, on a model type that is not in FAMILIES, a missing
    or ill-typed key, and a setting that the decoder does not implement. Defaults are those of transformers 5.23.
    """
    if not isinstance(data, Mapping):
        raise InvalidValue(
            f"{where}: holds a {type(data).__name__}; it must be a JSON object with the model's settings"
        )
    fields = Fields(text_part(data), where)
    return FAMILIES[fields.choice("model_type", FAMILIES)].read(fields)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers builds the same model from; `config_from_hf` of it gives the config back."""
    family = FAMILIES.get(config.family)
    if family is None:
        raise InvalidValue(f"model family {config.family!r} has no config.json; use one of {', '.join(FAMILIES)}")
    return {"architectures": [family.architecture], "model_type": config.family, **family.write(config)}


def load_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint directory or of a config.json file, named after the directory."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return replace(config_from_hf(read_json(file), str(file)), name=name)
