"""Collectives as torch.distributed dispatches them, priced as rings over the ranks of their group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup

from rooflight.errors import UntraceableModule
from rooflight.ops.aten.registry import Call, prices, tensors_in
from rooflight.ops.cost import VECTOR, Cost, Count, Movement, Primitive, precision_of, tensor_bytes


def group_size(call: Call) -> int:
    """Ranks in the call's process group, from the argument, the group's name or the group object.

    Raises UntraceableModule for a group that does not exist in this process.
    """
    size = call.get("group_size")
    if size is not None:
        return size
    group: Any = call.get("group_name", "process_group")
    try:
        if isinstance(group, str):
            return _resolve_process_group(group).size()  # pyright: ignore[reportArgumentType]
        return group.size() if isinstance(group, ProcessGroup) else ProcessGroup.unbox(group).size()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UntraceableModule(
            f"{call.func} names the process group {group!r}, which is not initialized here; "
            'call torch.distributed.init_process_group first ("fake" with a FakeStore for a dry run)'
        ) from error


def _collective(
    call: Call,
    ranks: int,
    sent: Count,
    read: tuple[Tensor, ...],
    written: tuple[Tensor, ...],
    movement: tuple[Movement, ...],
    *,
    flops: Count = 0,
) -> Cost:
    """A group of one is free: nothing has to leave the rank."""
    if ranks == 1:
        return Cost(primitive=Primitive.DATA_MOVEMENT, movement=movement, group_size=1, curve="collective")
    tensors = read or written
    return Cost(
        flops={VECTOR: flops},
        bytes_read=tensor_bytes(read),
        bytes_written=tensor_bytes(written),
        primitive=Primitive.DATA_MOVEMENT,
        movement=movement,
        size=(sent,),
        precision=precision_of(tensors[0]) if tensors else VECTOR,
        curve=KINDS.get(call.name, call.name),
        link_bytes=sent,
        group_size=ranks,
    )


KINDS = {
    "all_reduce": "all_reduce", "all_reduce_coalesced": "all_reduce", "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce", "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather", "all_gather_into_tensor_coalesced": "all_gather",
    "allgather": "all_gather", "_allgather_base": "all_gather", "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter", "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter": "reduce_scatter", "_reduce_scatter_base": "reduce_scatter", "all_to_all_single": "all_to_all",
    "alltoall": "all_to_all", "alltoall_base": "all_to_all", "isend": "send", "irecv": "recv",
    "recv_any_source": "recv", "monitored_barrier": "barrier", "batch_p2p_ops": "send",
}  # fmt: skip


def _c10d(*names: str) -> tuple[str, ...]:
    return tuple(f"c10d::{name}" for name in names)


def _functional(*names: str) -> tuple[str, ...]:
    return tuple(f"_c10d_functional::{name}" for name in names)


def _arguments(call: Call, *names: str) -> tuple[Tensor, ...]:
    for name in names:
        found = tuple(tensors_in(call.get(name)))
        if found:
            return found
    return ()


INPUTS = ("input", "inputs", "input_tensor", "input_tensors", "input_list", "tensors", "tensor")
OUTPUTS = ("out", "output", "outputs", "output_tensor", "output_tensors", "output_lists", "tensors")


def _in_and_out(call: Call) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tensors sent and received; c10d's schemas do not declare that they write, so names tell."""
    return _arguments(call, *INPUTS), _arguments(call, *OUTPUTS) or call.outputs


@prices(*_functional("all_reduce", "all_reduce_coalesced"), *_c10d("allreduce_", "allreduce_coalesced_"))
def all_reduce(call: Call) -> Cost:
    """2·(n − 1)/n·V bytes leave each rank, and (n − 1)/n·V elements are added there."""
    n = group_size(call)
    tensors = _arguments(call, *INPUTS)
    volume = tensor_bytes(tensors)
    flops = (n - 1) * sum(t.numel() for t in tensors) // n
    return _collective(
        call, n, 2 * (n - 1) * volume // n, tensors, tensors, (Movement.REDUCTION, Movement.BROADCAST), flops=flops
    )


