"""Kernels of mixture-of-experts layers under the interpreter against their references; fresh memory holds NaN there.

Legend: T tokens  X experts  K experts a token  D width  R = T·K rows
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops import activation, dispatch, grouped, grouped_gated, routing
from rooflight.ops.kernels.grouped_plan import Plan, plan_for

from .oracle import assert_close, bits_equal

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "mixtral": (8, 2, {}),
    "qwen3": (128, 8, {}),
    "qwen3-unnormalised": (60, 4, {"normalize": False}),
    "gpt-oss": (32, 4, {"scoring": "softmax_topk"}),
    "one": (1, 1, {}),
    "all": (16, 16, {}),
    "deepseek-v2": (
        *(160, 6),
        {"normalize": False, "scale": 16.0, "groups": 8, "top_groups": 3, "group_score": "max"},
    ),
    "deepseek-v3": (
        *(256, 8),
        {"scoring": "sigmoid", "scale": 2.5, "groups": 8, "top_groups": 4, "group_score": "top2"},
    ),
}


def route_arguments(name: str, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    experts, top_k, given = MODELS[name]
    g = torch.Generator().manual_seed(tokens)
    # Different numbers in any type, so that the choice has no ties.
    logits_TX = torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)]) / 16 - experts / 40
    bias_X = torch.randn(experts, generator=g) / 4 if name == "deepseek-v3" else None
    options = {
        **{"scoring": "softmax", "normalize": True, "scale": 1.0, "groups": 1, "top_groups": 1, "group_score": "max"},
        **given,
    }
    return logits_TX.to(dtype), bias_X, top_k, *options.values()


@pytest.mark.parametrize("dtype", [FP32, HALF, BF16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_route(interpret, name, dtype):
    args = route_arguments(name, 7, dtype)
    assert routing.route.kernel_takes is not None and routing.route.kernel_takes(*args)
    (weights, experts), (want, chosen) = interpret("routing.route", *args), routing._route(*args)
    assert torch.equal(experts, chosen)
    assert_close(weights, want, FP32)


@pytest.mark.parametrize("name", MODELS)
def test_route_backward(interpret, name):
    logits, bias, top_k, scoring, normalize, scale, *groups = route_arguments(name, 5, FP32)
    weights, experts = routing._route(logits, bias, top_k, scoring, normalize, scale, *groups)
    args = (torch.randn(weights.shape), logits, experts, scoring, normalize, scale)
    assert_close(interpret("routing.route_backward", *args), routing._route_backward(*args), FP32)


def test_of_equal_scores_the_first_expert_wins_and_rows_may_be_strided(interpret):
    wide = torch.zeros(3, 20)
    _, experts = interpret("routing.route", wide[:, 4:12], None, 3, "softmax", True, 1.0, 1, 1, "max")
    assert experts.tolist() == [[0, 1, 2]] * 3


def test_what_is_not_finite_stays_in_its_row_and_names_an_expert(interpret):
    logits = torch.randn(4, 10)
    logits[1, 3], logits[2] = float("nan"), float("-inf")
    weights, experts = interpret("routing.route", logits, None, 4, "softmax", True, 1.0, 1, 1, "max")
    assert weights[[0, 3]].isfinite().all() and weights[1].isnan().all() and weights[2].isnan().all()
    assert ((experts >= 0) & (experts < 10)).all() and all(len(set(row)) == 4 for row in experts.tolist())


def choices(kind: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Experts of tokens: drawn, the same for all tokens, or one that nearly all share."""
    g = torch.Generator().manual_seed(tokens)
    drawn = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)])
    return drawn[:1].expand(tokens, -1) if kind == "same" else drawn


# Tokens, experts, experts a token, width: one launch, the most of it, and a sort by chunks with odd ends.
SORTS = [(1, 8, 2, 64), (9, 16, 4, 40), (5, 3, 3, 1), (1, 1, 1, 7), (33, 7, 1, 130), (64, 60, 8, 24), (66, 33, 16, 9)]


