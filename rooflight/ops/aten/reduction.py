"""Reductions, scans and order: many elements become few, or each result needs those before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import access_of, log2, reduced_columns, rows_and_columns
from rooflight.ops.cost import Access, Cost, Count, Movement, Primitive, elementwise_cost

# Operations (an input element, a result): the mean also divides; the variance needs the mean, a difference, a square
# and a sum; logsumexp a maximum, a difference, exp and a sum, then log and an addition.
REDUCTIONS: dict[str, tuple[int, int]] = {
    "sum": (1, 0), "nansum": (2, 0), "mean": (1, 1), "prod": (1, 0), "amax": (1, 0), "amin": (1, 0), "aminmax": (2, 0),
    "_aminmax": (2, 0), "max": (1, 0), "min": (1, 0), "argmax": (1, 0), "argmin": (1, 0), "any": (1, 0), "all": (1, 0),
    "_is_all_true": (1, 0), "_is_any_true": (1, 0), "var": (4, 2), "std": (4, 3), "var_mean": (4, 2),
    "std_mean": (4, 3), "norm": (2, 1), "native_norm": (2, 1), "linalg_vector_norm": (2, 1), "linalg__powsum": (2, 0),
    "dist": (3, 1), "logsumexp": (4, 2), "count_nonzero": (2, 0), "trace": (1, 0),
    "_amp_foreach_non_finite_check_and_unscale": (2, 0), "hash_tensor": (1, 0),
}  # fmt: skip
SOFTMAX: dict[str, int] = {
    # Forward: maximum, subtract, exp, sum, divide (or subtract the log). Backward: product, sum, subtract, product.
    "_softmax": 5, "_safe_softmax": 6, "_log_softmax": 5, "_masked_softmax": 6,
    "_softmax_backward_data": 4, "_log_softmax_backward_data": 4, "_masked_softmax_backward": 4,
}  # fmt: skip
SCANS: dict[str, int] = {
    "cumsum": 1, "cumprod": 1, "logcumsumexp": 4, "_logcumsumexp": 4, "cummax": 1, "cummin": 1,
    "_cummax_helper": 1, "_cummin_helper": 1,
}  # fmt: skip


def _reduction(call: Call, x: Tensor, flops: Count, columns: Count, curve: str, spread: bool = False) -> Cost:
    return elementwise_cost(
        flops,
        call.reads,
        call.writes,
        size=rows_and_columns(x, columns),
        primitive=Primitive.REDUCTION,
        access=access_of((x,)),
        movement=(Movement.REDUCTION, Movement.BROADCAST) if spread else (Movement.REDUCTION,),
    ).named(curve)


@prices(*(f"aten::{name}" for name in REDUCTIONS if name not in ("max", "min")))
@prices("aten::max", "aten::max.dim", "aten::min", "aten::min.dim")
def reduce(call: Call) -> Cost:
    """FLOPs: a figure an input element and one a result."""
    x = call.reads[0]
    per_element, per_result = REDUCTIONS[call.name]
    columns = reduced_columns(x, call.get("dim"))
    rows, _ = rows_and_columns(x, columns)
    return _reduction(call, x, per_element * x.numel() + per_result * rows, columns, "reduction")


@prices(*(f"aten::{name}" for name in SOFTMAX))
def softmax(call: Call) -> Cost:
    """A row's maximum, exponentials and sum; also the gradient through them."""
    x = call.reads[0]
    dim = call.get("dim")
    columns = x.shape[-1 if dim is None else dim] if x.ndim else 1
    return _reduction(call, x, SOFTMAX[call.name] * x.numel(), columns, "softmax", spread=True)


@prices(*(f"aten::{name}" for name in SCANS))
def scan(call: Call) -> Cost:
    """Every prefix: one combination an element; a parallel scan moves each element once."""
    x = call.reads[0]
    return _reduction(call, x, SCANS[call.name] * x.numel(), reduced_columns(x, call.get("dim")), "reduction")


@prices(
    "aten::sort", "aten::argsort", "aten::msort", "aten::topk", "aten::kthvalue", "aten::median", "aten::nanmedian",
    "aten::mode", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::unique_dim_consecutive", "aten::bincount", "aten::histogram", "aten::histc",
    "aten::_histogramdd_from_bin_cts", "aten::_histogramdd_bin_edges", "aten::_histogramdd_from_bin_tensors",
)  # fmt: skip
def order(call: Call) -> Cost:
    """Comparisons: n·log₂n a row to sort, n·log₂k to select k, n·log₂(bins) to count; data decide who meets."""
    x = call.reads[0]
    dim: Any = call.get("dim")
    if call.name in ("sort", "topk", "kthvalue", "mode") and dim is None:
        dim = -1
    columns = reduced_columns(x, dim)
    if call.name == "topk":
        depth = log2(call["k"])
    elif call.name in ("kthvalue", "median", "nanmedian", "unique_consecutive", "unique_dim_consecutive", "bincount"):
        depth = 1
    elif call.name in ("histc", "histogram"):
        bins = call["bins"]
        depth = log2(bins.numel() if isinstance(bins, Tensor) else bins)
    else:
        depth = log2(columns)
    return elementwise_cost(
        x.numel() * depth,
        call.reads,
        call.writes,
        size=rows_and_columns(x, columns),
        primitive=Primitive.DYNAMIC,
        access=Access.RANDOM,
        movement=(Movement.SCATTER,),
    ).named("sort")


@prices("aten::searchsorted", "aten::bucketize")
def search(call: Call) -> Cost:
    """A binary search a value: log₂(boundaries) comparisons."""
    boundaries: Tensor = call.get("sorted_sequence", "boundaries")
    out = call.first_output()
    return elementwise_cost(
        out.numel() * log2(boundaries.shape[-1]),
        call.reads,
        call.writes,
        size=(out.numel(), boundaries.shape[-1]),
        primitive=Primitive.DYNAMIC,
        access=Access.RANDOM,
        movement=(Movement.GATHER,),
    ).named("gather")


@prices("aten::multinomial")
def multinomial(call: Call) -> Cost:
    """Cumulative probabilities, then a binary search a sample."""
    p: Tensor = call["self"]
    out = call.first_output()
    flops = 2 * p.numel() + out.numel() * log2(p.shape[-1])
    return elementwise_cost(
        flops,
        call.reads,
        call.writes,
        size=rows_and_columns(p, p.shape[-1]),
        primitive=Primitive.DYNAMIC,
        access=Access.RANDOM,
        movement=(Movement.REDUCTION, Movement.GATHER),
    ).named("reduction")


@prices("aten::segment_reduce", "aten::_segment_reduce_backward")
def segments(call: Call) -> Cost:
    """Rows of each segment combined, or the gradient spread back over them."""
    x: Tensor = call["data"]
    return _reduction(call, x, x.numel(), x.shape[0], "reduction")
