"""Export of a trained model: a Hugging Face directory that Rooflight and transformers load with equal logits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from rooflight.errors import InvalidValue, RooflightError
from rooflight.models.huggingface import read_json
from rooflight.models.huggingface.common import DTYPES
from rooflight.models.naming import tensors
from rooflight.models.transformer import Transformer
from rooflight.models.weights import GIB, materialize, save
from rooflight.train.checkpoint.manifest import sync, write_synced

# Lists the files of an export, so that a later one replaces these and never a file of the user's.
MARKER = "rooflight_export.json"
CONFIG, GENERATION = "config.json", "generation_config.json"


class ExportedTokenizer(Protocol):
    """What an export needs of a tokenizer; `rooflight.train.data.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int: ...

    eos_id: int
    prefix: tuple[int, ...]

    def save(self, directory: str | Path) -> None: ...


def export(
    model: Transformer,
    directory: str | Path,
    tokenizer: ExportedTokenizer | str | Path | None,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * GIB,
) -> Path:
    """Write weights, config, tokenizer and generation settings into `directory`, whole or not at all; its path.

    tokenizer: an object, where to load one from, or None for a model of bare token ids. dtype: what to store the
    weights in, the model's own unless given; another one takes a converted copy in host memory. A directory that holds
    anything but a previous export is refused; `overwrite` replaces any that has a config.json, with all that is in it.

    Raises InvalidValue on such a directory, on a dtype that config.json cannot name and on a tokenizer with more tokens
    than the model; RooflightError when the disk is full or fails: what stood there before still does.
    """
    directory = Path(directory).expanduser().resolve()
    check_target(directory, overwrite)
    if isinstance(tokenizer, (str, Path)):
        from rooflight.models.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise InvalidValue(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "export with the tokenizer that the model was trained with"
        )
    model = _converted(model, dtype)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(model, partial, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(partial)
        _write_special_tokens(partial, tokenizer)
        names = sorted(path.name for path in partial.iterdir())
        for name in names:
            sync(partial / name)
        _write_json(partial / MARKER, {"format": "rooflight-export", "version": 1, "files": [*names, MARKER]})
        sync(partial)
        _put_in_place(partial, directory)
    except (OSError, SafetensorError) as error:
        there = next(path for path in (directory, *directory.parents) if path.exists())
        raise RooflightError(
            f"{directory}: the export was not written ({str(error).partition(chr(10))[0]}), "
            f"{shutil.disk_usage(there).free / GIB:.3f} GiB are free there; make room or export elsewhere"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def check_target(directory: str | Path, overwrite: bool = False) -> None:
    """Raise InvalidValue unless `export` may write there: a new or empty directory, a previous export, or `overwrite`.

    A long run asks before it starts.
    """
    directory = Path(directory).expanduser()
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InvalidValue(f"{directory}: is a file; export to a directory")
    there = {path.name for path in directory.iterdir()}
    if not there or (overwrite and CONFIG in there):
        return
    listed = read_json(directory / MARKER).get("files") if MARKER in there else None
    strange = sorted(there - set(listed)) if isinstance(listed, list) else sorted(there)
    if strange:
        kind = "which the previous export did not write" if listed else "which is no export of Rooflight"
        raise InvalidValue(f"{directory}: holds {strange[0]}, {kind}; export to a new directory, or move it away")


def _converted(model: Transformer, dtype: torch.dtype | None) -> Transformer:
    """The model itself, or a copy in host memory whose parameters have another dtype."""
    stored = next(iter(model.parameters())).dtype
    wanted = str(dtype or stored).removeprefix("torch.")
    if wanted not in DTYPES:
        raise InvalidValue(f"weights cannot be exported in {wanted}; use one of {', '.join(DTYPES)}")
    if dtype in (None, stored):
        return model
    with torch.device("meta"):
        copy = Transformer(replace(model.config, dtype=wanted))
    materialize(copy, "cpu", dtype)
    ours = tensors(model)
    with torch.no_grad():
        for name, tensor in tensors(copy).items():
            tensor.copy_(ours[name])
    return copy


def _write_special_tokens(directory: Path, tokenizer: ExportedTokenizer | None) -> None:
    """The tokenizer's end and beginning of text in config.json and generation_config.json."""
    bos = tokenizer.prefix[0] if tokenizer is not None and tokenizer.prefix else None
    eos = None if tokenizer is None else tokenizer.eos_id
    config = read_json(directory / CONFIG)
    # The classes' own defaults would stand otherwise, ids of another vocabulary. No padding token: transformers keeps
    # the gradient of its embedding at zero, and the end of text must go on learning.
    _write_json(directory / CONFIG, {**config, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None})
    named = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    settings = {key: token for key, token in named.items() if token is not None}
    _write_json(directory / GENERATION, {**settings, "do_sample": False})


def _put_in_place(partial: Path, directory: Path) -> None:
    """Rename the finished export; what stood there goes only when the new one has its name."""
    old = directory.with_name(f".{directory.name}.removed-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    write_synced(file, json.dumps(data, indent=2))
