"""The rotary kernel under the interpreter against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

from rooflight.ops.rope import rotary_table

from .oracle import assert_close, exact, takes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Tokens, query heads, key heads, head dim, frequencies.
SIZES = [(7, 3, 1, 8, 4), (3, 4, 2, 16, 3), (40, 5, 5, 64, 32), (2, 2, 1, 96, 16), (1, 1, 1, 2, 1), (300, 2, 1, 6, 3)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@DTYPES
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("t", "h", "k", "e", "c"), SIZES)
def test_rotary(interpret, t, h, k, e, c, interleaved, inverse, dtype):
    args = (draw(t, h, e, dtype=dtype), draw(t, k, e, dtype=dtype, seed=1), draw(t, c, seed=2), draw(t, c, seed=3))
    out = interpret("rope.rotary", *args, interleaved, inverse)
    assert_close(out, exact("rotary", *args, interleaved, inverse), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("c", [4, 6])
def test_slices_of_fused_qkv(interpret, interleaved, c):
    qkv = draw(11, (4 + 2 + 2) * 12)
    q, k, _ = qkv.split([48, 24, 24], dim=-1)
    q, k = q.unflatten(-1, (4, 12)), k.unflatten(-1, (2, 12))
    cos, sin = draw(11, c, seed=1), draw(11, c, seed=2)
    for pair in ((q, k), (q.transpose(1, 2).contiguous().transpose(1, 2), k), (q.flip(0), k[:, :1].expand(-1, 3, -1))):
        out = interpret("rope.rotary", *pair, cos, sin, interleaved)
        assert_close(out, exact("rotary", *pair, cos, sin, interleaved, False), torch.float32)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("t", "h", "k", "e", "c"), SIZES)
def test_out_of_fused_qkv_and_back(interpret, t, h, k, e, c, interleaved, dtype):
    tables = (draw(t, c, seed=2), draw(t, c, seed=3))
    args = (draw(t, (h + 2 * k) * e, dtype=dtype), *tables, h, k, interleaved)
    q, k, v = interpret("rope.rotary_qkv", *args)
    assert_close((q, k, v), exact("rotary_qkv", *args), dtype)
    grads = tuple(draw(*x.shape, dtype=dtype, seed=4 + i) for i, x in enumerate((q, k, v)))
    args = (*grads, *tables, interleaved)
    assert_close(interpret("rope.rotary_qkv_backward", *args), exact("rotary_qkv_backward", *args), dtype)


def test_gradients_and_projections_that_lie_otherwise(interpret):
    cos, sin = draw(11, 4, seed=1), draw(11, 4, seed=2)
    by_head = tuple(draw(h, 11, 8, seed=h).transpose(0, 1) for h in (4, 2, 2))
    by_channel = tuple(draw(11, 8, h, seed=h).transpose(1, 2) for h in (4, 2, 2))
    for grads in (by_head, by_channel):
        args = (*grads, cos, sin, False)
        assert_close(interpret("rope.rotary_qkv_backward", *args), exact("rotary_qkv_backward", *args), torch.float32)
    for qkv in (draw(22, 64)[::2], draw(11, 80)[:, 8:72], draw(64, 11).t()):
        args = (qkv, cos, sin, 4, 2, False)
        assert_close(interpret("rope.rotary_qkv", *args), exact("rotary_qkv", *args), torch.float32)


def test_the_inverse_undoes(interpret):
    q, k, angle = draw(5, 2, 8), draw(5, 1, 8, seed=1), draw(5, 3, seed=2)
    turned = interpret("rope.rotary", q, k, angle.cos(), angle.sin())
    back = interpret("rope.rotary", *turned, angle.cos(), angle.sin(), False, True)
    assert_close(back, (q, k), torch.float32)


def test_what_the_kernel_leaves_to_the_reference():
    q, k, table = torch.empty(3, 2, 8), torch.empty(3, 1, 8), torch.empty(3, 4)
    assert takes("rotary", q, k, table, table) and takes("rotary", q, k, table, table, True, True)
    assert not takes("rotary", q.double(), k.double(), table, table)
    assert not takes("rotary", q, k.bfloat16(), table, table)
    assert not takes("rotary", q, k[..., :6], table, table)
    assert not takes("rotary", q, k, table[:1], table[:1])
    qkv = torch.empty(3, 32)
    assert takes("rotary_qkv", qkv, table, table, 2, 1, True)
    assert not takes("rotary_qkv", qkv, table, table, 2, 2, True)
    assert not takes("rotary_qkv", qkv, table[:1], table[:1], 2, 1, True)
    assert takes("rotary_qkv_backward", q, k, k, table, table, True)
    assert not takes("rotary_qkv_backward", q, k, k.bfloat16(), table, table, True)
    assert not takes("rotary_qkv_backward", q, k, k[:, :0], table, table, True)


@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (9, 3), (700, 32)])
def test_rotary_table(interpret, tokens, channels):
    positions = torch.randint(0, 100_000, (tokens,), generator=torch.Generator().manual_seed(tokens))
    frequencies = 10_000.0 ** -(torch.arange(channels) / channels)
    found = interpret("rotary_table.rotary_table", positions, frequencies, 1.25)
    # An angle of 100,000 in fp32 is 0.004 off itself, so the reference's fp32 angles are the measure.
    assert_close(found, rotary_table.reference(positions, frequencies, 1.25), torch.float32)
    found = interpret("rotary_table.rotary_table", positions.int(), frequencies, 1.25)
    assert_close(found, rotary_table.reference(positions, frequencies, 1.25), torch.float32)
