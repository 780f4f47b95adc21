"""Collectives as operations, written where they happen: their price on the link, and their gradients (Megatron's).

`group` is a process group's name. A group of one is free: the input comes back and nothing is called.
Link bytes are what one rank sends on a ring, V the bytes of the full tensor and n the ranks: all-reduce 2(n−1)/n·V;
all-gather, reduce-scatter and all-to-all (n−1)/n·V; broadcast V.
Legend: T rows of this rank  F rows of all ranks
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from rooflight.errors import InvalidValue
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Primitive, precision_of, tensor_bytes
from rooflight.ops.op import Op

_c10d = torch.ops._c10d_functional


def group_size(group: str) -> int:
    """Ranks of a process group, by its name. Raises InvalidValue when no group has it."""
    try:
        return _resolve_process_group(group).size()  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        raise InvalidValue(
            f"process group {group!r} is not known here; use the group_name of a group that init_process_group, "
            "new_group or a device mesh made"
        ) from error


def _cost(
    out: Tensor, x: Tensor, group: str, link_bytes: Count, movement: tuple[Movement, ...], flops: Count = 0
) -> Cost:
    return Cost(
        flops={} if isinstance(flops, int) and flops == 0 else {VECTOR: flops},
        bytes_read=tensor_bytes(x),
        bytes_written=tensor_bytes(out),
        primitive=Primitive.DATA_MOVEMENT,
        access=Access.SEQUENTIAL,
        movement=movement,
        size=(tensor_bytes(x),),
        precision=precision_of(x),
        link_bytes=link_bytes,
        group_size=group_size(group),
    )


def _rows_divide(x_FD: Tensor, group: str, what: str) -> int:
    ranks = group_size(group)
    if x_FD.shape[0] % ranks:
        raise InvalidValue(
            f"{what} over {ranks} ranks cannot split {x_FD.shape[0]} rows evenly; pad them to a multiple of {ranks}"
        )
    return ranks


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group))


def _same_shape(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _all_reduce_cost(out: Tensor, x: Tensor, group: str) -> Cost:
    # On a ring a rank adds its (n−1)/n of the elements and passes every part on twice.
    n = group_size(group)
    link = 2 * (n - 1) * tensor_bytes(x) // n
    return _cost(out, x, group, link, (Movement.REDUCTION, Movement.BROADCAST), (n - 1) * x.numel() // n)


all_reduce_op = Op(
    "all_reduce",
    _all_reduce,
    cost=_all_reduce_cost,
    shape=_same_shape,
    # What follows is the same on every rank, and so is its gradient: summing it again would count it n times.
    backward=lambda ctx, grad: (grad, None),
)


def _all_gather(x_TD: Tensor, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x_TD.contiguous(), group_size(group), group))


def _all_gather_shape(x_TD: Tensor, group: str) -> Tensor:
    return x_TD.new_empty((x_TD.shape[0] * group_size(group), *x_TD.shape[1:]))


def _all_gather_cost(out_FD: Tensor, x_TD: Tensor, group: str) -> Cost:
    return _cost(out_FD, x_TD, group, (group_size(group) - 1) * tensor_bytes(x_TD), (Movement.BROADCAST,))


all_gather_op = Op(
    "all_gather",
    _all_gather,
    cost=_all_gather_cost,
    shape=_all_gather_shape,
    backward=lambda ctx, grad: (reduce_scatter(grad, ctx.group), None),
    setup=lambda ctx, inputs, output: setattr(ctx, "group", inputs[1]),
)


def _reduce_scatter(x_FD: Tensor, group: str) -> Tensor:
    ranks = _rows_divide(x_FD, group, "reduce-scatter")
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x_FD.contiguous(), "sum", ranks, group))


def _reduce_scatter_shape(x_FD: Tensor, group: str) -> Tensor:
    return x_FD.new_empty((x_FD.shape[0] // _rows_divide(x_FD, group, "reduce-scatter"), *x_FD.shape[1:]))


def _reduce_scatter_cost(out_TD: Tensor, x_FD: Tensor, group: str) -> Cost:
    ranks = group_size(group)
    link = (ranks - 1) * tensor_bytes(out_TD)
    return _cost(out_TD, x_FD, group, link, (Movement.REDUCTION, Movement.SCATTER), (ranks - 1) * out_TD.numel())


reduce_scatter_op = Op(
    "reduce_scatter",
    _reduce_scatter,
    cost=_reduce_scatter_cost,
    shape=_reduce_scatter_shape,
    backward=lambda ctx, grad: (all_gather(grad, ctx.group), None),
    setup=lambda ctx, inputs, output: setattr(ctx, "group", inputs[1]),
)


def _all_to_all(x_FD: Tensor, group: str) -> Tensor:
    ranks = _rows_divide(x_FD, group, "all-to-all")
    splits = [x_FD.shape[0] // ranks] * ranks
    return _c10d.wait_tensor(_c10d.all_to_all_single(x_FD.contiguous(), splits, splits, group))


def _all_to_all_cost(out_FD: Tensor, x_FD: Tensor, group: str) -> Cost:
    ranks = group_size(group)
    link = (ranks - 1) * tensor_bytes(x_FD) // ranks
    return _cost(out_FD, x_FD, group, link, (Movement.SCATTER, Movement.GATHER))


all_to_all_op = Op(
    "all_to_all",
    _all_to_all,
    cost=_all_to_all_cost,
    shape=_same_shape,
    backward=lambda ctx, grad: (all_to_all(grad, ctx.group), None),
    setup=lambda ctx, inputs, output: setattr(ctx, "group", inputs[1]),
)


def _broadcast(x: Tensor, root: int, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.broadcast(x.contiguous(), root, group))


def _broadcast_shape(x: Tensor, root: int, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _broadcast_cost(out: Tensor, x: Tensor, root: int, group: str) -> Cost:
    return _cost(out, x, group, tensor_bytes(x), (Movement.BROADCAST,))


broadcast_op = Op("broadcast", _broadcast, cost=_broadcast_cost, shape=_broadcast_shape)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum of x over the ranks, on every rank; the gradient passes as it is (Megatron's g, 1909.08053)."""
    return x if group_size(group) == 1 else all_reduce_op(x, group)