@pytest.mark.parametrize("kind", ["drawn", "same"])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width"), SORTS)
def test_permute(interpret, tokens, experts, top_k, width, kind):
    chosen = choices(kind, tokens, experts, top_k)
    args = (torch.randn(tokens, width).to(BF16), chosen, experts)
    assert dispatch.permute.kernel_takes is not None and dispatch.permute.kernel_takes(*args)
    assert bits_equal(interpret("dispatch.permute", *args), dispatch._permute(*args))


def test_permuting_a_slice(interpret):
    x = torch.randn(6, 100)[:, 10:50]
    args = (x, choices("drawn", 6, 8, 2), 8)
    assert bits_equal(interpret("dispatch.permute", *args), dispatch._permute(*args))
    args = (torch.randn(40, 6).t(), choices("drawn", 6, 8, 2), 8)
    assert bits_equal(interpret("dispatch.permute", *args), dispatch._permute(*args))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width"), SORTS)
def test_rows_back_to_tokens(interpret, tokens, experts, top_k, width, dtype):
    g = torch.Generator().manual_seed(width)
    _, source, _ = dispatch._permute(torch.zeros(tokens, 1), choices("drawn", tokens, experts, top_k), experts)
    y = torch.randn(tokens * top_k, width, generator=g).to(dtype)
    weights, grad = torch.rand(tokens, top_k, generator=g), torch.randn(tokens, width, generator=g).to(dtype)
    args = (y.double(), weights.double(), source)
    assert_close(interpret("dispatch.unpermute", y, weights, source), dispatch._unpermute(*args), dtype)
    want = dispatch._permute_backward(y.double(), source, top_k)
    assert_close(interpret("dispatch.permute_backward", y, source, top_k), want, dtype)
    found = interpret("dispatch.unpermute_backward", grad, y, weights, source)
    want_y, want_weights = dispatch._unpermute_backward(grad.double(), *args)
    assert_close(found[0], want_y, dtype)
    assert_close(found[1], want_weights, FP32)


COUNTS = {
    "one row": (0, 0, 1, 0),
    "one row each": (1, 1, 1, 1, 1),
    "one takes all": (0, 45, 0),
    "some": (3, 0, 17, 16, 0, 1, 40),
    "one expert": (5,),
}
SIZES = [(70, 200), (5, 24), (1, 1), (64, 128)]
SMALL = Plan(16, 32, 32, 4, 3)


