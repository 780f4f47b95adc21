"""Weights from and to Hugging Face checkpoints: sharded safetensors, streamed a tensor at a time and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rooflight.errors import InvalidValue, WeightsMismatch
from rooflight.models.config import ModelConfig
from rooflight.models.huggingface import config_to_hf, load_config
from rooflight.models.naming import Piece, canonical, ignored, pieces, tensors
from rooflight.models.shards import INDEX, SINGLE, headers, shard_files, stream
from rooflight.models.transformer import Transformer

GIB = 1 << 30
# Suffixes of tensors that only a quantized checkpoint holds.
_QUANTIZED = ("_blocks", "_scales", "weight_scale_inv", "qweight", "weight_scale")


def load_pretrained(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a checkpoint directory with its weights, in the dtype that its config names unless one is given."""
    config = load_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    return load(model, directory, device, dtype or getattr(torch, config.dtype))


def load(model: Transformer, directory: str | Path, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """Fill `model` (best built on the meta device) from a checkpoint, on `device` and in `dtype`; returns it.

    Beyond the model itself one tensor is held at a time. Raises WeightsMismatch on a missing, unexpected or wrongly
    shaped tensor before anything is read, and InvalidValue on a directory without weights or a corrupt file.
    """
    directory = Path(directory)
    files = shard_files(directory)
    expected = {piece.name: piece for piece in pieces(model.config, tensors(model))}
    found = {file: headers(file) for file in files}
    _check(model.config, directory, expected, tensors(model), found)
    materialize(model, device, dtype)
    ours = tensors(model)
    with torch.no_grad():
        for file in files:
            for name, tensor in stream(file):
                piece = expected.get(canonical(model.config, name))
                if piece is not None:
                    piece.view(ours[piece.ours]).copy_(tensor)
    return model


def _check(
    config: ModelConfig,
    directory: Path,
    expected: Mapping[str, Piece],
    ours: Mapping[str, Tensor],
    found: Mapping[Path, Mapping[str, tuple[int, ...]]],
) -> None:
    seen: set[str] = set()
    unexpected: list[str] = []
    for file, shapes in found.items():
        for published, shape in shapes.items():
            name = canonical(config, published)
            if ignored(config, name):
                continue
            if name not in expected:
                unexpected.append(published)
                continue
            wanted = tuple(expected[name].view(ours[expected[name].ours]).shape)
            if shape != wanted:
                raise WeightsMismatch(
                    f"{file}: {published} has shape {list(shape)}, the {config.family} config asks for {list(wanted)}; "
                    "use the config.json that belongs to these weights"
                )
            seen.add(name)
    quantized = [name for name in unexpected if name.endswith(_QUANTIZED)]
    if quantized:
        raise WeightsMismatch(
            f"{directory}: {quantized[0]} belongs to a quantized checkpoint; give one in bfloat16, float16 or float32"
        )
    missing = [name for name in expected if name not in seen]
    for names, what in (
        (missing, "is missing from the checkpoint"),
        (unexpected, "is in the checkpoint, not in the model"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise WeightsMismatch(
                f"{directory}: {names[0]} {what}{more}; use the config.json that belongs to these weights"
            )


def materialize(model: Transformer, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """Give every parameter uninitialised storage on `device`, ties kept, and compute the rotary frequencies there."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                storage = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[id(parameter)] = nn.Parameter(storage, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            # A bias on the choice of experts sways ties and stays in its own precision.
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.reset_frequencies()
    return model


def save(model: Transformer, directory: str | Path, max_shard_bytes: int = 5 * GIB) -> list[Path]:
    """Write config.json and safetensors that transformers loads, in shards of at most `max_shard_bytes`; their paths.

    A tensor larger than a shard gets one of its own. Beyond the model one shard is held at a time.
    """
    if max_shard_bytes <= 0:
        raise InvalidValue(f"max_shard_bytes is {max_shard_bytes}; it must be a positive number of bytes")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ours = tensors(model)
    shards = _plan(pieces(model.config, ours), ours, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        # Views of one fused tensor share storage, which safetensors refuses: each gets its own.
        copies = {p.name: p.view(ours[p.ours].detach()).to("cpu", copy=True).contiguous() for p in shard}
        save_file(copies, directory / name, metadata={"format": "pt"})
    weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
    if len(shards) > 1:
        size = sum(_bytes(piece, ours) for shard in shards for piece in shard)
        _write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    else:
        # An index of an earlier, sharded save would be read instead of this file.
        (directory / INDEX).unlink(missing_ok=True)
    stored = next(iter(model.parameters())).dtype
    config = config_to_hf(model.config) | {"torch_dtype": str(stored).removeprefix("torch.")}
    _write_json(directory / "config.json", config)
    return [directory / name for name in names]


def _plan(parts: Iterable[Piece], ours: Mapping[str, Tensor], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    used = 0
    for piece in parts:
        size = _bytes(piece, ours)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(piece)
        used += size
    return shards


def _bytes(piece: Piece, ours: Mapping[str, Tensor]) -> int:
    part = piece.view(ours[piece.ours])
    return part.numel() * part.element_size()


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
