"""`stream_linear` on a GPU against fp64: all its forms, cuts that split every tile, replays, and launches in a chain.

FlashAttention's protocol: the error is at most twice that of torch's own operators in the same precision.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from rooflight.ops.kernels import ceil_div
from rooflight.ops.kernels import stream_linear as stream_module
from rooflight.ops.kernels.stream_linear import stream_linear
from rooflight.ops.kernels.stream_plan import Plan, plan_for, tiles_of
from rooflight.ops.linear import linear as linear_op

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
EPS = 1e-5
SIZES = [(6144, 4096), (4096, 14336), (1024, 2048), (1000, 1000), (72, 40), (1, 8)]
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"), "relu": relu}


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def weight_of(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return (draw(outputs, inputs, dtype=torch.float32, seed=seed) * inputs**-0.5).to(dtype)


def reference(x: Tensor, w: Tensor, b: Tensor | None, options: dict[str, Any], double: bool) -> Tensor:
    """In fp64, or as torch's operators round."""

    def cast(t: Tensor) -> Tensor:
        return t.double() if double else t

    x, w, b = cast(x), cast(w), None if b is None else cast(b)
    norm, residual, activation = (options.get(name) for name in ("norm_weight_K", "residual_MN", "activation"))
    if norm is not None:
        wide = x if double else x.float()
        rstd = (wide.pow(2).mean(-1, keepdim=True) + options["eps"]).rsqrt()
        x = (wide * rstd * (options.get("offset", 0.0) + norm.to(wide.dtype))).to(x.dtype)
    y = linear(x, w, b)
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[activation](gate) * up
    return y if residual is None else cast(residual) + y


def check(x: Tensor, w: Tensor, b: Tensor | None = None, plan: Plan | None = None, **options: Any) -> None:
    want = reference(x, w, b, options, True)
    theirs = (reference(x, w, b, options, False).double() - want).abs().max()
    residual = options.get("residual_MN")
    runs = []
    for _ in range(2):
        if residual is not None:
            options["residual_MN"] = residual.clone()
        runs.append(stream_linear(x, w, b, plan=plan, **options))
        assert residual is None or runs[-1] is options["residual_MN"]
    error, allowed = (runs[0].double() - want).abs().max(), 2 * theirs + FLOOR[x.dtype] * want.abs().max()
    assert runs[0].shape == want.shape and not runs[0].isnan().any()
    assert error <= allowed, f"{error:.2e} against {theirs:.2e} of torch"
    assert torch.equal(*runs)


def forms(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    norm = {"norm_weight_K": draw(inputs, dtype=dtype, seed=5), "eps": EPS}
    return {
        "plain": {},
        "norm": norm,
        "norm with offset": norm | {"offset": 1.0},
        "residual": {"residual_MN": draw(rows, outputs, dtype=dtype, seed=6)},
        "norm and residual": norm | {"residual_MN": draw(rows, outputs, dtype=dtype, seed=6)},
    }


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 32, 50, 64, 100, 128])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_all_forms(outputs, inputs, rows):
    x, w, b = draw(rows, inputs), weight_of(outputs, inputs), draw(outputs, seed=2)
    for name, options in forms(outputs, inputs, rows, torch.bfloat16).items():
        check(x, w, b if name != "norm" else None, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 32, 128])
def test_gated(rows, dtype, activation):
    for feed, inputs in ((3072, 1024), (100, 72)):
        x, w, b = draw(rows, inputs, dtype=dtype), weight_of(2 * feed, inputs, dtype), draw(2 * feed, dtype=dtype)
        norm = {"norm_weight_K": draw(inputs, dtype=dtype, seed=5), "eps": EPS}
        check(x, w, None, activation=activation)
        check(x, w, b, activation=activation, **norm)
        check(x, w, b, activation=activation, residual_MN=draw(rows, feed, dtype=dtype, seed=6), **norm)


@pytest.mark.parametrize("programs", [1, 7, 33, 132, 264])
@pytest.mark.parametrize("rows", [4, 64])
def test_any_number_of_programs(rows, programs):
    """From tiles that nobody shares to tiles that many do."""
    x, w, norm = draw(rows, 2048), weight_of(1088, 2048), draw(2048, seed=5)
    for inputs, stages in ((64, 2), (64, 5), (128, 2)):
        total = tiles_of(1088, False) * ceil_div(2048, inputs)
        check(x, w, plan=Plan(inputs, stages, min(programs, total)), norm_weight_K=norm, eps=EPS)


