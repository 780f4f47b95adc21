"""Which kernel computes a product with its norm, gate or sum: the table of `kernels.fused_linear` by sizes alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.kernels import fused_linear
from rooflight.ops.kernels.fused_linear import Way, way_of

SMALL, LARGE = (4096, 1024), (6144, 4096)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "is_hopper", lambda device: True)


@pytest.mark.parametrize(
    ("rows", "small", "large"),
    [
        (1, Way.SKINNY, Way.SKINNY),
        (2, Way.FEW, Way.STREAM),
        (17, Way.FEW, Way.STREAM),
        (32, Way.FEW, Way.STREAM),
        (33, Way.APART, Way.APART),
        (8192, Way.APART, Way.APART),
    ],
)
def test_by_rows_and_weights(rows: int, small: Way, large: Way):
    for (outputs, inputs), way in ((SMALL, small), (LARGE, large)):
        assert way_of(meta(rows, inputs), meta(outputs, inputs), None, gated=False) is way


def test_the_copy_engine_is_hoppers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused_linear, "is_hopper", lambda device: False)
    assert way_of(meta(8, 4096), meta(*LARGE), None, gated=False) is Way.APART
    assert way_of(meta(8, 1024), meta(*SMALL), None, gated=False) is Way.FEW


def test_what_no_kernel_of_few_rows_takes():
    for x, w in (
        (meta(8, 1024, dtype=torch.float32), meta(*SMALL, dtype=torch.float32)),
        (meta(8, 1028)[:, 4:], meta(*SMALL)),  # rows of x begin between multiples of 16 bytes
        (meta(8, 1020), meta(4096, 1020)),
        (meta(2, 4, 1024), meta(*SMALL)),
    ):
        assert way_of(x, w, None, gated=True) is Way.APART
