"""Products with their norm, gate or residual sum on a GPU, at every number of rows that another kernel computes.

FlashAttention's protocol: the error is at most twice that of torch's operations one after the other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from rooflight.ops.fused_linear import add_linear, norm_linear

pytestmark = pytest.mark.gpu
# Rounding of the output alone, where torch's own error happens to be small.
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROWS = [1, 2, 3, 8, 16, 33, 64, 65, 200]
SIZES = [(4096, 1024), (1024, 3072), (6144, 4096), (4096, 14336), (200, 1000)]
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, EPS)


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return silu(gate) * up


def check(found: Tensor, torchs: Tensor, exact: Tensor) -> None:
    assert not found.isnan().any()
    scale = exact.abs().max()
    error, others = ((x.double() - exact).abs().max() / scale for x in (found, torchs))
    assert error <= 2 * others + FLOOR[found.dtype], f"{float(error):.2e} against {float(others):.2e} of torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_norm_before_and_gate_after(rows, outputs, inputs, dtype):
    x, w = draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5
    norm, bias = draw(inputs, dtype=dtype, seed=2), draw(outputs, dtype=dtype, seed=3)
    for b in (None, bias):
        wide = linear(normed(x.double(), norm.double()), w.double(), None if b is None else b.double())
        plain = linear(normed(x, norm), w, b)
        for gate, act in ((None, lambda y: y), ("silu", gated)):
            found = norm_linear(x, norm, w, b, EPS, 0.0, gate)
            check(found, act(plain), act(wide))
            assert torch.equal(found, norm_linear(x, norm, w, b, EPS, 0.0, gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_added_in_place(rows, outputs, inputs, dtype):
    x, w = draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5
    for bias in (None, draw(outputs, dtype=dtype, seed=3)):
        stream = draw(rows, outputs, dtype=dtype, seed=4)
        b = None if bias is None else bias.double()
        exact, torchs = stream.double() + linear(x.double(), w.double(), b), stream + linear(x, w, bias)
        found, again = stream.clone(), stream.clone()
        add_linear(found, x, w, bias)
        add_linear(again, x, w, bias)
        check(found, torchs, exact)
        assert torch.equal(found, again)


def test_a_slice_of_wider_rows():
    """Attention's output may be a slice of something wider."""
    wide, w = draw(3, 4096, dtype=torch.bfloat16), draw(1024, 2048, dtype=torch.bfloat16, seed=1) / 45
    for rows in (1, 3):
        x, stream = wide[:rows, 1024:3072], draw(rows, 1024, dtype=torch.bfloat16, seed=2)
        found = stream.clone()
        add_linear(found, x, w, None)
        check(found, stream + linear(x, w), stream.double() + linear(x.double(), w.double()))
