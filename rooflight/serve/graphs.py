"""CUDA graphs of a model's runs: decode steps one a batch size, other steps one a number of tokens, all made at start.

A captured run reads its inputs where `Inputs.send` always puts them, and is padded to the size that was captured.
Legend: B rows of a captured size  T tokens of a captured size  D width  V vocabulary
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rooflight.models.config import ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.models.layout import Layout, Paged
from rooflight.models.transformer import Transformer
from rooflight.ops.sampling import sample_plain
from rooflight.serve.inputs import Inputs
from rooflight.serve.step import Part, Step

# A layer's launches one by one take the host about this long, and GPUs of the day multiply at about this rate: a step
# of more tokens than this allows runs longer on the device than its launches take, and gains nothing as a graph.
_LAYER_LAUNCH_SECONDS, _FLOPS_PER_SECOND = 1e-3, 6e14


def batch_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes of decode steps worth a graph: 1, 2, 4, then closer together than padding is felt, and `most`.

    A step's products read the same weights for a few rows more, and its attention passes over rows without a context.
    """
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, most + 1, 32)]
    return tuple(sorted({size for size in sizes if size < most} | {most}))


def token_sizes(config: ModelConfig, most: int) -> tuple[int, ...]:
    """Numbers of tokens of other steps worth a graph: those whose launches would take longer than their products."""
    flops = 2 * parameter_counts(config)["active"]
    limit = int(len(config.layers) * _LAYER_LAUNCH_SECONDS * _FLOPS_PER_SECOND / flops)
    sizes = [32, 64, *range(128, 769, 128), *range(1024, 1537, 256), *range(2048, 4097, 512)]
    sizes += range(5120, limit + 1, 1024)
    return tuple(sorted({size for size in sizes if size <= min(limit, most)} | ({most} if most <= limit else set())))


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]


class Graphs:
    """Captured runs of a model: `decode` for steps of one token a part, `mixed` for any others."""

    def __init__(self, model: Transformer, inputs: Inputs, batches: tuple[int, ...], tokens: tuple[int, ...]):
        self._model, self._inputs = model, inputs
        self._batches, self._tokens = sorted(batches), sorted(tokens)
        self._rows = inputs.spare_slot
        self._starts_B1 = torch.arange(self._batches[-1] + 1, dtype=torch.int32, device=inputs.device)
        self._pool: Any = None
        # The largest first: the smaller ones then fit into its memory.
        self._mixed = {size: self._capture(self._run_tokens, size) for size in reversed(self._tokens)}
        self._decode = {size: self._capture(self._run_batch, size) for size in reversed(self._batches)}

    def takes_decode(self, step: Step) -> bool:
        """Whether `decode` runs a step: a token a part, each of which samples."""
        return step.sequences <= self._batches[-1] and all(part.count == 1 and part.samples for part in step.parts)

    def takes_mixed(self, step: Step) -> bool:
        """Whether there is a graph for as many tokens."""
        return bool(self._tokens) and step.tokens <= self._tokens[-1]

    def decode(self, parts: tuple[Part, ...], draws: NDArray[np.float64] | None) -> tuple[Tensor, Tensor]:
        """Logits of each part, and tokens drawn from them; both stand until the next run.

        draws [2, B]: temperatures and numbers in [0, 1) for `sample_plain`; without them the tokens mean nothing.
        """
        rows = self._batches[bisect.bisect_left(self._batches, len(parts))]
        inputs, count = self._inputs, len(parts)
        words = np.zeros((2, rows), np.float64)
        if draws is not None:
            words[:, :count] = draws
        changes = [np.array(values, dtype=np.int32) for values in inputs.table_changes(parts)]
        sent = inputs.send([*inputs.decode_arrays(parts, rows), words.view(np.int32).reshape(-1), *changes])
        inputs.apply(*sent[-2:])
        captured = self._decode[rows]
        captured.graph.replay()
        logits_BV, tokens_B = captured.outputs
        return logits_BV[:count], tokens_B[:count]

    def mixed(self, step: Step) -> Tensor:
        """The hidden state of each part's last token: [parts, D], until the next run."""
        size = self._tokens[bisect.bisect_left(self._tokens, step.tokens)]
        self._inputs.send_step(step, size, self._rows)
        captured = self._mixed[size]
        captured.graph.replay()
        return captured.outputs[0][: step.sequences]

    def _capture(self, run: Callable[[int], tuple[Tensor, ...]], size: int) -> _Captured:
        # Kernels are compiled and libraries set up outside of a capture.
        run(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run(size)
        self._pool = graph.pool()
        return _Captured(graph, outputs)

    def _run_batch(self, rows: int) -> tuple[Tensor, ...]:
        inputs = self._inputs
        slots_B, positions_B, tokens_B, places_B, contexts_B, words = inputs.decode_inputs(rows, 4 * rows)
        temperature_B, uniform_B = words.view(torch.float64).split(rows)
        tokens_B = torch.where(tokens_B < 0, inputs.last_S[slots_B], tokens_B)
        starts_B1 = self._starts_B1[: rows + 1]
        paged = Paged(inputs.cache, inputs.table_SM[slots_B], contexts_B, starts_B1, places_B, 1)
        logits_BV = self._model(tokens_B, positions_B, Layout(None, paged))
        drawn_B = sample_plain(logits_BV, temperature_B, uniform_B)
        inputs.last_S.index_copy_(0, slots_B, drawn_B)
        return logits_BV, drawn_B

    def _run_tokens(self, size: int) -> tuple[Tensor, ...]:
        fed = self._inputs.fed(size, self._rows, max_query=size, width=None)
        hidden_TD = self._model.hidden(fed.tokens_T, fed.positions_T, fed.layout)
        return (hidden_TD.index_select(0, fed.last_B),)
