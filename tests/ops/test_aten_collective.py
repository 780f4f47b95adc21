"""Collectives on a fake process group: bytes on the link by the ring formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from rooflight.errors import UntraceableModule
from rooflight.ops import aten
from rooflight.ops.cost import Cost
from tests.priced import recording

RANKS = 8
# torch 2.11 does not know the names that 2.13 asks for instead.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _only_collective(costs: list[tuple[str, Cost]]) -> Cost:
    (cost,) = (c for n, c in costs if "c10d" in n and "wait" not in n)
    return cost


def test_all_reduce_sends_twice_the_volume_less_a_share() -> None:
    with recording() as record:
        dist.all_reduce(torch.empty(64))
    cost = _only_collective(record.calls)
    assert cost.link_bytes == 2 * 7 * 256 // 8
    assert (cost.group_size, cost.curve) == (8, "all_reduce")
    assert (cost.bytes_read, cost.bytes_written, cost.total_flops) == (256, 256, 7 * 64 // 8)


def test_gather_and_scatter_send_a_share_of_the_full_size() -> None:
    with recording() as gathered:
        dist.all_gather_into_tensor(torch.empty(64), torch.empty(8))
    with recording() as scattered:
        dist.reduce_scatter_tensor(torch.empty(8), torch.empty(64))
    gather, scatter = _only_collective(gathered.calls), _only_collective(scattered.calls)
    assert gather.link_bytes == scatter.link_bytes == 7 * 256 // 8
    assert (gather.bytes_read, gather.bytes_written) == (32, 256)
    assert (scatter.bytes_read, scatter.bytes_written, scatter.total_flops) == (256, 32, 56)
    assert (gather.curve, scatter.curve) == ("all_gather", "reduce_scatter")


@pytest.mark.parametrize(
    ("run", "link_bytes"),
    [
        (lambda x: functional.all_reduce(x, "sum", _world()), 2 * 7 * 256 // 8),
        (lambda x: functional.all_gather_tensor(x, 0, _world()), 7 * 256),
        (lambda x: functional.reduce_scatter_tensor(x, "sum", 0, _world()), 7 * 256 // 8),
        (lambda x: functional.all_to_all_single(x, None, None, _world()), 7 * 256 // 8),
        (lambda x: dist.broadcast(x, 0), 256),
        (lambda x: dist.send(x, 1), 256),
        (lambda x: dist.recv(x, 1), 256),
        (lambda x: dist.all_to_all_single(torch.empty(64), x), 7 * 256 // 8),
        (lambda x: dist.all_gather([torch.empty(64) for _ in range(8)], x), 7 * 256),
    ],
)
def test_functional_and_plain_collectives(run, link_bytes: int) -> None:
    with recording() as record:
        run(torch.empty(64))
    assert _only_collective(record.calls).link_bytes == link_bytes


def test_a_group_of_one_is_free() -> None:
    alone = dist.new_group([0])
    assert isinstance(alone, dist.ProcessGroup)
    with recording() as record:
        dist.all_reduce(torch.empty(64), group=alone)
    cost = _only_collective(record.calls)
    assert (cost.link_bytes, cost.total_bytes, cost.group_size) == (0, 0, 1)


def test_waiting_is_an_explicit_zero() -> None:
    with recording() as record:
        functional.wait_tensor(functional.all_reduce(torch.empty(4), "sum", _world()))
    assert [c.total_bytes for c in record.named("wait_tensor")] == [0] * len(record.named("wait_tensor"))


def test_an_unknown_group_says_what_to_do() -> None:
    x = torch.empty(4)
    with pytest.raises(UntraceableModule, match="init_process_group"):
        aten.price(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "no-such-group"), {}, x)