def test_rows_and_weights_within_wider_ones():
    wide_x, wide_w = draw(6, 4096 + 64), weight_of(600, 4096 + 8)
    wide_x[:, 4096:], wide_w[:, 4096:] = float("nan"), float("nan")
    check(wide_x[:, :4096], wide_w[:, :4096])
    residual = draw(6, 700, seed=3)
    want = residual.double()[:, :600] + wide_x[:, :4096].double() @ wide_w[:, :4096].double().t()
    before = residual[:, 600:].clone()
    stream_linear(wide_x[:, :4096], wide_w[:, :4096], residual_MN=residual[:, :600])
    assert (residual[:, :600].double() - want).abs().max() <= 1e-2 * want.abs().max()
    assert torch.equal(residual[:, 600:], before)


def test_what_is_not_finite_stays_in_its_row():
    x, w, norm = draw(5, 2048), weight_of(640, 2048), draw(2048, seed=5)
    clean = stream_linear(x, w, norm_weight_K=norm, eps=EPS)
    x[1, 3] = float("inf")
    x[3] = float("nan")
    y = stream_linear(x, w, norm_weight_K=norm, eps=EPS)
    assert torch.equal(y[::2], clean[::2]) and y[3].isnan().all()


@pytest.mark.parametrize("rows", [2, 16, 32, 64, 128])
def test_a_chain_of_layers_in_a_graph(rows):
    """Launches overlap their predecessors; replays see new inputs, and give what single launches do, bit for bit."""
    width, feed, layers = 1024, 3072, 8
    weights = [
        [
            weight_of(outputs, inputs, seed=4 * layer + at)
            for at, (outputs, inputs) in enumerate([(2048, width), (width, 2048), (2 * feed, width), (width, feed)])
        ]
        for layer in range(layers)
    ]
    norm, x = draw(width, seed=9), draw(rows, width)
    residual = torch.zeros_like(x)

    def run(pause: bool) -> None:
        residual.copy_(x)
        for qkv, out, gate_up, down in weights:
            y = stream_linear(residual, qkv, norm_weight_K=norm, eps=EPS)
            _ = torch.cuda.synchronize() if pause else None
            stream_linear(y, out, residual_MN=residual)
            _ = torch.cuda.synchronize() if pause else None
            y = stream_linear(residual, gate_up, norm_weight_K=norm, eps=EPS, activation="silu")
            _ = torch.cuda.synchronize() if pause else None
            stream_linear(y, down, residual_MN=residual)
            _ = torch.cuda.synchronize() if pause else None

    run(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(False)
    for seed in range(20):
        x.copy_(draw(rows, width, seed=seed))
        graph.replay()
        found = residual.clone()
        run(True)
        assert torch.equal(found, residual) and residual.isfinite().all()


def test_weights_of_more_elements_than_32_bits_count():
    w = torch.zeros(2**19 + 40, 4096, device="cuda", dtype=torch.bfloat16)
    w[-40:] = weight_of(40, 4096)
    x = draw(4, 4096, seed=1)
    y = stream_linear(x, w, plan=plan_for(4, 2**19 + 40, 4096, False, 132))
    want = x.double() @ w[-40:].double().t()
    assert (y[:, -40:].double() - want).abs().max() <= 1e-2 * want.abs().max()
    assert not y[:, :-40].any()


@pytest.mark.parametrize("rows", [2, 17, 32])
def test_a_heads_plain_product_runs_here(rows, monkeypatch):
    called = []
    monkeypatch.setattr(
        stream_module, "stream_linear", lambda *args, **kw: called.append(kw) or stream_linear(*args, **kw)
    )
    x, w = draw(rows, 2048), weight_of(132_000, 2048)
    found, want, theirs = linear_op(x, w, None), x.double() @ w.double().t(), linear(x, w)
    assert called == [{"early": False}]
    assert (found - want).abs().max() <= 2 * (theirs - want).abs().max() + 4e-3 * want.abs().max()
