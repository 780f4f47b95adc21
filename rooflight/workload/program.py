"""The programs that are run wet and dry: prefill, decode and a training step of a decoder.

Legend: B sequences  T tokens  M blocks a sequence  N blocks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from rooflight.models.config import ModelConfig
from rooflight.models.layers import Linear
from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.models.recompute import Recompute
from rooflight.models.transformer import Transformer
from rooflight.ops import batch as batches
from rooflight.ops.sampling import greedy
from rooflight.workload.optimizers import build as build_optimizer
from rooflight.workload.optimizers import make_optimizer, optimizer_states
from rooflight.workload.record import Recorder
from rooflight.workload.training import MicroBatch, Recipe, Trainee, stand_ins

PHASES = ("prefill", "decode", "train")
# What weights are kept in; of fp8, which is for training, only the products are.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
KV_DTYPES = {**DTYPES, "fp8": torch.float8_e4m3fn}
RECOMPUTES = ("none", "selective", "full")
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run: the phase and its sizes (symbolic ones allowed) and the choices that change the program.

    text: what a wet run reads, a byte a token; random tokens when None.
    recipe: how a training step is taken in all detail; then `batch` is a micro-batch's, and recompute and optimizer
        are the recipe's.
    """

    phase: str = "prefill"
    batch: Any = 1
    context: Any = 2048
    dtype: str = "bf16"
    kv_dtype: str | None = None
    text: bytes | None = None
    attention: str = "flash"
    recompute: str = "none"
    optimizer: str = "adamw"
    recipe: Recipe | None = None


@dataclass(slots=True)
class Program:
    """A module, what it stands on, and `step`, which runs it once (under `recorder` when one is given).

    standing: what is there before the step, by kind, each piece with how often it stands in the whole model.
    order: for each layer of the whole, the layer of `module` that stands for it.
    example: the arguments of a module that is not ours.
    """

    module: nn.Module
    step: Callable[[Recorder | None], Any]
    standing: dict[str, list[tuple[Any, int]]] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    example: Any = ()


