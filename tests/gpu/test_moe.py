"""Mixture-of-experts operations on a GPU, through their Ops, against fp64; and a layer replayed from a CUDA graph.

Legend: T tokens  X experts  K experts a token  D width  F feed-forward width
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops import activation, dispatch, grouped, routing
from rooflight.ops.dispatch import permute, permute_backward, unpermute, unpermute_backward
from rooflight.ops.grouped import grouped_bias_grad, grouped_input_grad, grouped_linear
from rooflight.ops.grouped_gated import grouped_gated_linear
from rooflight.ops.routing import route, route_backward
from tests.ops import formulas as f
from tests.ops.kernels.oracle import assert_close, bits_equal
from tests.ops.kernels.test_moe import MODELS, SIZES, SORTS, choices, route_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
OPS = (
    *(route, route_backward, permute, permute_backward, unpermute, unpermute_backward),
    *(grouped_linear, grouped_input_grad, grouped_bias_grad, grouped_gated_linear),
)


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to a reference fails. Fresh memory holds NaN."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in OPS:
        monkeypatch.setattr(op, "reference", refuse)
    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *args, **kw: (lambda x: x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-1))(
            empty(self, *args, **kw)
        ),
    )


def on_gpu(args: Any) -> tuple[Any, ...]:
    return tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)


def on_cpu(found: Any) -> Any:
    return tuple(one.cpu() for one in found) if isinstance(found, tuple) else found.cpu()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3000])
@pytest.mark.parametrize("name", MODELS)
def test_route(name, tokens, dtype):
    args = route_arguments(name, tokens, dtype)
    (want, chosen), (weights, experts) = routing._route(*args), on_cpu(route(*on_gpu(args)))
    assert torch.equal(experts, chosen)
    assert_close(weights, want, FP32)
    grad, (_, _, _, scoring, normalize, scale, *_) = torch.randn(want.shape), args
    back = (grad, args[0].float(), chosen, scoring, normalize, scale)
    exact = f.route_backward(grad.double(), args[0].double(), chosen, scoring, normalize, scale)
    # Of sigmoids near 1, 1 − s has few bits left in fp32: the reference's own error is beyond a few roundings.
    error, theirs = (
        (on_cpu(x) - exact).abs().max() for x in (route_backward(*on_gpu(back)), routing._route_backward(*back))
    )
    assert error <= 2 * theirs + 1e-6 * exact.abs().max(), f"{error:.2e} against {theirs:.2e} of torch's own"


MORE = [*SORTS, (4096, 128, 8, 256), (8192, 32, 4, 72), (65536, 8, 1, 8), (2, 512, 16, 2048), (127, 256, 8, 7168)]


@pytest.mark.parametrize("kind", ["drawn", "same"])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width"), MORE)
def test_there_and_back(tokens, experts, top_k, width, kind):
    chosen = choices(kind, tokens, experts, top_k)
    x, weights = torch.randn(tokens, width).to(BF16), torch.rand(tokens, top_k)
    wanted = dispatch._permute(x, chosen, experts)
    found = permute(*on_gpu((x, chosen, experts)))
    assert bits_equal(on_cpu(found), wanted)
    assert bits_equal(found, permute(*on_gpu((x, chosen, experts))))
    source, y, grad = wanted[1], torch.randn(tokens * top_k, width).to(BF16), torch.randn(tokens, width).to(BF16)
    args = (y, weights, source)
    assert_close(on_cpu(unpermute(*on_gpu(args))), dispatch._unpermute(y.double(), weights.double(), source), BF16)
    back = (y, source, top_k)
    want = dispatch._permute_backward(y.double(), source, top_k)
    assert_close(on_cpu(permute_backward(*on_gpu(back))), want, BF16)
    found_y, found_weights = on_cpu(unpermute_backward(*on_gpu((grad, *args))))
    want_y, want_weights = dispatch._unpermute_backward(grad.double(), y.double(), weights.double(), source)
    assert_close(found_y, want_y, BF16)
    assert_close(found_weights, want_weights, FP32)


def spread(rows: int, experts: int, kind: str) -> Tensor:
    """How many of the rows each expert has: drawn, or nearly all with one."""
    g = torch.Generator().manual_seed(rows)
    numbers = torch.randint(experts, (rows,), generator=g)
    if kind == "one":
        numbers[rows // 20 :] = experts // 2
    return torch.bincount(numbers, minlength=experts)


# Rows and experts, outputs and inputs, type; each is compiled anew.
PRODUCTS = [
    *(((8, 128), size, BF16) for size in (*SIZES, (1536, 2048), (256, 2880))),
    *((rows, size, BF16) for rows in ((1, 8), (300, 5), (2000, 16)) for size in ((70, 200), (384, 512))),
    *((rows, (70, 200), dtype) for rows in ((8, 128), (300, 5), (2000, 16)) for dtype in (HALF, FP32)),
]


@pytest.mark.parametrize(("given", "size", "dtype"), PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", ["drawn", "one"])
def test_grouped(kind, given, size, dtype):
    (rows, experts), (outputs, inputs) = given, size
    counts = spread(rows, experts, kind)
    g = torch.Generator("cuda").manual_seed(outputs)
    shapes = ((rows, inputs), (experts, outputs, inputs), (experts, outputs), (rows, outputs))
    x, weight, bias, grad = (torch.randn(shape, generator=g, device="cuda").to(dtype) for shape in shapes)
    counts_X = counts.cuda()
    wide = (x.double(), weight.double())
    for one in (bias, None):
        found = grouped_linear(x, weight, one, counts_X)
        assert_close(found, grouped._linear(*wide, None if one is None else one.double(), counts_X), dtype)
        assert torch.equal(found, grouped_linear(x, weight, one, counts_X))
    found = grouped_input_grad(grad, weight, counts_X)
    assert_close(found, grouped._input_grad(grad.double(), wide[1], counts_X), dtype)
    assert_close(grouped_bias_grad(grad, counts_X), grouped._bias_grad(grad.double(), counts_X), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu", "clamped_swiglu"])
@pytest.mark.parametrize(("rows", "experts"), [(8, 128), (300, 5)])
def test_grouped_with_its_activation(rows, experts, kind, dtype):
    counts = spread(rows, experts, "drawn").cuda()
    g = torch.Generator("cuda").manual_seed(rows)
    shapes = ((rows, 200), (experts, 2 * 360, 200), (experts, 2 * 360))
    x, weight, bias = (torch.randn(shape, generator=g, device="cuda").to(dtype) for shape in shapes)
    weight = weight / 16
    if grouped.is_ours(x, weight):
        product = grouped._linear(x.double(), weight.double(), bias.double(), counts)
    else:
        # Of many rows the activation finds the product rounded, as `test_grouped` holds it.
        product = grouped_linear(x, weight, bias, counts).double()
    assert_close(grouped_gated_linear(x, weight, bias, counts, kind), activation._gated(product, kind), dtype)


@pytest.mark.parametrize("tokens", [1, 5, 33, 200])
@pytest.mark.parametrize(("experts", "top_k", "kind"), [(64, 8, "silu"), (32, 4, "clamped_swiglu"), (8, 2, "silu")])
def test_a_graph_serves_other_routes_than_it_was_captured_with(experts, top_k, kind, tokens):
    width, ffn = 256, 192
    g = torch.Generator("cuda").manual_seed(tokens)
    up, up_bias, down = (
        torch.randn(shape, device="cuda", generator=g).to(BF16) / 16
        for shape in ((experts, 2 * ffn, width), (experts, 2 * ffn), (experts, width, ffn))
    )
    x = torch.randn(tokens, width, device="cuda", generator=g).to(BF16)
    logits = torch.randn(tokens, experts, device="cuda", generator=g)

    def layer() -> Tensor:
        weights_TK, experts_TK = route(logits, None, top_k)
        rows, source, counts = permute(x, experts_TK, experts)
        h = grouped_gated_linear(rows, up, up_bias, counts, kind)
        return unpermute(grouped_linear(h, down, None, counts), weights_TK, source)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for seed in range(4):
        drawn = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        if seed == 3:
            drawn[:] = drawn[:1]  # all tokens to the same experts
        logits.copy_(drawn)
        graph.replay()
        assert torch.equal(out, layer())


def test_weights_of_more_elements_than_32_bits_count():
    experts, outputs, inputs = 70, 8192, 4096
    assert experts * outputs * inputs > 2**31
    weight = torch.zeros(experts, outputs, inputs, device="cuda", dtype=BF16)
    weight[-1].normal_()
    x = torch.randn(40, inputs, device="cuda").to(BF16)
    counts = torch.zeros(experts, dtype=torch.int64, device="cuda")
    counts[-1] = 40
    assert_close(grouped_linear(x, weight, None, counts), x.double() @ weight[-1].double().t(), BF16)
