"""From settings to what an engine stands on: checkpoint directory, config, tokenizer, sampling defaults, weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.models.huggingface import load_config, read_json
from rooflight.models.layers import Linear
from rooflight.models.presets import resolve
from rooflight.models.tokenizer import FILE, Tokenizer
from rooflight.models.transformer import Head, Transformer
from rooflight.models.weights import load_pretrained
from rooflight.ops.cpu_matmul import pack
from rooflight.serve.settings import EngineSettings
from rooflight.workload.program import DTYPES, build_model

Say = Callable[[str], None]
BYTES = 256  # a model of this vocabulary reads bytes
# What of a checkpoint is fetched from the hub: weights, configs, tokenizer; not other frameworks' weights.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a model before its weights are read.

    directory: of the checkpoint; None for random weights of a preset. eos_ids: tokens that end a text. defaults:
    sampling parameters that its generation_config.json recommends.
    """

    name: str
    config: ModelConfig
    directory: Path | None
    tokenizer: Tokenizer | None
    device: torch.device
    dtype: str
    max_model_len: int
    eos_ids: frozenset[int] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


def device_of(settings: EngineSettings) -> torch.device:
    """The device that the settings name; raises InvalidValue for a GPU that is not there."""
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise InvalidValue(
            "--device cuda: PyTorch sees no CUDA GPU here; use --device cpu, or bench --dry --on MACHINE"
        )
    return torch.device("cuda" if settings.device != "cpu" and there else "cpu")


def find(settings: EngineSettings, device: torch.device | None = None) -> Source:
    """Everything about a model but its weights; raises InvalidValue in one line on what is not there or cannot be."""
    settings.check()
    device = device or device_of(settings)
    dummy = settings.load_format == "dummy"
    directory = _directory(settings.model, dummy)
    if dummy:
        name, config = resolve(settings.model)
    elif directory is None:
        raise InvalidValue(
            f"model {settings.model!r} is a preset without weights; give a checkpoint directory or a hub id, or add "
            "--load-format dummy for random weights"
        )
    else:
        name, config = settings.model, load_config(directory)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = _NAMES[getattr(torch, config.dtype)]
    tokenizer = _tokenizer(settings, directory, config)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InvalidValue(
            f"the tokenizer has {tokenizer.vocab_size} tokens, {name} a vocabulary of {config.vocab_size}; "
            "give the tokenizer that belongs to it"
        )
    if settings.max_model_len > config.max_context:
        raise InvalidValue(
            f"--max-model-len {settings.max_model_len} is beyond the model's {config.max_context} positions; "
            f"use 1 to {config.max_context}"
        )
    generation = _json(directory, "generation_config.json")
    return Source(
        name,
        config,
        directory,
        tokenizer,
        device,
        dtype,
        settings.max_model_len or config.max_context,
        _eos_ids(generation, _json(directory, "config.json"), tokenizer),
        {key: generation[key] for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
         if isinstance(generation.get(key), int | float)},
    )  # fmt: skip


def weights(source: Source, settings: EngineSettings, say: Say, packed: bool = False) -> Transformer:
    """The model on its device: random with --load-format dummy, else read from its directory a tensor at a time.

    packed: keep matrices a second time, in the order that a CPU's products want.
    """
    if settings.load_format == "dummy" or source.directory is None:
        say(f"making random weights of {source.name}")
        model = build_model(source.config, source.dtype, source.device).initialize(settings.seed)
    else:
        say(f"loading weights from {source.directory}")
        model = load_pretrained(source.directory, source.device, DTYPES[source.dtype])
    if packed:
        for module in model.modules():
            if isinstance(module, Linear | Head):
                pack(module.weight)
    return model.requires_grad_(False).eval()


def with_length(source: Source, max_model_len: int) -> Source:
    """The same with another longest context."""
    return dataclasses.replace(source, max_model_len=max_model_len)


def _directory(model: str, dummy: bool) -> Path | None:
    path = Path(os.path.expanduser(model))
    # os.path takes any text, Path refuses one that is longer than a file name may be.
    if os.path.isdir(path):
        return path
    is_hub_id = model.count("/") == 1 and all(model.split("/")) and not model.startswith((".", "~"))
    if dummy or not is_hub_id or path.suffix == ".json":
        if not dummy and os.path.isfile(path):
            raise InvalidValue(f"model {model} is a file; give its directory, or add --load-format dummy")
        if not dummy:
            # An unknown name is told with the names that are near it.
            resolve(model)
        return None
    return _from_hub(model)


def _from_hub(model: str) -> Path:
    """The checkpoint's files from the hub, or from its local cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED)))
    except HFValidationError as error:
        raise InvalidValue(f"model {model!r} is neither a directory here nor a hub id owner/name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidValue(
            f"model {model}: no such directory, and the Hugging Face hub does not give it ({reason}); check the id, "
            "log in to the hub if it is gated, or give a local directory"
        ) from error


def _tokenizer(settings: EngineSettings, directory: Path | None, config: ModelConfig) -> Tokenizer | None:
    if settings.tokenizer:
        return Tokenizer.load(settings.tokenizer)
    if directory is not None and (directory / FILE).is_file():
        return Tokenizer.load(directory)
    return Tokenizer.bytes() if config.vocab_size == BYTES else None


def _json(directory: Path | None, name: str) -> dict[str, Any]:
    if directory is None or not (directory / name).is_file():
        return {}
    return dict(read_json(directory / name))


def _eos_ids(generation: dict[str, Any], config: dict[str, Any], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ends of text: those that generation_config.json names, else config.json's, and the tokenizer's own."""
    named = generation.get("eos_token_id")
    named = config.get("eos_token_id") if named is None else named
    ids = named if isinstance(named, list) else [named]
    found = {token for token in ids if isinstance(token, int) and not isinstance(token, bool)}
    if tokenizer is not None:
        found.add(tokenizer.eos_id)
    return frozenset(found)
