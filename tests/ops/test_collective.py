"""Collectives: prices against a ring played step by step, traces over fake ranks, values over two processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.errors import InvalidValue
from rooflight.ops import collective as c
from rooflight.ops.op import find

RANKS, ROWS, WIDTH = 4, 8, 6


class Ring:
    """Ranks that pass blocks to their neighbour; counts elements sent and additions of the busiest rank."""

    def __init__(self, inputs: Tensor):
        self.blocks = [list(x.chunk(RANKS)) for x in inputs]
        self.sent, self.added = [0] * RANKS, [0] * RANKS

    def _pass(self, block_of: Callable[[int], int], add: bool) -> None:
        """Every rank sends one block to the next, which adds it to its own or takes it over, all at once."""
        moving = [(rank, block_of(rank), self.blocks[rank][block_of(rank)]) for rank in range(RANKS)]
        for rank, i, block in moving:
            to = (rank + 1) % RANKS
            self.blocks[to][i] = self.blocks[to][i] + block if add else block
            self.sent[rank] += block.numel()
            self.added[to] += block.numel() if add else 0

    def reduce_scatter(self) -> Ring:
        for step in range(RANKS - 1):
            self._pass(lambda rank, step=step: (rank - 1 - step) % RANKS, add=True)
        return self

    def all_gather(self) -> Ring:
        for step in range(RANKS - 1):
            self._pass(lambda rank, step=step: (rank - step) % RANKS, add=False)
        return self


def _played(name: str) -> tuple[int, int]:
    """Elements that a rank sends and additions it makes; the result itself is checked on the way."""
    inputs = torch.arange(RANKS * ROWS * WIDTH, dtype=torch.float64).view(RANKS, ROWS, WIDTH)
    total = inputs.sum(0)
    ring = Ring(inputs)
    if name == "all_gather":
        rows = inputs[:, : ROWS // RANKS]
        ring.blocks = [[rows[r] if i == r else torch.zeros_like(rows[r]) for i in range(RANKS)] for r in range(RANKS)]
        ring.all_gather()
        assert all(torch.equal(torch.cat(blocks), torch.cat(list(rows))) for blocks in ring.blocks)
    elif name == "reduce_scatter":
        ring.reduce_scatter()
        assert all(torch.equal(ring.blocks[r][r], total.chunk(RANKS)[r]) for r in range(RANKS))
    else:
        ring.reduce_scatter().all_gather()
        assert all(torch.equal(torch.cat(blocks), total) for blocks in ring.blocks)
    return max(ring.sent), max(ring.added)


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "reduce_scatter"])
def test_price_is_what_a_ring_sends_and_adds(name: str, fake_ranks: str) -> None:
    op = {"all_reduce": c.all_reduce_op, "all_gather": c.all_gather_op, "reduce_scatter": c.reduce_scatter_op}[name]
    x = torch.zeros(ROWS // RANKS if name == "all_gather" else ROWS, WIDTH, dtype=torch.bfloat16)
    cost = op.price(op(x, fake_ranks), x, fake_ranks)
    sent, added = _played(name)
    assert (cost.link_bytes, cost.total_flops, cost.group_size) == (sent * 2, added, RANKS)


def test_price_of_all_to_all_and_broadcast(fake_ranks: str) -> None:
    x = torch.zeros(ROWS, WIDTH)
    # All blocks but a rank's own leave it; a pipelined broadcast passes everything on once.
    assert c.all_to_all_op.price(x, x, fake_ranks).link_bytes == (RANKS - 1) * x[: ROWS // RANKS].nbytes
    assert c.broadcast_op.price(x, x, 0, fake_ranks).link_bytes == x.nbytes


class Names(TorchDispatchMode):
    """Our operations in the order in which they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = find(func)
        if op is not None:
            self.seen.append(op.name)
        return func(*args, **(kwargs or {}))


