"""One engine step as a program: what the torch runner runs, on fake tensors, for its price and its memory.

Legend: T tokens of a step  B sequences  R sampled rows  V vocabulary  M columns of the block table  N1 = B + 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.ops import batch as batches
from rooflight.ops.batch import Batch
from rooflight.workload.program import DTYPES, KV_DTYPES, Program, build_model
from rooflight.workload.record import Recorder

# The phase of what follows the layers and gives logits of the sampled rows.
LOGITS = "logits"

Choose = Callable[[Tensor, Recorder], Any]


class StepSizes(NamedTuple):
    """What a step's shapes follow from, symbolic sizes allowed.

    longest: most new tokens of one sequence. columns: of the block table, blocks of the longest sequence.
    """

    tokens: Any
    sequences: Any
    rows: Any
    longest: Any
    columns: Any


def check_dtypes(dtype: str, kv_dtype: str) -> None:
    """Raise InvalidValue on a type that no step can be run in."""
    for name, value, known in (("dtype", dtype, DTYPES), ("kv cache dtype", kv_dtype, KV_DTYPES)):
        if value not in known:
            raise InvalidValue(f"{name} {value!r} is unknown; use one of {', '.join(known)}")


def step_program(
    config: ModelConfig, dtype: str, kv_dtype: str, block_size: int, sizes: StepSizes, facts: Batch, choose: Choose
) -> Program:
    """Hidden states of T tokens over a paged cache, logits of R rows of them, and what `choose` makes of those.

    facts: contexts, by which attention is priced. Layers alike are folded, and the cache has a single block, for its
    size is no part of a step's cost. To be called where tensors are fake, and run under a recorder.
    """
    folded, counts = config.folded()
    model = build_model(folded, dtype, "cpu").requires_grad_(False)
    cache = KVCache.allocate(folded, 1, block_size, KV_DTYPES[kv_dtype], "cpu")
    tokens_T, positions_T, slots_T = (torch.empty((sizes.tokens,), dtype=torch.int64) for _ in range(3))
    rows_R = torch.empty((sizes.rows,), dtype=torch.int64)
    table_BM = torch.empty((sizes.sequences, sizes.columns), dtype=torch.int32)
    contexts_B = torch.empty((sizes.sequences,), dtype=torch.int32)
    starts_N1 = torch.empty((sizes.sequences + 1,), dtype=torch.int32)
    layout = Layout(None, Paged(cache, table_BM, contexts_B, starts_N1, slots_T, sizes.longest))

    def step(recorder: Recorder | None = None) -> Any:
        if recorder is None:
            raise InvalidValue("a step's program has no values to run on; run it under a recorder")
        with batches.use(facts), torch.no_grad():
            hidden_TD = model.hidden(tokens_T, positions_T, layout)
            with recorder.phase(LOGITS):
                logits_RV = model.head(hidden_TD.index_select(0, rows_R))
            return choose(logits_RV, recorder)

    layers = [(list(layer.parameters()), count) for layer, count in zip(model.layers, counts, strict=True)]
    inside = {id(parameter) for parameters, _ in layers for parameter in parameters}
    ends = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    inputs = [tokens_T, positions_T, slots_T, rows_R, table_BM, contexts_B, starts_N1, list(model.buffers())]
    standing = {
        "weights": [*layers, (ends, 1)],
        "kv cache": [((cache.keys, cache.values), 1)],
        "inputs": [(inputs, 1)],
    }
    return Program(model, step, standing, order=config.layer_order())
