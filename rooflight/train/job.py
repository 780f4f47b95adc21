"""From settings to everything a run stands on: device, config, tokenizer, data, model and optimizer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rooflight.errors import InvalidValue
from rooflight.hardware.host import find_machine, memory_bytes
from rooflight.models.config import ModelConfig
from rooflight.models.presets import resolve
from rooflight.models.transformer import Transformer
from rooflight.models.weights import load_pretrained
from rooflight.train.accounting import PeakMemory, Prediction, predict, recipe
from rooflight.train.data import Dataset, Sources, Tokenizer, tokenize
from rooflight.train.data import resolve as resolve_data
from rooflight.train.data.build import Progress
from rooflight.train.fit import refuse_if_too_large
from rooflight.train.settings import TrainSettings
from rooflight.workload import program
from rooflight.workload.training import Trainee

DEFAULT_CONTEXT = 1024
# A vocabulary for a tokenizer trained here when neither model nor user names one.
DEFAULT_VOCABULARY = 32000
# A model of this vocabulary reads bytes.
BYTES = 256
# Text that a tokenizer is trained on: more changes little and takes long.
TOKENIZER_BYTES = 64 << 20
Say = Callable[[str], None]


@dataclass(slots=True)
class Job:
    """A run ready to start: `settings` are resolved, nothing in them is `auto` or 0 that stands for a default.

    tokenizer: None where the data are token ids and nobody said whose. memory: counts from before the model was made.
    """

    settings: TrainSettings
    name: str
    config: ModelConfig
    device: torch.device
    tokenizer: Tokenizer | None
    dataset: Dataset
    trainee: Trainee
    prediction: Prediction
    memory: PeakMemory

    @property
    def out(self) -> Path:
        return Path(self.settings.out)


def device_of(settings: TrainSettings) -> torch.device:
    """The device that the settings name; raises InvalidValue for a GPU that is not there."""
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise InvalidValue("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu, or --dry --on MACHINE")
    return torch.device("cuda" if settings.device != "cpu" and there else "cpu")


def resolve_model(settings: TrainSettings, gpu: bool) -> tuple[TrainSettings, str, ModelConfig]:
    """Settings with dtype, context and steps filled in, the model's name, and its config with the vocabulary wanted."""
    if not settings.model:
        raise InvalidValue(
            "no --model given; name a preset (see `rooflight explain --list`), a config.json or a checkpoint directory"
        )
    name, config = resolve(settings.model)
    if settings.vocab_size and not _has_weights(settings):
        config = replace(config, vocab_size=settings.vocab_size)
    context = settings.context or min(DEFAULT_CONTEXT, config.max_context)
    if context > config.max_context:
        raise InvalidValue(
            f"--context {context} is beyond the model's {config.max_context} positions; use 1 to {config.max_context}"
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bf16" if gpu else "fp32"
    settings = replace(settings, context=context, dtype=dtype)
    if dtype == "fp32" and settings.rounding == "stochastic":
        raise InvalidValue("--rounding stochastic is for bf16 weights; --dtype fp32 rounds nothing")
    steps = settings.steps or -(-settings.tokens // (settings.batch_size * context))
    return replace(settings, steps=steps, tokens=0).check(), name, config


def _has_weights(settings: TrainSettings) -> bool:
    path = Path(settings.model)
    return path.is_dir() and not settings.from_scratch and any(path.glob("*.safetensors"))


def prepare(settings: TrainSettings, say: Say, resume: bool = False) -> Job:
    """Everything that a wet run needs; `say` is told what takes long. Raises InvalidValue on what cannot be run.

    resume: the tokenizer that the run has kept is taken; else one that an earlier attempt left is replaced.
    """
    device = device_of(settings)
    settings, name, config = resolve_model(settings, device.type == "cuda")
    if not settings.out:
        raise InvalidValue("no --out given; name the directory that the run writes to")
    if not settings.data:
        raise InvalidValue("no --data given; name text files, folders, JSONL, Parquet or token shards")
    if not settings.steps:
        raise InvalidValue("neither --steps nor --tokens given; say how long to train")
    machine, capacity = find_machine(settings.on, device), memory_bytes(device)
    # Before anything is read or made: how documents lie in the rows changes time, hardly memory.
    prediction = predict(config, settings, machine, capacity)
    refuse_if_too_large(config, settings, prediction, capacity)
    sources = resolve_data(settings.data, settings.text_field)
    tokenizer = _tokenizer(settings, config, sources, say, resume)
    dataset = _dataset(settings, sources, tokenizer, say)
    if settings.export and tokenizer is None:
        raise InvalidValue(f"--export {settings.export} needs a tokenizer, and the data are token ids; add --tokenizer")
    ids = dataset.store.vocabulary.size
    if config.vocab_size < ids:
        raise InvalidValue(
            f"the data have {ids} different tokens, {name} a vocabulary of {config.vocab_size}; "
            f"add --vocab-size {ids} for a new model, or choose another --tokenizer"
        )
    if not settings.document_length and (length := _piece_length(dataset)):
        settings = replace(settings, document_length=length)
        prediction = predict(config, settings, machine, capacity)
    # From here on: what came before, text and tokenizer and prediction, is no part of a step.
    memory = PeakMemory(device)
    model = _model(settings, config, device, say)
    trainee = program.make_trainee(model, recipe(settings, config), settings.optimizer, tuple(1 for _ in config.layers))
    if trainee.optimizer is not None:
        trainee.optimizer.allocate()
    return Job(settings, name, config, device, tokenizer, dataset, trainee, prediction, memory)


def _tokenizer(
    settings: TrainSettings, config: ModelConfig, sources: Sources, say: Say, resume: bool
) -> Tokenizer | None:
    """The run's tokenizer, kept in OUT/tokenizer: the one named, the model's, or one trained on the data."""
    kept = Path(settings.out) / "tokenizer"
    if resume and (kept / "tokenizer.json").is_file():
        return Tokenizer.load(kept)
    shutil.rmtree(kept, ignore_errors=True)
    own = Path(settings.model)
    if settings.tokenizer == "auto" and (own / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(own)
    elif settings.tokenizer == "auto" and sources.tokenized:
        held = next((store for store in sources.stores if (store / "tokenizer" / "tokenizer.json").is_file()), None)
        if held is None:
            return None
        tokenizer = Tokenizer.load(held)
    elif settings.tokenizer == "bytes" or (settings.tokenizer == "auto" and config.vocab_size == BYTES):
        tokenizer = Tokenizer.bytes()
    elif settings.tokenizer in ("auto", "train"):
        size = settings.vocab_size or min(config.vocab_size, DEFAULT_VOCABULARY)
        say(f"training a byte-level BPE tokenizer of {size} tokens on the data")
        tokenizer = Tokenizer.train(sources.sample(TOKENIZER_BYTES), size)
    else:
        tokenizer = Tokenizer.load(settings.tokenizer)
    tokenizer.save(kept)
    # Read back, so that this run and every later one use the very same object.
    return Tokenizer.load(kept)


def _dataset(settings: TrainSettings, sources: Sources, tokenizer: Tokenizer | None, say: Say) -> Dataset:
    directory = Path(settings.data_cache) if settings.data_cache else Path(settings.out) / "data"
    store = tokenize(sources, tokenizer, directory, progress=_progress(say))
    dataset = Dataset(store, settings.context, settings.seed, holdout=settings.holdout)
    say(
        f"data: {store.tokens:,} tokens in {store.documents:,} documents; {dataset.rows_per_epoch:,} rows of "
        f"{settings.context} to train on, {dataset.held_out_rows:,} held out"
    )
    for note in sources.notes:
        say(f"data: {note}")
    return dataset


def _piece_length(dataset: Dataset) -> int:
    """Mean tokens of a document within a row, over the first rows; 0 where each is one document."""
    rows = dataset.rows(0, min(dataset.rows_per_epoch, 256))
    pieces = sum(len(lengths) for lengths in rows.lengths)
    return 0 if pieces == len(rows.lengths) else rows.tokens_BQ.size // pieces


def _progress(say: Say) -> Callable[[Progress], None]:
    """Tell how far a long tokenization is, every ten seconds."""
    last = [time.monotonic()]

    def tell(progress: Progress) -> None:
        if time.monotonic() - last[0] >= 10:
            last[0] = time.monotonic()
            share = progress.bytes_read / max(progress.bytes_total, 1)
            say(f"tokenizing: {share:.0%}, {progress.documents:,} documents, {progress.tokens:,} tokens")

    return tell


def _model(settings: TrainSettings, config: ModelConfig, device: torch.device, say: Say) -> Transformer:
    if settings.dtype == "fp8":
        if device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 9):
            say("fp8 is emulated on this device, and slow: GPUs have it from compute capability 8.9 on")
        if settings.micro * settings.context % 16:
            tokens = settings.micro * settings.context
            say(f"fp8 products need a multiple of 16 tokens a forward, and {tokens} is none: bf16 takes their place")
    if not _has_weights(settings):
        return program.build_model(config, settings.dtype, device).initialize(settings.seed)
    say(f"loading weights from {settings.model}")
    model = load_pretrained(settings.model, device, program.DTYPES[settings.dtype])
    return program.use_fp8(model) if settings.dtype == "fp8" else model
