"""Pooling and resampling against nested loops that visit every element of every window."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from rooflight.ops.cost import Access, Movement, Primitive
from tests.priced import price_call, recording


def test_max_pool_compares_every_element_of_every_window() -> None:
    count = 0
    for _image in range(2 * 3):
        for row in range(0, 9 - 3 + 1, 2):
            for column in range(0, 7 - 3 + 1, 2):
                for _ in range(row, row + 3):
                    for _ in range(column, column + 3):
                        count += 1
    cost = price_call(F.max_pool2d, (2, 3, 9, 7), 3, stride=2).one("max_pool2d_with_indices")
    assert cost.total_flops == count
    assert (cost.primitive, cost.access) == (Primitive.SLIDING_WINDOW, Access.STRIDED)
    outputs = 2 * 3 * 4 * 3
    assert (cost.bytes_read, cost.bytes_written) == (4 * 378, outputs * (4 + 8))


def test_average_pool_also_divides() -> None:
    assert price_call(F.avg_pool2d, (1, 2, 4, 4), 2).flops() == 2 * 2 * 2 * (4 + 1)
    assert price_call(F.avg_pool3d, (1, 2, 4, 4, 4), 2).flops() == 2 * 8 * (8 + 1)


@pytest.mark.parametrize(("size", "out"), [(7, 3), (8, 4), (5, 5), (3, 5)])
def test_adaptive_windows_overlap_as_they_do(size: int, out: int) -> None:
    visited = 0
    for i in range(out):
        for _ in range(math.floor(i * size / out), math.ceil((i + 1) * size / out)):
            visited += 1
    cost = price_call(F.adaptive_avg_pool2d, (2, 1, size, size), [out, out])
    assert cost.one("_adaptive_avg_pool2d").total_flops == 2 * (visited**2 + out**2)


def test_pool_gradients_are_scattered() -> None:
    with recording() as record:
        x = torch.empty(1, 1, 4, 4, requires_grad=True)
        F.max_pool2d(x, 2).backward(torch.empty(1, 1, 2, 2))
        F.avg_pool2d(x, 2).backward(torch.empty(1, 1, 2, 2))
    maximum, average = record.one("max_pool2d_with_indices_backward"), record.one("avg_pool2d_backward")
    assert maximum.total_flops == 4
    assert average.total_flops == 4 * (4 + 1)
    assert Movement.SCATTER in maximum.movement
    # The gradient in, the gradient out; indices (8 bytes) only for the maximum. The input is not read.
    assert (average.bytes_read, average.bytes_written) == (16, 64)
    assert maximum.bytes_read == 16 + 4 * 8


def test_resampling_blends_its_taps() -> None:
    nearest = price_call(F.interpolate, (1, 2, 4, 4), scale_factor=2, mode="nearest")
    bilinear = price_call(F.interpolate, (1, 2, 4, 4), scale_factor=2, mode="bilinear")
    assert nearest.named("upsample_nearest2d")[0].total_flops == 0
    assert bilinear.named("upsample_bilinear2d")[0].total_flops == 2 * 4 * (2 * 8 * 8)


def test_grid_sample_is_a_random_gather() -> None:
    cost = price_call(F.grid_sample, (1, 3, 8, 8), (1, 5, 5, 2), align_corners=False).one("grid_sampler_2d")
    assert cost.access is Access.RANDOM
    assert cost.total_flops == 2 * 4 * 3 * 25
