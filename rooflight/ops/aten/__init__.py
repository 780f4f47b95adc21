"""Prices for PyTorch's own operators, so that any torch module can be priced."""

from __future__ import annotations

from rooflight.ops.aten import (
    attention,
    collective,
    convolution,
    encoder,
    indexing,
    linalg,
    matmul,
    movement,
    norm,
    optimizer,
    pointwise,
    pooling,
    recurrent,
    reduction,
)
from rooflight.ops.aten.registry import Call, decomposes, price, priced_names, prices
from rooflight.ops.aten.views import ALIASES, METADATA, VIEWS

# Each family registers its rules when it is imported.
FAMILIES = (
    attention, collective, convolution, encoder, indexing, linalg, matmul, movement, norm, optimizer, pointwise,
    pooling, recurrent, reduction,
)  # fmt: skip

__all__ = ["ALIASES", "FAMILIES", "METADATA", "VIEWS", "Call", "decomposes", "price", "priced_names", "prices"]
