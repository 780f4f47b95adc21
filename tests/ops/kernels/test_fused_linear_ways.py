"""Which kernel computes a product with its norm, gate or sum: the table of `kernels.fused_linear` by sizes alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.kernels import fused_linear
from rooflight.ops.kernels.fused_linear import Way, takes_linear, way_of

SMALL, LARGE = (4096, 1024), (6144, 4096)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "is_hopper", lambda device: True)
    monkeypatch.setattr(fused_linear, "processors", lambda device: 132)


@pytest.mark.parametrize(
    ("rows", "normed", "added", "large"),
    [
        (1, Way.SKINNY, Way.SKINNY, Way.SKINNY),
        (2, Way.FEW, Way.FEW, Way.STREAM),
        (9, Way.WIDE, Way.FEW, Way.STREAM),
        (32, Way.WIDE, Way.FEW, Way.STREAM),
        (33, Way.APART, Way.WIDE, Way.APART),
        (65, Way.APART, Way.APART, Way.APART),
        (129, Way.APART, Way.APART, Way.APART),
        (8192, Way.APART, Way.APART, Way.APART),
    ],
)
def test_by_rows_and_weights(rows: int, normed: Way, added: Way, large: Way):
    for (outputs, inputs), ways in ((SMALL, (added, normed)), (LARGE, (large, large))):
        for is_normed, way in enumerate(ways):
            assert way_of(meta(rows, inputs), meta(outputs, inputs), None, bool(is_normed)) is way


def test_the_copy_engine_is_hoppers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused_linear, "is_hopper", lambda device: False)
    assert way_of(meta(8, 4096), meta(*LARGE), None, normed=True) is Way.APART
    assert way_of(meta(8, 1024), meta(*SMALL), None, normed=True) is Way.FEW


def test_what_no_kernel_of_few_rows_takes():
    for x, w in (
        (meta(8, 1024, dtype=torch.float32), meta(*SMALL, dtype=torch.float32)),
        (meta(8, 1028)[:, 4:], meta(*SMALL)),  # rows of x begin between multiples of 16 bytes
        (meta(8, 1020), meta(4096, 1020)),
        (meta(2, 4, 1024), meta(*SMALL)),
    ):
        assert way_of(x, w, None, True, gated=True) is Way.APART


@pytest.mark.parametrize(
    ("rows", "outputs", "taken"), [(1, 128256, True), (16, 128256, True), (16, 28672, False), (33, 128256, False)]
)
def test_plain_products_of_a_head(rows: int, outputs: int, taken: bool):
    assert takes_linear(meta(rows, 4096), meta(outputs, 4096)) is taken
    assert not takes_linear(meta(rows, 4096, dtype=torch.float32), meta(outputs, 4096, dtype=torch.float32))
