"""CUDA graphs of decode steps: one a batch size, captured at start, replayed with other tokens and contexts.

Legend: B rows of a captured size  V vocabulary
"""

from __future__ import annotations

import bisect
import gc

import numpy as np
import torch
from torch import Tensor

from rooflight.models.layout import Layout, Paged
from rooflight.models.transformer import Transformer
from rooflight.serve.inputs import Inputs
from rooflight.serve.step import Part


def sizes_up_to(most: int) -> list[int]:
    """Batch sizes worth a graph: 1, 2, 4, then every eighth to 256 and every sixteenth beyond, up to `most` itself."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, most + 1, 16)]
    return sorted({size for size in sizes if size < most} | {most})


class DecodeGraphs:
    """The model's run over steps of one token a part, for batches of up to the largest captured size."""

    def __init__(self, model: Transformer, inputs: Inputs, sizes: list[int]):
        self._model, self._inputs, self._sizes = model, inputs, sorted(sizes)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._capture()

    @property
    def largest(self) -> int:
        """Parts of the largest step that has a graph."""
        return self._sizes[-1]

    def run(self, parts: tuple[Part, ...]) -> Tensor:
        """Logits of each part, valid until the next run."""
        rows = self._sizes[bisect.bisect_left(self._sizes, len(parts))]
        self._send(parts, rows)
        graph, logits_BV = self._graphs[rows]
        graph.replay()
        return logits_BV[: len(parts)]

    def _send(self, parts: tuple[Part, ...], rows: int) -> None:
        changes = [np.array(values, dtype=np.int32) for values in self._inputs.table_changes(parts)]
        # The graph reads the first four arrays where they always lie; table changes follow them.
        sent = self._inputs.send([*self._inputs.decode_arrays(parts, rows), *changes])
        self._inputs.apply(*sent[4:])

    def _capture(self) -> None:
        pool = None
        # The largest first: the smaller ones then fit into its memory.
        for rows in reversed(self._sizes):
            self._send((), rows)
            if pool is None:
                # Kernels are compiled and libraries set up outside of a capture.
                self._forward(rows)
                torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits_BV = self._forward(rows)
            pool = graph.pool()
            self._graphs[rows] = (graph, logits_BV)
        gc.collect()

    def _forward(self, rows: int) -> Tensor:
        inputs = self._inputs
        slots_B, positions_B, tokens_B, places_B = inputs.sent(4, rows)
        slots_B = slots_B.long()
        tokens_B = torch.where(tokens_B < 0, inputs.last_S[slots_B], tokens_B.long())
        paged = Paged(
            inputs.cache,
            inputs.table_SM[slots_B],
            positions_B + 1,
            torch.arange(rows + 1, dtype=torch.int32, device=inputs.device),
            places_B.long(),
            1,
        )
        return self._model(tokens_B, positions_B.clamp(min=0), Layout(None, paged))
