"""`wide_linear` on a GPU against fp64: all its forms, cuts of rows and inputs, replays, and launches in a chain.

FlashAttention's protocol: the error is at most twice that of torch's own operators in the same precision.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from rooflight.ops.kernels import wide_linear
from rooflight.ops.kernels.wide_plan import Plan, fits, plan_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
EPS = 1e-5
ROWS = [1, 9, 16, 31, 32, 64, 100, 128]
# Outputs after the gate, inputs: a layer's of Qwen3-0.6B, and with tiles left over.
SIZES = [(4096, 1024), (3072, 1024), (1024, 2048), (1000, 1048), (72, 40), (8, 8)]
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": lambda x: gelu(x, approximate="tanh"), "relu": relu}
PLANS = [
    Plan(64, 16, 1, 64),
    Plan(64, 32, 2, 64),
    Plan(64, 64, 8, 64),
    Plan(64, 128, 4, 128),
    Plan(128, 32, 2, 128),
    Plan(128, 64, 8, 64),
]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def weight_of(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return (draw(outputs, inputs, dtype=torch.float32, seed=seed) * inputs**-0.5).to(dtype)


def normed(x: Tensor, norm: Tensor, offset: float) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * (norm.to(wide.dtype) + offset)).to(x.dtype)


def compare(found: list[Tensor], want: Tensor, theirs: Tensor) -> None:
    """Two runs' results; want is in fp64, theirs what torch makes of it in the same precision."""
    error, their_error = ((x.double() - want).abs().max() for x in (found[0], theirs))
    allowed = 2 * their_error + FLOOR[found[0].dtype] * want.abs().max()
    assert found[0].shape == want.shape and not found[0].isnan().any()
    assert error <= allowed, f"{error:.2e} against {their_error:.2e} of torch"
    assert torch.equal(*found)


def check_norm(
    x: Tensor, w: Tensor, b: Tensor | None, offset: float = 0.0, gate: str | None = None, plan: Plan | None = None
) -> None:
    norm = (1 + draw(x.shape[1], seed=5) / 8 - offset).to(x.dtype)

    def formula(x: Tensor, w: Tensor, b: Tensor | None, norm: Tensor) -> Tensor:
        y = linear(normed(x, norm, offset), w, b)
        return y if gate is None else ACTIVATIONS[gate](y.chunk(2, -1)[0]) * y.chunk(2, -1)[1]

    runs = [wide_linear.norm_linear(x, norm, w, b, EPS, offset, gate, plan) for _ in range(2)]
    want = formula(x.double(), w.double(), None if b is None else b.double(), norm.double())
    compare(runs, want, formula(x, w, b, norm))


def check_add(x: Tensor, w: Tensor, b: Tensor | None, plan: Plan | None = None) -> None:
    residual = draw(x.shape[0], w.shape[0], dtype=x.dtype, seed=6)
    runs = [residual.clone(), residual.clone()]
    for run in runs:
        wide_linear.add_linear(run, x, w, b, plan)
    want = residual.double() + linear(x.double(), w.double(), None if b is None else b.double())
    compare(runs, want, residual + linear(x, w, b))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_the_rules_plans(outputs, inputs, rows):
    x, w, b = draw(rows, inputs), weight_of(outputs, inputs), draw(outputs, seed=2)
    check_add(x, w, None)
    check_add(x, w, b)
    check_norm(x, w, None)
    check_norm(x, w, b, offset=1.0)
    if plan_for(rows, outputs, inputs, True, 132) is not None:
        check_norm(x, weight_of(2 * outputs, inputs), draw(2 * outputs, seed=3), gate="silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [10, 17, 32])
def test_activations(rows, dtype, activation):
    for feed, inputs in ((3072, 1024), (104, 72)):
        x, w, b = draw(rows, inputs, dtype=dtype), weight_of(2 * feed, inputs, dtype), draw(2 * feed, dtype=dtype)
        check_norm(x, w, None, gate=activation)
        check_norm(x, w, b, 1.0, activation)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("rows", [9, 40, 100, 128])
def test_other_plans(rows, plan):
    for outputs, inputs in ((1024, 1024), (1000, 1048), (136, 2048)):
        x, w = draw(rows, inputs), weight_of(2 * outputs, inputs)
        if fits(plan, inputs, False):
            check_add(x, w[:outputs], draw(outputs, seed=2), plan)
            check_norm(x, w[:outputs], None, plan=plan)
        if fits(plan, inputs, True):
            check_norm(x, w, draw(2 * outputs, seed=3), gate="silu", plan=plan)


def test_rows_and_weights_within_wider_ones():
    wide_x, wide_w = draw(20, 1024 + 64), weight_of(600, 1024 + 8)
    wide_x[:, 1024:], wide_w[:, 1024:] = float("nan"), float("nan")
    residual = draw(20, 704, seed=3)
    want = residual.double()[:, :600] + wide_x[:, :1024].double() @ wide_w[:, :1024].double().t()
    before = residual[:, 600:].clone()
    wide_linear.add_linear(residual[:, :600], wide_x[:, :1024], wide_w[:, :1024], None)
    assert (residual[:, :600].double() - want).abs().max() <= 1e-2 * want.abs().max()
    assert torch.equal(residual[:, 600:], before)


def test_what_is_not_finite_stays_in_its_row():
    x, w, norm = draw(21, 2048), weight_of(640, 2048), draw(2048, seed=5)
    clean = wide_linear.norm_linear(x, norm, w, None, EPS)
    x[1, 3] = float("inf")
    x[3] = float("nan")
    y = wide_linear.norm_linear(x, norm, w, None, EPS)
    assert torch.equal(y[::2], clean[::2]) and y[3].isnan().all()


@pytest.mark.parametrize("rows", [9, 16, 32])
def test_a_chain_of_layers_in_a_graph(rows):
    """Launches overlap their predecessors; replays see new inputs, and give what single launches do, bit for bit."""
    width, heads, feed, layers = 1024, 2048, 2048, 8
    weights = [
        [
            weight_of(outputs, inputs, seed=4 * layer + at)
            for at, (outputs, inputs) in enumerate([(4096, width), (width, heads), (2 * feed, width), (width, feed)])
        ]
        for layer in range(layers)
    ]
    norm, x = draw(width, seed=9), draw(rows, width)
    residual = torch.zeros_like(x)

    def run(pause: bool) -> None:
        def rest() -> None:
            if pause:
                torch.cuda.synchronize()

        residual.copy_(x)
        for qkv, out, gate_up, down in weights:
            y = wide_linear.norm_linear(residual, norm, qkv, None, EPS)
            rest()
            wide_linear.add_linear(residual, y[:, :heads], out, None)
            rest()
            y = wide_linear.norm_linear(residual, norm, gate_up, None, EPS, gate="silu")
            rest()
            wide_linear.add_linear(residual, y, down, None)
            rest()

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