def all_gather(x_TD: Tensor, group: str) -> Tensor:
    """Rows of all ranks one after the other: [T, …] to [n·T, …]; the gradient is reduce-scattered."""
    return x_TD if group_size(group) == 1 else all_gather_op(x_TD, group)


def reduce_scatter(x_FD: Tensor, group: str) -> Tensor:
    """Sum over the ranks, of which each keeps its rows: [n·T, …] to [T, …]; the gradient is all-gathered.

    Raises InvalidValue when the ranks do not divide the rows.
    """
    return x_FD if group_size(group) == 1 else reduce_scatter_op(x_FD, group)


def all_to_all(x_FD: Tensor, group: str) -> Tensor:
    """The i-th of n equal blocks of rows goes to rank i; the gradient takes the same way back.

    Raises InvalidValue when the ranks do not divide the rows.
    """
    return x_FD if group_size(group) == 1 else all_to_all_op(x_FD, group)


def broadcast(x: Tensor, root: int, group: str) -> Tensor:
    """x of the rank numbered `root` in the group, on every rank; no gradient. Raises InvalidValue on no such rank."""
    ranks = group_size(group)
    if not 0 <= root < ranks:
        raise InvalidValue(f"root {root} is not a rank of a group of {ranks}; use 0 to {ranks - 1}")
    return x if ranks == 1 else broadcast_op(x, root, group)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(grad, ctx.group), None


def copy_to_ranks(x: Tensor, group: str) -> Tensor:
    """x itself, whose gradient is summed over the ranks that each use it for a part (Megatron's f, 1909.08053)."""
    return x if group_size(group) == 1 else _CopyToRanks.apply(x, group)  # pyright: ignore[reportReturnType]


reduce_from_ranks = all_reduce
gather_from_ranks = all_gather
scatter_to_ranks = reduce_scatter