@prices(
    *_functional("all_gather_into_tensor", "all_gather_into_tensor_out", "all_gather_into_tensor_coalesced"),
    *_c10d("allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"),
    "_c10d_functional_autograd::all_gather_into_tensor",
)  # fmt: skip
def all_gather(call: Call) -> Cost:
    """(n − 1)/n of the full size leaves each rank: every shard but one passes through it."""
    n = group_size(call)
    sent, received = _in_and_out(call)
    return _collective(call, n, (n - 1) * tensor_bytes(sent), sent, received, (Movement.GATHER, Movement.BROADCAST))


@prices(
    *_functional("reduce_scatter_tensor", "reduce_scatter_tensor_out", "reduce_scatter_tensor_coalesced"),
    *_c10d("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"),
    "_c10d_functional_autograd::reduce_scatter_tensor",
)  # fmt: skip
def reduce_scatter(call: Call) -> Cost:
    """(n − 1)/n of the full size leaves each rank, and as many elements are added."""
    n = group_size(call)
    sent, received = _in_and_out(call)
    flops = (n - 1) * sum(t.numel() for t in sent) // n
    movement = (Movement.REDUCTION, Movement.SCATTER)
    return _collective(call, n, (n - 1) * tensor_bytes(sent) // n, sent, received, movement, flops=flops)


@prices(
    *_functional("all_to_all_single"),
    *_c10d("alltoall_", "alltoall_base_"),
    "_c10d_functional_autograd::all_to_all_single",
)
def all_to_all(call: Call) -> Cost:
    """Each rank keeps its own n-th and sends the rest."""
    n = group_size(call)
    sent, received = _in_and_out(call)
    movement = (Movement.SCATTER, Movement.GATHER)
    return _collective(call, n, (n - 1) * tensor_bytes(sent) // n, sent, received, movement)


@prices(*_functional("broadcast"), *_c10d("broadcast_"))
def broadcast(call: Call) -> Cost:
    """A pipelined ring: all of V passes every rank but the last."""
    n = group_size(call)
    tensors = _arguments(call, *INPUTS)
    return _collective(call, n, tensor_bytes(tensors), tensors, tensors, (Movement.BROADCAST,))


@prices(*_c10d("reduce_"))
def reduce(call: Call) -> Cost:
    """A broadcast run backwards, with an addition an element."""
    n = group_size(call)
    tensors = _arguments(call, *INPUTS)
    flops = sum(t.numel() for t in tensors)
    return _collective(call, n, tensor_bytes(tensors), tensors, tensors, (Movement.REDUCTION,), flops=flops)


@prices(*_c10d("gather_", "scatter_"))
def rooted(call: Call) -> Cost:
    """Everyone's part passes the root's link: (n − 1) parts."""
    n = group_size(call)
    sent, received = _in_and_out(call)
    part = received if call.name == "scatter" else sent
    movement = (Movement.SCATTER if call.name == "scatter" else Movement.GATHER,)
    return _collective(call, n, (n - 1) * tensor_bytes(part), sent, received, movement)


@prices(*_c10d("send"), *_functional("isend", "batch_p2p_ops"))
def send(call: Call) -> Cost:
    tensors = _arguments(call, *INPUTS)
    return _collective(call, max(2, group_size(call)), tensor_bytes(tensors), tensors, (), ())


@prices(*_c10d("recv_", "recv_any_source_"), *_functional("irecv"))
def receive(call: Call) -> Cost:
    """The bytes occupy the link whichever way they pass."""
    tensors = _arguments(call, *INPUTS)
    return _collective(call, max(2, group_size(call)), tensor_bytes(tensors), (), tensors, ())


@prices(*_c10d("barrier", "monitored_barrier_"))
def barrier(call: Call) -> Cost:
    """No payload; the latency is the machine's to add."""
    return _collective(call, group_size(call), 0, (), (), ())
