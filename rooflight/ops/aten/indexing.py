"""Gathers and scatters: which elements are touched is in an index tensor.

Bytes are those of the elements that the index can reach: a lookup of T rows reads T rows, never more than the table.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Primitive, precision_of, tensor_bytes


def _indexed(
    call: Call,
    read: Count,
    written: Count,
    size: tuple[Count, ...],
    *,
    flops: Count = 0,
    scatter: bool = False,
    also: tuple[Movement, ...] = (),
) -> Cost:
    first = call.first_output() if call.outputs else call.writes[0]
    return Cost(
        flops={VECTOR: flops},
        bytes_read=read,
        bytes_written=written,
        primitive=Primitive.DATA_MOVEMENT,
        access=Access.RANDOM,
        movement=(Movement.SCATTER if scatter else Movement.GATHER, *also),
        size=size,
        precision=precision_of(first) if first.is_floating_point() else VECTOR,
        curve="scatter" if scatter else "gather",
    )


def _reachable(table: Tensor, touched: Count) -> Count:
    """Bytes of `touched` elements of a table, at most the table."""
    return torch.sym_min(touched * table.element_size(), tensor_bytes(table))


def _others(call: Call, table: Tensor) -> Iterable[Tensor]:
    return (t for t in call.reads if t is not table)


@prices(
    "aten::gather", "aten::index_select", "aten::take", "aten::index", "aten::_unsafe_index", "aten::masked_select",
    "aten::_unsafe_masked_index",
)  # fmt: skip
def gather(call: Call) -> Cost:
    """Output elements are read from where the index points; a mask is searched whole."""
    source: Tensor = call["self"]
    out = call.first_output()
    read = _reachable(source, out.numel()) + tensor_bytes(_others(call, source))
    return _indexed(call, read, tensor_bytes(out), (out.numel(),))


@prices("aten::embedding")
def embedding(call: Call) -> Cost:
    """One row of the (rows, width) table a token."""
    table: Tensor = call["weight"]
    out = call.first_output()
    read = _reachable(table, out.numel()) + tensor_bytes(call["indices"])
    return _indexed(call, read, tensor_bytes(out), (call["indices"].numel(), table.shape[-1]))


@prices("aten::embedding_dense_backward")
def embedding_backward(call: Call) -> Cost:
    """Each token's gradient is added to its row of a gradient as large as the table, which is zeroed first."""
    grad = call["grad_output"]
    size = (call["indices"].numel(), grad.shape[-1])
    return _indexed(
        call, tensor_bytes(call.reads), tensor_bytes(call.writes), size,
        flops=grad.numel(), scatter=True, also=(Movement.REDUCTION,),
    )  # fmt: skip


