"""The schedule of a step's paged decoding: how its sequences' keys are cut into parts, once for all layers.

Legend: B sequences  U parts  X numbers of a part
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflight.ops.attention import paged_cuda
from rooflight.ops.cost import Access, Cost, Primitive, tensor_bytes
from rooflight.ops.op import Op, lazy


def _attention_schedule(
    context_lengths_B: Tensor, query_starts_B1: Tensor, longest: int, key_heads: int, window: int
) -> Tensor:
    # What no kernel of ours attends to has no parts.
    return context_lengths_B.new_empty((0, paged_cuda.LINE), dtype=torch.int32)


def _attention_schedule_cost(
    schedule_UX: Tensor, context_lengths_B: Tensor, query_starts_B1: Tensor, longest: int, key_heads: int, window: int
) -> Cost:
    return Cost(
        bytes_read=tensor_bytes((context_lengths_B, query_starts_B1)),
        bytes_written=tensor_bytes(schedule_UX),
        primitive=Primitive.DYNAMIC,
        access=Access.SEQUENTIAL,
        size=(context_lengths_B.shape[0],),
    )


attention_schedule = Op(
    "attention_schedule",
    _attention_schedule,
    cost=_attention_schedule_cost,
    kernel=lazy("rooflight.ops.kernels.paged_parts", "attention_schedule"),
    kernel_takes=paged_cuda.takes_schedule,
)
