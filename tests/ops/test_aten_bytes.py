"""Gathers, scatters, copies and random numbers: bytes by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from rooflight.ops.cost import Access, Movement, Primitive
from tests.priced import price_module, recording


def test_a_lookup_reads_its_rows_and_never_more_than_the_table() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    cost = price_module(nn.Embedding(1000, 16), ids).one("embedding")
    assert cost.bytes_read == 6 * 16 * 4 + 6 * 8
    assert cost.bytes_written == 6 * 16 * 4
    assert (cost.access, cost.movement, cost.total_flops) == (Access.RANDOM, (Movement.GATHER,), 0)
    small = price_module(nn.Embedding(4, 16), ids).one("embedding")
    assert small.bytes_read == 4 * 16 * 4 + 6 * 8


def test_embedding_backward_zeroes_and_scatters_a_whole_table() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    cost = price_module(nn.Embedding(1000, 16), ids, backward=True).one("embedding_dense_backward")
    assert cost.bytes_written == 1000 * 16 * 4
    assert cost.total_flops == 6 * 16
    assert cost.movement == (Movement.SCATTER, Movement.REDUCTION)


def test_bags_add_their_rows() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    summed = price_module(nn.EmbeddingBag(1000, 16, mode="sum"), ids, backward=True)
    (forward,) = (c for n, c in summed.calls if n.startswith("aten::_embedding_bag") and "backward" not in n)
    assert forward.total_flops == 6 * 16
    assert price_module(nn.EmbeddingBag(1000, 16, mode="mean"), ids).flops() == 6 * 16 + 2 * 16
    (backward,) = (c for n, c in summed.calls if "embedding_bag" in n and "backward" in n)
    assert backward.total_flops == 6 * 16


def test_gather_and_scatter_touch_what_the_index_names() -> None:
    with recording() as record:
        x, index, values = torch.empty(10, 8), torch.empty(10, 2, dtype=torch.int64), torch.empty(10, 2)
        x.gather(1, index)
        x.scatter_(1, index, values)
        x.scatter_add_(1, index, values)
        x.scatter_add(1, index, values)
    gather, scatter, added = record.one("gather"), record.one("scatter_"), record.one("scatter_add_")
    assert (gather.bytes_read, gather.bytes_written) == (20 * 4 + 20 * 8, 80)
    assert (scatter.bytes_read, scatter.bytes_written, scatter.total_flops) == (240, 80, 0)
    assert (added.bytes_read, added.bytes_written, added.total_flops) == (320, 80, 20)
    # Out of place, the untouched elements are copied as well.
    copied = record.one("scatter_add")
    assert (copied.bytes_read, copied.bytes_written) == (240 + 320, 320)


def test_index_put_broadcasts_its_indices() -> None:
    with recording() as record:
        x = torch.empty(10, 8, 4)
        rows, columns = torch.empty(5, 1, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        x[rows, columns] = torch.empty(5, 3, 4)
        x.index_add_(0, columns, torch.empty(3, 8, 4))
    put, added = record.one("index_put_"), record.one("index_add_")
    assert put.bytes_written == 5 * 3 * 4 * 4
    assert put.bytes_read == 60 * 4 + 8 * 8
    assert (added.total_flops, added.bytes_written) == (3 * 8 * 4, 3 * 8 * 4 * 4)


def test_copies_read_and_write_and_calculate_nothing() -> None:
    with recording() as record:
        x = torch.empty(4, 6)
        x.to(torch.bfloat16)
        torch.cat([x, x + 1])
        x.copy_(torch.empty(6))
        F.pad(x, (1, 1))
        torch.stack([x, torch.empty(4, 6)])
        torch.roll(x, 1)
        x.repeat(2, 2)
        x.tril()
    assert (record.one("_to_copy").bytes_read, record.one("_to_copy").bytes_written) == (96, 48)
    assert record.one("cat").total_bytes == 4 * 96
    assert (record.one("copy_").bytes_read, record.one("copy_").bytes_written) == (24, 96)
    assert record.one("constant_pad_nd").bytes_written == 4 * 4 * 8
    assert record.one("repeat").total_bytes == 96 + 4 * 96
    for name in ("_to_copy", "cat", "copy_", "constant_pad_nd", "stack", "roll", "repeat", "tril"):
        assert record.one(name).total_flops == 0
        assert record.one(name).primitive is Primitive.DATA_MOVEMENT


def test_random_numbers_are_written_and_dropout_writes_a_mask() -> None:
    with recording() as record:
        x = torch.empty(4, 6)
        x.normal_()
        x.bernoulli_(0.5)
        torch.rand(3)
        torch.ops.aten.native_dropout(x, 0.1, True)
    assert (record.one("normal_").bytes_read, record.one("normal_").bytes_written) == (0, 96)
    assert record.one("bernoulli_").bytes_read == 0
    assert record.one("native_dropout").bytes_written == 96 + 24


def test_a_loss_picks_one_probability_a_target() -> None:
    with recording() as record:
        logits, target = torch.empty(5, 100, requires_grad=True), torch.empty(5, dtype=torch.int64)
        F.cross_entropy(logits, target).backward()
    forward, backward = record.one("nll_loss_forward"), record.one("nll_loss_backward")
    assert (forward.bytes_read, forward.total_flops) == (5 * 4 + 5 * 8, 5)
    assert backward.bytes_written == 2000
    assert backward.bytes_read < 2000
    assert record.one("_log_softmax").total_flops == 5 * 500
    assert record.one("_log_softmax_backward_data").total_flops == 4 * 500