@pytest.mark.parametrize("dtype", [FP32, HALF], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped(interpret, counts, outputs, inputs, dtype):
    g = torch.Generator().manual_seed(outputs)
    shapes = ((sum(counts), inputs), (len(counts), outputs, inputs), (len(counts), outputs), (sum(counts), outputs))
    x, weight, bias, grad = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    counts_X = torch.tensor(counts)
    # Experts without rows are never read.
    weight[counts_X == 0], bias[counts_X == 0] = float("nan"), float("nan")
    wide = (x.double(), weight.double())
    for plan in (None, SMALL):
        found = interpret("grouped.linear", x, weight, bias, counts_X, plan)
        assert_close(found, grouped._linear(*wide, bias.double(), counts_X), dtype)
    assert_close(interpret("grouped.linear", x, weight, None, counts_X), grouped._linear(*wide, None, counts_X), dtype)
    want = grouped._input_grad(grad.double(), wide[1], counts_X)
    assert_close(interpret("grouped.input_grad", grad, weight, counts_X), want, dtype)
    assert_close(interpret("grouped.bias_grad", grad, counts_X), grouped._bias_grad(grad.double(), counts_X), dtype)
    want = grad.double() + torch.repeat_interleave(bias.double(), counts_X, 0)
    assert_close(interpret("grouped.add_bias", grad, bias, counts_X), want, dtype)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize(("width", "inputs"), [(32, 64), (35, 40), (1, 8)])
def test_grouped_with_its_activation(interpret, width, inputs, kind):
    counts, dtype = (3, 0, 17, 1), HALF
    g = torch.Generator().manual_seed(width)
    shapes = ((sum(counts), inputs), (len(counts), 2 * width, inputs), (len(counts), 2 * width))
    x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    counts_X = torch.tensor(counts)
    for given in (bias, None):
        wide = None if given is None else given.double()
        want = activation._gated(grouped._linear(x.double(), weight.double(), wide, counts_X), kind)
        assert_close(interpret("grouped.gated_linear", x, weight, given, counts_X, kind), want, dtype)


def test_rows_of_a_slice_and_what_is_not_finite_stays_in_its_row(interpret):
    x, weight = torch.randn(20, 100)[:, 20:84], torch.randn(3, 16, 64)
    x[4, 3] = float("nan")
    counts_X = torch.tensor([2, 10, 8])
    y = interpret("grouped.linear", x, weight, None, counts_X)
    assert y[4].isnan().all() and not y[[row for row in range(20) if row != 4]].isnan().any()


def test_plans(monkeypatch: pytest.MonkeyPatch):
    weight = torch.empty(128, 8, 8, dtype=BF16, device="meta")
    most = grouped._FEW_MEAN_ROWS
    monkeypatch.setattr(grouped, "_torchs_takes", lambda *_: True)
    for rows, ours in ((8, True), (128 * most, True), (129 * most, False)):
        assert grouped.is_ours(weight.new_empty((rows, 8)), weight) == ours
    for dtype in (FP32, BF16):
        for rows in (1, 8, 100, 5000, 65536):
            plan = plan_for(rows, 32, dtype)
            assert plan.rows <= 128 and plan.outputs % 16 == 0


def test_what_is_left_to_the_references():
    def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    counts, source, chosen = (meta(*size, dtype=torch.int64) for size in ((8,), (4,), (2, 2)))
    weights = meta(2, 2, dtype=FP32)
    takes = grouped.grouped_linear.kernel_takes
    assert takes is not None and takes(meta(4, 16), meta(8, 32, 16), None, counts)
    assert not takes(meta(0, 16), meta(8, 32, 16), None, counts)
    assert not takes(meta(4, 16), meta(8, 32, 16, dtype=FP32), None, counts)
    assert not takes(meta(4, 16, dtype=torch.float64), meta(8, 32, 16, dtype=torch.float64), None, counts)
    takes = grouped_gated.grouped_gated_linear.kernel_takes
    assert takes is not None and takes(meta(4, 16), meta(8, 32, 16), None, counts, "clamped_swiglu")
    assert not takes(meta(4, 16), meta(8, 32, 16), None, counts, "tanh")
    assert not takes(meta(4, 16), meta(8, 31, 16), None, counts, "silu")
    takes = dispatch.unpermute.kernel_takes
    assert takes is not None and takes(meta(4, 16), weights, source) and not takes(meta(0, 16), weights[:0], source)
    takes = dispatch.permute.kernel_takes
    assert takes is not None and takes(meta(2, 16), chosen, 8) and not takes(meta(2, 16), chosen.repeat(1, 9), 8)
    takes = routing.route.kernel_takes
    usual = ("softmax", True, 1.0, 1, 1, "max")
    assert takes is not None and takes(meta(2, 8), None, 2, *usual)
    assert not takes(meta(0, 8), None, 2, *usual) and not takes(meta(2, 8), None, 9, *usual)
    assert not takes(meta(2, 1024), None, 2, *usual) and not takes(meta(2, 8), None, 2, "tanh", *usual[1:])
    assert not takes(meta(2, 8), None, 2, *usual[:3], 4, 2, "mean")
    assert not takes(meta(2, 9), None, 2, *usual[:3], 2, 1, "max")
