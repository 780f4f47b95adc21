"""FLOPs of every operation equal its scalar program's own count, exactly; unique bytes equal a count by hand."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rooflight.ops import batch
from rooflight.ops.cost import VECTOR, Cost, curve_of

from .case import Case, Draw
from .cases import CASES, OPS
from .counted import MATMUL_UNIT, VECTOR_UNIT, Counted, counting, flat, lift

WITH_SCALAR = [case for case in CASES if case.scalar is not None]


def priced(case: Case, dtype: torch.dtype) -> tuple[Cost, tuple[Any, ...], Any]:
    """The price of a row's call, its arguments and its output."""
    args = case.args(Draw(dtype))
    out = OPS[case.name](*args)
    with batch.use(case.batch) if case.batch else nullcontext():
        return OPS[case.name].price(out, *args), args, out


def _lifted(x: Any) -> Any:
    return lift(x.tolist()) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("case", WITH_SCALAR, ids=str)
def test_flops_equal_the_scalar_program(case: Case) -> None:
    # Priced in bf16, so that what the matrix unit does and what the vector units do stand apart.
    cost, args, _ = priced(case, torch.bfloat16)
    with counting() as tally:
        case.scalar(*tree_map(_lifted, args))  # pyright: ignore[reportOptionalCall]
    counted = {"bf16": tally[MATMUL_UNIT], VECTOR: tally[VECTOR_UNIT]}
    assert {name: cost.flops.get(name, 0) for name in counted} == counted
    assert set(cost.flops) <= set(counted)


@pytest.mark.parametrize("case", WITH_SCALAR, ids=str)
def test_the_scalar_program_computes_the_operation(case: Case) -> None:
    args = case.args(Draw(torch.float32))
    scalar_args = tree_map(_lifted, args)
    scalar_out = case.scalar(*scalar_args)  # pyright: ignore[reportOptionalCall]
    out: Any = OPS[case.name](*args)
    if case.mutates:
        out, scalar_out = [args[i] for i in case.mutates], [scalar_args[i] for i in case.mutates]
    values = [v for tensor in tree_leaves(out) for v in tensor.double().flatten().tolist()]
    assert flat(scalar_out) == pytest.approx(values, rel=1e-3, abs=1e-4)


def _nbytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def _adamw_bytes(args: Any, out: Any) -> tuple[int, int]:
    params, grads, means, squares, masters, scale, *_ = args
    return _nbytes(masters or params, grads, means, squares, scale), _nbytes(params, masters, means, squares)


def _paged_bytes(args: Any, out: Any) -> tuple[int, int]:
    """Keys in sight of each sequence, once: of contexts 7 and 5, with a window of 3 the last query + 2 of each."""
    q, k, v, table, contexts, _, _, _, _, window, _, sinks = args
    queries = [1, 1] if q.shape[0] == 2 else [3, 2]
    keys = sum(min(c, window + n - 1) if window else c for c, n in zip([7, 5], queries, strict=True))
    row = _nbytes(k[0, 0]) + (0 if v is None else _nbytes(v[0, 0]))
    return _nbytes(q, table, contexts, sinks) + keys * row, _nbytes(out)


def _grouped_bytes(args: Any, out: Any) -> tuple[int, int]:
    """Weights of the experts that have rows: five by COUNTS where a batch says so, else the mean of random routing."""
    rows, weight, *rest = args
    bias, counts = rest if len(rest) == 2 else (None, *rest)
    experts = weight.shape[0]
    mean = experts * (1 - (1 - 1 / experts) ** rows.shape[0])
    hit = 5 if bias is not None or len(rest) == 1 else int(mean)
    return _nbytes(rows, counts) + hit * _nbytes(weight[0], None if bias is None else bias[0]), _nbytes(out)