@prices("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Cost:
    """Rows gathered and combined a bag; weights a sample multiply them first, the mean (mode 1) divides."""
    table, indices = call["weight"], call["indices"]
    touched = indices.numel() * table.shape[-1]
    weighted = call.get("per_sample_weights") is not None
    flops = touched * (2 if weighted else 1) + (call.first_output().numel() if call["mode"] == 1 else 0)
    return _indexed(
        call,
        _reachable(table, touched) + tensor_bytes(_others(call, table)),
        tensor_bytes(call.writes),
        (indices.numel(), table.shape[-1]),
        flops=flops,
        also=(Movement.REDUCTION,),
    )


@prices(
    "aten::_embedding_bag_backward", "aten::_embedding_bag_dense_backward",
    "aten::_embedding_bag_per_sample_weights_backward",
)  # fmt: skip
def embedding_bag_backward(call: Call) -> Cost:
    """A bag's gradient is added to the row of each of its tokens, scaled where the bag was."""
    grad, indices = call["grad"], call["indices"]
    scaled = call.get("per_sample_weights", "weight") is not None or call["mode"] == 1
    flops = indices.numel() * grad.shape[-1] * (2 if scaled else 1)
    size = (indices.numel(), grad.shape[-1])
    return _indexed(
        call, tensor_bytes(call.reads), tensor_bytes(call.writes), size,
        flops=flops, scatter=True, also=(Movement.REDUCTION,),
    )  # fmt: skip


def _put(call: Call, touched: Count, accumulate: bool) -> Cost:
    """In place, only what the index touches is written (and read to accumulate); otherwise self is copied first."""
    target: Tensor = call["self"]
    combine = touched if accumulate else 0
    others = tensor_bytes(_others(call, target))
    also = (Movement.REDUCTION,) if accumulate else ()
    if call.func._schema.is_mutable and any(w is target for w in call.writes):
        written = _reachable(target, touched)
        read = others + (written if accumulate else 0)
        return _indexed(call, read, written, (touched,), flops=combine, scatter=True, also=also)
    read, written = others + tensor_bytes(target), tensor_bytes(call.first_output())
    return _indexed(call, read, written, (touched,), flops=combine, scatter=True, also=also)


@prices("aten::scatter", "aten::scatter_add", "aten::scatter_reduce", "aten::put")
def scatter(call: Call) -> Cost:
    """One element of src (or one value) goes where each index points."""
    accumulate = call.name in ("scatter_add", "scatter_reduce") or call.get("reduce", "accumulate") not in (None, False)
    return _put(call, call["index"].numel(), accumulate)


@prices("aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_reduce")
def index_rows(call: Call) -> Cost:
    """Whole slices go where a one-dimensional index points."""
    target: Tensor = call["self"]
    slice_elements = target.numel() // target.shape[call["dim"]] if target.ndim else 1
    return _put(call, call["index"].numel() * slice_elements, call.name in ("index_add", "index_reduce"))


@prices("aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index_put")
def index_put(call: Call) -> Cost:
    """Indices are broadcast against each other; a boolean mask may touch all that it covers."""
    target: Tensor = call["self"]
    touched: Count = 1
    covered = 0
    shapes = []
    for index in call["indices"]:
        if index is None:
            touched = touched * target.shape[covered]
            covered += 1
        elif index.dtype in (torch.bool, torch.uint8):
            shapes.append((index.numel(),))
            covered += index.ndim
        else:
            shapes.append(tuple(index.shape))
            covered += 1
    for size in (*torch.broadcast_shapes(*shapes), *target.shape[covered:]):
        touched = touched * size
    return _put(call, touched, bool(call.get("accumulate")))


@prices("aten::_unsafe_masked_index_put_accumulate")
def masked_index_put(call: Call) -> Cost:
    return _put(call, call["values"].numel(), True)


@prices("aten::masked_scatter", "aten::masked_scatter_backward")
def masked_scatter(call: Call) -> Cost:
    """The next element of the source goes wherever the mask is set."""
    scattered = call.name == "masked_scatter"
    return _indexed(
        call, tensor_bytes(call.reads), tensor_bytes(call.writes), (call["mask"].numel(),), scatter=scattered
    )


@prices("aten::nonzero", "aten::nonzero_static", "aten::argwhere", "aten::repeat_interleave")
def compact(call: Call) -> Cost:
    """A prefix count over the input, then positions written; how many, only the data tell."""
    x = call.reads[0]
    return _indexed(
        call, tensor_bytes(call.reads), tensor_bytes(call.writes), (x.numel(),),
        flops=x.numel(), scatter=True, also=(Movement.REDUCTION,),
    )  # fmt: skip


@prices(
    "aten::nll_loss_forward",
    "aten::nll_loss2d_forward",
    "aten::multi_margin_loss",
    "aten::multilabel_margin_loss_forward",
)
def nll_loss(call: Call) -> Cost:
    """One log-probability a target is picked and summed; margin losses look at every class."""
    x, target = call["self"], call["target"]
    picked = target.numel() if call.name.startswith("nll") else x.numel()
    per_element = 1 if call.name.startswith("nll") else 3
    read = _reachable(x, picked) + tensor_bytes(_others(call, x))
    return _indexed(
        call, read, tensor_bytes(call.writes), (picked,), flops=per_element * picked, also=(Movement.REDUCTION,)
    )


@prices(
    "aten::nll_loss_backward", "aten::nll_loss2d_backward", "aten::multi_margin_loss_backward",
    "aten::multilabel_margin_loss_backward",
)  # fmt: skip
def nll_loss_backward(call: Call) -> Cost:
    """A gradient as large as the input is zeroed, with one value at each target; the input's values are not read."""
    x = call["self"]
    nll = call.name.startswith("nll")
    read = tensor_bytes(_others(call, x) if nll else call.reads)
    touched = call["target"].numel() if nll else x.numel()
    return _indexed(call, read, tensor_bytes(call.writes), (touched,), flops=touched * (1 if nll else 3), scatter=True)