@contextmanager
def _defaults(dtype: torch.dtype, device: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(config: ModelConfig, dtype: str, device: Any) -> Transformer:
    """The decoder with uninitialised weights on a device; "fp8" is bf16 weights and `use_fp8`."""
    with _defaults(DTYPES[dtype], device):
        model = Transformer(config)
    return use_fp8(model) if dtype == "fp8" else model


def use_fp8(model: Transformer) -> Transformer:
    """Run the products of attention's projections and of dense feed-forwards in fp8; experts, router, head stay."""
    for name, module in model.layers.named_modules():
        # "3.attention.qkv", "3.ffn.up"; what lies deeper is a mixture of experts' own.
        _, *place = name.split(".")
        if isinstance(module, Linear) and len(place) == 2 and place[1] != "router":
            module.fp8 = True
    return model


def _tokens(config: ModelConfig, count: Any, device: Any, text: bytes | None = None) -> Tensor:
    """Token ids: a text's bytes, repeated as often as needed, or random ones; on fake tensors only the shape counts."""
    if text:
        ids = torch.frombuffer(bytearray(text[:count]), dtype=torch.uint8).long()
        return ids.repeat(-(-count // len(ids)))[:count].to(device)
    if isinstance(count, torch.SymInt) or isinstance(config.vocab_size, torch.SymInt):
        return torch.empty((count,), dtype=torch.int64, device=device)
    return torch.randint(0, config.vocab_size, (count,), device=device)


def _paged(config: ModelConfig, setting: Setting, query: Any, device: Any) -> Paged:
    """A cache with room for every sequence's context, its blocks dealt out in order."""
    sequences, context = setting.batch, setting.context
    blocks = (context + BLOCK_SIZE - 1) // BLOCK_SIZE
    dtype = KV_DTYPES[setting.kv_dtype or setting.dtype]
    cache = KVCache.allocate(config, sequences * blocks, BLOCK_SIZE, dtype, device)
    int32 = {"dtype": torch.int32, "device": device}
    first_B = torch.arange(sequences, dtype=torch.int64, device=device) * (blocks * BLOCK_SIZE)
    new_Q = torch.arange(context - query, context, dtype=torch.int64, device=device)
    return Paged(
        cache=cache,
        block_table_BM=torch.arange(sequences * blocks, **int32).view(sequences, blocks),
        context_lengths_B=torch.full((sequences,), context, **int32),
        query_starts_B1=torch.arange(sequences + 1, **int32) * query,
        slots_T=(first_B.unsqueeze(-1) + new_Q).flatten(),
        max_query=query,
        equal_context=context,
    )


def _fill_cache(paged: Paged) -> None:
    """Random contents, for timing on zeros or on stale memory would lie."""
    for tensor in (*paged.cache.keys, *paged.cache.values):
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape[1:], device=tensor.device).to(tensor.dtype))


def _repeated(model: Transformer, counts: tuple[int, ...], kind: str) -> list[tuple[Any, int]]:
    """Parameters or buffers in and outside the layers, a folded layer's as often as it stands in the whole."""
    layers = [(list(getattr(layer, kind)()), count) for layer, count in zip(model.layers, counts, strict=True)]
    inside = {id(tensor) for tensors, _ in layers for tensor in tensors}
    return [([tensor for tensor in getattr(model, kind)() if id(tensor) not in inside], 1), *layers]


def _weights(model: Transformer, counts: tuple[int, ...]) -> list[tuple[Any, int]]:
    return _repeated(model, counts, "parameters")


def _buffers(model: Transformer, counts: tuple[int, ...]) -> list[tuple[Any, int]]:
    return _repeated(model, counts, "buffers")


def inference(
    config: ModelConfig, setting: Setting, device: Any, counts: tuple[int, ...], model: Transformer | None = None
) -> Program:
    """Prefill of `batch` prompts of `context` tokens, or one decode step at `context` tokens, and greedy sampling."""
    decode = setting.phase == "decode"
    query = 1 if decode else setting.context
    if model is None:
        model = build_model(config, setting.dtype, device)
    model.requires_grad_(False)
    paged = _paged(config, setting, query, device)
    if torch.device(device).type != "meta" and not isinstance(setting.batch, torch.SymInt):
        _fill_cache(paged)
    layout = Layout(None if decode else (setting.batch, query), paged, setting.attention)
    tokens_T = _tokens(config, setting.batch * query, device, setting.text)
    positions_T = torch.arange(setting.context - query, setting.context, device=device).repeat(setting.batch)
    last_B = (paged.query_starts_B1[1:] - 1).long()
    facts = batches.Batch.uniform(setting.batch, query, setting.context)

    def step(recorder: Recorder | None = None) -> Tensor:
        with batches.use(facts), torch.no_grad():
            select = None if decode else last_B
            return greedy(model(tokens_T, positions_T, layout, None, select))

    cache = [(pair, n) for pair, n in zip(zip(paged.cache.keys, paged.cache.values, strict=True), counts, strict=True)]
    inputs = [tokens_T, positions_T, last_B, paged.block_table_BM, paged.context_lengths_B, paged.slots_T]
    inputs += [paged.query_starts_B1]
    standing = {"weights": _weights(model, counts), "kv cache": cache}
    return Program(model, step, standing | {"inputs": [(inputs, 1), *_buffers(model, counts)]})


def training(
    config: ModelConfig,
    setting: Setting,
    device: Any,
    counts: tuple[int, ...],
    model: Transformer | None = None,
) -> Program:
    """One step: forward with the fused loss, backward, optimizer.

    counts: how often each folded layer stands in the whole; the optimizer is then handed stand-ins for the parameters
    of the layers left out, so that it moves what it moves for the whole model.
    """
    if model is None:
        model = build_model(config, setting.dtype, device)
    tokens = setting.batch * setting.context
    tokens_T = _tokens(config, tokens, device, setting.text)
    targets_T = tokens_T.roll(-1) if setting.text else _tokens(config, tokens, device)
    positions_T = torch.arange(setting.context, device=device).repeat(setting.batch)
    recipe = setting.recipe or Recipe(cast("Recompute", setting.recompute))
    layout, facts = _rows(setting, recipe.document_length, device)
    micro = MicroBatch(tokens_T, targets_T, positions_T, layout, facts)
    trainee = make_trainee(model, recipe, setting.optimizer, counts)
    states = optimizer_states(trainee.optimizer)
    micros = [micro] * trainee.recipe.micro_batches
    targets = 0 if len(micros) == 1 else tokens * len(micros)

    def step(recorder: Recorder | None = None) -> Tensor:
        return trainee.step(micros, targets=targets, recorder=recorder).loss

    inputs = [([tokens_T, targets_T, positions_T], 1), *_buffers(model, counts)]
    standing = {"weights": _weights(model, counts), "optimizer": [(states, 1)], "inputs": inputs}
    standing["gradients"] = [(list(trainee.accumulators.values()), 1)]
    return Program(model, step, standing)


def _rows(setting: Setting, document_length: int, device: Any) -> tuple[Layout, batches.Batch]:
    """Whole rows, or rows packed with documents of one length and the rest of the row."""
    if not 0 < document_length < setting.context:
        facts = batches.Batch.uniform(setting.batch, setting.context, setting.context)
        return Layout((setting.batch, setting.context), None, setting.attention), facts
    whole, rest = divmod(setting.context, document_length)
    row = [document_length] * whole + ([rest] if rest else [])
    return Layout.of_documents(row * setting.batch, device, setting.context)


def make_trainee(model: Transformer, recipe: Recipe, optimizer: str, counts: tuple[int, ...]) -> Trainee:
    """The model with its optimizer: the recipe's own, or the one that is named."""
    trainee = Trainee(model, recipe)
    muon = optimizer == "muon" if recipe.update is None else recipe.update.name == "muon"
    trainee.stand_ins = stand_ins(model, counts, hidden_apart=muon)
    if recipe.update is None:
        trainee.optimizer = make_optimizer(optimizer, trainee.parameters())
    else:
        trainee.optimizer = build_optimizer(recipe.update, trainee.parameters())
    if recipe.fp32_gradients:
        trainee.accumulate_in_fp32()
    return trainee


def decoder(
    config: ModelConfig, setting: Setting, device: Any, *, fold: bool, model: Transformer | None = None
) -> Program:
    """The program of a setting; with `fold` each distinct layer stands once and `counts` says how often it repeats."""
    counts: tuple[int, ...] = tuple(1 for _ in config.layers)
    order = tuple(range(len(config.layers)))
    if fold:
        order = config.layer_order()
        config, counts = config.folded()
    if setting.phase == "train":
        program = training(config, setting, device, counts, model)
    else:
        program = inference(config, setting, device, counts, model)
    program.order = order
    return program
