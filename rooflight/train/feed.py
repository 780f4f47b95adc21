"""Rows of the data set as the micro-batches of a step, on the device.

Legend: B rows  Q tokens a row  T = B·Q tokens of a micro-batch
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rooflight.models.layout import Layout
from rooflight.ops.batch import Batch
from rooflight.train.data import Rows
from rooflight.workload.training import MicroBatch


def micro_batches(rows: Rows, size: int, device: torch.device) -> Iterator[MicroBatch]:
    """The rows in micro-batches of `size`; rows of a single document each lie densely, others by their borders."""
    count, context = rows.tokens_BQ.shape
    for start in range(0, count, size):
        part = slice(start, start + size)
        lengths = [length for row in rows.lengths[part] for length in row]
        if all(length == context for length in lengths):
            layout, facts = Layout((size, context)), Batch.uniform(size, context, context)
        else:
            layout, facts = Layout.of_documents(lengths, device)
        yield MicroBatch(
            _on(rows.tokens_BQ[part], device),
            _on(rows.targets_BQ[part], device),
            _on(rows.positions_BQ[part], device),
            layout,
            facts,
        )


def _on(values_BQ: np.ndarray, device: torch.device) -> Tensor:
    flat_T = torch.from_numpy(np.ascontiguousarray(values_BQ)).flatten()
    if device.type == "cpu":
        return flat_T
    # Pinned, so that the copy does not wait for what the device is doing.
    return flat_T.pin_memory().to(device, non_blocking=True)
