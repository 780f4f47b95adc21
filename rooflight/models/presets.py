"""Models by name: the public configs that ship as data, checkpoint directories, and the Hugging Face hub."""

from __future__ import annotations

import difflib
import os.path
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.models.huggingface import config_from_hf, load_config, read_json

CONFIG = "config.json"
_HUB_TIMEOUT_S = 5

# Ids on the hub whose config is that of a preset, in lower case; instruction-tuned twins share it.
ALIASES: Mapping[str, str] = {
    "gpt2": "gpt-2",
    "gpt2-xl": "gpt-2-xl",
    "openai-community/gpt2": "gpt-2",
    "openai-community/gpt2-xl": "gpt-2-xl",
    "meta-llama/llama-2-7b-hf": "llama-2-7b",
    "meta-llama/llama-2-7b-chat-hf": "llama-2-7b",
    "meta-llama/llama-2-13b-hf": "llama-2-13b",
    "meta-llama/llama-2-13b-chat-hf": "llama-2-13b",
    "meta-llama/llama-2-70b-hf": "llama-2-70b",
    "meta-llama/llama-2-70b-chat-hf": "llama-2-70b",
    **{
        f"meta-llama/meta-llama-3.1-{size}{kind}": f"llama-3.1-{size}"
        for size in ("8b", "70b", "405b")
        for kind in ("", "-instruct")
    },
    **{
        f"meta-llama/llama-3.1-{size}{kind}": f"llama-3.1-{size}"
        for size in ("8b", "70b", "405b")
        for kind in ("", "-instruct")
    },
    **{
        f"meta-llama/llama-3.2-{size}{kind}": f"llama-3.2-{size}" for size in ("1b", "3b") for kind in ("", "-instruct")
    },
    "mistralai/mistral-7b-v0.1": "mistral-7b",
    "mistral-7b-v0.1": "mistral-7b",
    "mistralai/mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x7b-instruct-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x22b-v0.1": "mixtral-8x22b",
    **{f"qwen/qwen2.5-{size}": f"qwen2.5-{size}" for size in ("0.5b", "7b", "72b")},
    **{f"qwen/qwen3-{size}": f"qwen3-{size}" for size in ("0.6b", "1.7b", "8b", "32b", "30b-a3b", "235b-a22b")},
    **{f"google/gemma-2-{size}{kind}": f"gemma-2-{size}" for size in ("2b", "9b", "27b") for kind in ("", "-it")},
    **{f"google/gemma-3-{size}-{kind}": f"gemma-3-{size}" for size in ("1b", "4b", "27b") for kind in ("pt", "it")},
    "microsoft/phi-3-mini-4k-instruct": "phi-3-mini",
    "phi-3-mini-4k": "phi-3-mini",
    "microsoft/phi-4-mini-instruct": "phi-4-mini",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "deepseek-ai/deepseek-v2": "deepseek-v2",
    "deepseek-ai/deepseek-v2-lite": "deepseek-v2-lite",
    "deepseek-ai/deepseek-v3": "deepseek-v3",
}


def _folder() -> Any:
    return files("rooflight.models") / "presets"


@cache
def names() -> tuple[str, ...]:
    """The presets' names, sorted; read from the file names alone."""
    return tuple(
        sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))
    )


@cache
def raw(name: str) -> dict[str, Any]:
    """A preset's config.json as it ships; `_source` says where its figures come from."""
    return read_json(Path(str(_folder() / f"{preset_name(name)}.json")))


@cache
def preset(name: str) -> ModelConfig:
    """The config of one preset, whatever the case of its name; an unknown one raises InvalidValue with the nearest."""
    name = preset_name(name)
    return replace(config_from_hf(raw(name), f"preset {name}"), name=name)


def presets() -> dict[str, ModelConfig]:
    """Every preset by name."""
    return {name: preset(name) for name in names()}


def preset_name(model: str) -> str:
    """The preset that a name or a hub id stands for; InvalidValue when there is none."""
    name = ALIASES.get(model.lower(), model.lower())
    if name in names():
        return name
    raise _unknown(model)


def resolve(model: str) -> tuple[str, ModelConfig]:
    """Name and config of a checkpoint directory, a config.json file, a preset, or a model on the hub.

    A path is taken first, then presets and the hub ids that they stand for, then the hub itself for `owner/name`.
    Raises InvalidValue in one line on an unknown name, a corrupt file, or a hub that cannot be reached.
    """
    path = Path(model)
    # os.path takes any text, Path refuses one that is longer than a file name may be.
    if model and (os.path.isdir(model) or os.path.isfile(model)):
        config = load_config(path)
        return config.name, config
    if model.lower() in ALIASES or model.lower() in names():
        config = preset(model)
        return config.name, config
    if path.suffix == ".json" or path.is_absolute() or model.startswith((".", "~")):
        raise InvalidValue(f"model {model}: there is no such file or directory; give a config.json or its directory")
    if model.count("/") == 1 and all(model.split("/")):
        return model, replace(load_config(_from_hub(model)), name=model)
    raise _unknown(model)


def _from_hub(model: str) -> Path:
    """The model's config.json from the hub, or from its local cache where the hub cannot be reached."""
    # Imported here: it takes longer than pricing a model does, and most runs never ask the hub.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        reached = True
        try:
            get_hf_file_metadata(hf_hub_url(model, CONFIG), timeout=_HUB_TIMEOUT_S)
        except HfHubHTTPError:
            raise
        except Exception:
            # No connection, told in the classes of whichever HTTP library the client is built on. Asked once, for the
            # download itself would try for half a minute.
            reached = False
        return Path(hf_hub_download(model, CONFIG, local_files_only=not reached))
    except HFValidationError as error:
        raise _unknown(model) from error
    except LocalEntryNotFoundError as error:
        raise InvalidValue(
            f"model {model}: it is not a preset, and the Hugging Face hub cannot be reached; give a config.json, "
            "or a preset from `rooflight explain --list`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidValue(
            f"model {model}: the Hugging Face hub does not give its config.json ({reason}); check the id, log in to "
            "the hub if it is gated, or give a preset from `rooflight explain --list`"
        ) from error


def _unknown(model: str) -> InvalidValue:
    near = difflib.get_close_matches(model.lower(), [*names(), *ALIASES], n=3, cutoff=0.5)
    known = list(dict.fromkeys(ALIASES.get(name, name) for name in near))
    hint = f"did you mean {' or '.join(known)}? " if known else ""
    return InvalidValue(
        f"model {model!r} is unknown; {hint}give a directory, a config.json, a hub id owner/name, "
        "or a preset from `rooflight explain --list`"
    )