PAIRS = {
    "copy_to_ranks": (c.copy_to_ranks, ["all_reduce"]),
    "reduce_from_ranks": (c.reduce_from_ranks, ["all_reduce"]),
    "gather_from_ranks": (c.gather_from_ranks, ["all_gather", "reduce_scatter"]),
    "scatter_to_ranks": (c.scatter_to_ranks, ["reduce_scatter", "all_gather"]),
    "all_to_all": (c.all_to_all, ["all_to_all", "all_to_all"]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_forward_and_backward_trace_as_megatrons_pairs(name: str, fake_ranks: str) -> None:
    function, expected = PAIRS[name]
    with FakeTensorMode(), Names() as trace:
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        (grad,) = torch.autograd.grad(function(x, fake_ranks).sum(), x)
    assert trace.seen == expected
    assert grad.shape == x.shape


def test_a_group_of_one_is_free() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        x = torch.ones(3, 2)
        with Names() as trace:
            for function, _ in PAIRS.values():
                assert function(x, "0") is x
            assert c.broadcast(x, 0, "0") is x
        assert trace.seen == []
    finally:
        dist.destroy_process_group()


def test_what_ranks_cannot_do_is_refused_by_name(fake_ranks: str) -> None:
    for function, what in ((c.reduce_scatter, "reduce-scatter"), (c.all_to_all, "all-to-all")):
        with pytest.raises(InvalidValue, match=f"{what} over 4 ranks cannot split 6 rows"):
            function(torch.ones(6, 2), fake_ranks)
    with pytest.raises(InvalidValue, match="root 4 is not a rank of a group of 4; use 0 to 3"):
        c.broadcast(torch.ones(2), 4, fake_ranks)
    with pytest.raises(InvalidValue, match="process group 'nobody' is not known"):
        c.all_reduce(torch.ones(2), "nobody")


def _megatron_block(x: Tensor, first: Tensor, second: Tensor, group: str) -> Tensor:
    """Column-parallel then row-parallel linear, one all-reduce forward and one backward."""
    return c.reduce_from_ranks(torch.tanh(c.copy_to_ranks(x, group) @ first.t()) @ second.t(), group)


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, first, second = torch.randn(5, 6), torch.randn(8, 6), torch.randn(6, 8)
    mine = (x.clone(), first[4 * rank :][:4].clone(), second[:, 4 * rank :][:, :4].clone())
    leaves = [leaf.requires_grad_() for leaf in mine]
    out = _megatron_block(leaves[0], leaves[1], leaves[2], "0")
    result: dict[str, Any] = {"block": (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))}
    rows = torch.arange(8.0).view(4, 2) + 100 * rank
    for name, function in (("gather", c.all_gather), ("scatter", c.reduce_scatter), ("exchange", c.all_to_all)):
        leaf = rows.clone().requires_grad_()
        value = function(leaf, "0")
        # A gradient that differs from rank to rank shows which rank's came back.
        grad = torch.arange(float(value.numel())).view(value.shape) + 1000 * rank
        result[name] = (value.detach(), torch.autograd.grad(value, leaf, grad)[0])
    result["broadcast"] = c.broadcast(rows, 1, "0")
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_values_and_gradients_over_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (folder,), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    x, first, second = (t.requires_grad_() for t in (torch.randn(5, 6), torch.randn(8, 6), torch.randn(6, 8)))
    out = torch.tanh(x @ first.t()) @ second.t()
    dx, dfirst, dsecond = torch.autograd.grad(out.square().sum(), (x, first, second))
    for rank, result in enumerate(results):
        part = slice(4 * rank, 4 * rank + 4)
        torch.testing.assert_close(result["block"], (out.detach(), dx, dfirst[part], dsecond[:, part]))
    rows = [torch.arange(8.0).view(4, 2) + 100 * rank for rank in range(2)]
    for rank, result in enumerate(results):
        half = slice(2 * rank, 2 * rank + 2)
        gathered = [torch.arange(16.0).view(8, 2) + 1000 * r for r in range(2)]
        torch.testing.assert_close(result["gather"], (torch.cat(rows), sum(gathered)[4 * rank :][:4]))  # pyright: ignore
        scattered = [torch.arange(4.0).view(2, 2) + 1000 * r for r in range(2)]
        torch.testing.assert_close(result["scatter"], ((rows[0] + rows[1])[half], torch.cat(scattered)))
        exchanged = [torch.arange(8.0).view(4, 2) + 1000 * r for r in range(2)]
        expected = torch.cat([r[half] for r in rows]), torch.cat([g[half] for g in exchanged])
        torch.testing.assert_close(result["exchange"], expected)
        assert torch.equal(result["broadcast"], rows[1])
