"""Products of 2 to 64 rows with norm, gate and residual on a GPU against fp64, and as a chain in a CUDA graph.

FlashAttention's protocol: the error is at most twice that of torch's own product in the same precision.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from rooflight.ops.kernels import few_linear
from rooflight.ops.kernels.few_plan import Plan, plan_for

pytestmark = pytest.mark.gpu
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4}
EPS = 1e-5
# Outputs after the gate, inputs; the last has tiles left over.
SIZES = [(4096, 1024), (1024, 2048), (1024, 3072), (1000, 1048)]
PLANS = [Plan(16, 64, 8, 2, 1, 255), Plan(32, 32, 4, 8, 2, 255), Plan(16, 128, 16, 1, 1, 128)]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def check(y: Tensor, want: Tensor, theirs: Tensor) -> None:
    """want is in fp64, theirs what torch makes of it in y's precision."""
    error, allowed = ((x.double() - want).abs().max() for x in (y, theirs))
    allowed = 2 * allowed + FLOOR[y.dtype] * want.abs().max()
    assert y.shape == want.shape and not y.isnan().any()
    assert error <= allowed, f"{error:.2e}, of {allowed:.2e} allowed"


def normed(x: Tensor, norm: Tensor, offset: float) -> Tensor:
    wide = x.double()
    return wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * (norm.double() + offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [2, 5, 8, 16, 17, 32])
def test_the_rules_plans(rows, dtype):
    for outputs, inputs in SIZES:
        if plan_for(rows, outputs, inputs, False) is None:
            continue
        x = draw(rows, inputs + 64, dtype=dtype)[:, :inputs]
        w = (draw(2 * outputs, inputs, seed=1) * inputs**-0.5).to(dtype)
        b, norm = draw(2 * outputs, dtype=dtype, seed=2), (1 + draw(inputs, seed=3) / 8).to(dtype)
        half, bias = w[:outputs], b[:outputs]
        want = linear(x.double(), half.double(), bias.double())
        check(few_linear.linear(x, half, bias), want, linear(x, half, bias))
        residual = draw(rows, outputs, dtype=dtype, seed=4)
        theirs = residual + linear(x, half, bias)
        want += residual.double()
        few_linear.add_linear(residual, x, half, bias)
        check(residual, want, theirs)
        if plan_for(rows, outputs, inputs, True) is None:
            continue
        for offset in (0.0, 1.0):
            h = normed(x, norm, offset)
            gate, up = linear(h, w.double(), b.double()).chunk(2, -1)
            gate_low, up_low = linear(h.to(dtype), w, b).chunk(2, -1)
            found = few_linear.norm_linear(x, norm, w, b, EPS, offset, "silu")
            check(found, silu(gate) * up, silu(gate_low) * up_low)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("rows", [3, 17])
def test_other_plans(rows, plan):
    for outputs, inputs in SIZES:
        x, w = draw(rows, inputs), draw(outputs, inputs, seed=1)
        y = few_linear.linear(x, w, None, plan)
        check(y, x.double() @ w.double().t(), linear(x, w))
        assert torch.equal(y, few_linear.linear(x, w, None, plan))


def test_a_chain_of_layers_in_a_graph_sees_new_inputs():
    """Each kernel begins before the one ahead of it ends."""
    rows, width, feed = 32, 1024, 3072
    gate_up, down = draw(2 * feed, width, seed=1) / 32, draw(width, feed, seed=2) / 64
    norm, residual, start = 1 + draw(width, seed=3) / 8, draw(rows, width), draw(rows, width)

    def run() -> None:
        residual.copy_(start)
        for _ in range(6):
            inner = few_linear.norm_linear(residual, norm, gate_up, None, EPS, 0.0, "silu")
            few_linear.add_linear(residual, inner, down, None)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(10):
        start.copy_(draw(rows, width, seed=10 + seed))
        graph.replay()
        found = residual.clone()
        want = start.double()
        for _ in range(6):
            gate, up = (normed(want, norm, 0.0) @ gate_up.double().t()).chunk(2, -1)
            want = want + (silu(gate) * up) @ down.double().t()
        assert (found.double() - want).abs().max() <= 4e-2 * want.abs().max()
        run()
        assert torch.equal(found, residual)