# Where unique bytes are not simply every argument read once and every output written once.
BY_HAND = {
    "embedding": lambda args, out: (_nbytes(args[0], out), _nbytes(out)),  # only the rows that tokens name
    # The rows that the table names: keys, and values where they are a cache of their own.
    "gather_kv": lambda args, out: (_nbytes(args[2], out[0], None if args[1] is None else out[1]), _nbytes(out)),
    # The caches are written where the slots say, and not read.
    "rotate_and_cache": lambda args, out: (
        _nbytes(*args[:3], *args[5:]),
        _nbytes(out) + sum(args[0].shape[0] * _nbytes(cache[0, 0]) for cache in args[3:5]),
    ),
    "write_kv": lambda args, out: (_nbytes(*args[:2], args[4]), _nbytes(*args[:2])),
    "add_linear": lambda args, out: (_nbytes(*args), _nbytes(args[0])),
    "paged_attention": _paged_bytes,
    "adamw": _adamw_bytes,
    "linear_cross_entropy_backward": lambda args, out: (_nbytes(*args), _nbytes(*args[1:])),
    "scale_": lambda args, out: (_nbytes(*args), _nbytes(args[0])),
    "grouped_linear": _grouped_bytes,
    "grouped_gated_linear": lambda args, out: _grouped_bytes(args[:-1], out),
    "grouped_input_grad": _grouped_bytes,
}


@pytest.mark.parametrize("case", [case for case in CASES if not case.collective], ids=str)
def test_unique_bytes(case: Case) -> None:
    cost, args, out = priced(case, torch.bfloat16)
    by_hand = BY_HAND.get(case.name, lambda args, out: (_nbytes(*args), _nbytes(out)))
    assert (cost.bytes_read, cost.bytes_written) == by_hand(args, out)


@pytest.mark.parametrize("case", [case for case in CASES if not case.collective], ids=str)
def test_parts_sum_to_the_whole_and_traffic_is_no_less_than_unique(case: Case) -> None:
    cost, _, _ = priced(case, torch.bfloat16)
    if cost.parts:
        flops: dict[str, int] = {}
        for part in cost.parts:
            for name, count in part.flops.items():
                flops[name] = flops.get(name, 0) + count
        assert flops == dict(cost.flops)
        assert sum(part.bytes_read for part in cost.parts) == cost.bytes_read
        assert sum(part.bytes_written for part in cost.parts) == cost.bytes_written
    assert cost.traffic is None or cost.traffic >= cost.total_bytes


def test_broadcast_dimensions_count_once() -> None:
    x = torch.zeros(1, 8, dtype=torch.bfloat16).expand(5, 8)
    cost = OPS["activation"].price(torch.empty(5, 8, dtype=torch.bfloat16), x, "relu")
    assert (cost.bytes_read, cost.bytes_written) == (16, 80)


def test_adamw_moves_28_bytes_a_parameter_in_fp32() -> None:
    tensors = [[torch.zeros(100), torch.zeros(23)] for _ in range(4)]
    cost = OPS["adamw"].price(None, *tensors, [], None, 1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0)
    assert cost.total_bytes == 28 * 123


def test_a_counted_number_counts_each_operation_once() -> None:
    with counting() as tally:
        x = Counted(3.0)
        assert (2 - x * x + 1 / x > 0.0) is False
    assert tally[VECTOR_UNIT] == 5


@pytest.mark.parametrize(("experts", "rows"), [(2, 1), (3, 4), (4, 5), (5, 3)])
def test_experts_reached_are_the_mean_over_all_routings(experts: int, rows: int) -> None:
    routings = list(itertools.product(range(experts), repeat=rows))
    mean = sum(len(set(routing)) for routing in routings) / len(routings)
    x, weight = torch.empty(rows, 6), torch.empty(experts, 7, 6)
    counts = torch.zeros(experts, dtype=torch.int64)
    cost = OPS["grouped_linear"].price(torch.empty(rows, 7), x, weight, None, counts)
    assert cost.bytes_read == _nbytes(x, counts) + int(mean + 1e-6) * _nbytes(weight[0])


@pytest.mark.parametrize(
    ("n", "k", "curve"), [(64, 32, "linear"), (63, 32, "linear.unaligned"), (64, 4, "linear.unaligned")]
)
def test_products_over_odd_widths_have_a_curve_of_their_own(n: int, k: int, curve: str) -> None:
    args = (torch.empty(3, k), torch.empty(n, k), None)
    assert curve_of(OPS["linear"].price(torch.empty(3, n), *args), "linear") == curve
    norm = OPS["rms_norm"].price(torch.empty(3, 7), torch.empty(3, 7), torch.empty(7), 1e-5, 0.0)
    assert curve_of(norm, "rms_norm") == "rms_norm"
