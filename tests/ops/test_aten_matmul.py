"""Matrix multiplies and convolutions against FlopCounterMode, nested loops, and bytes by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from rooflight.ops.cost import Access, Primitive
from tests.priced import Recorder, Recording, price_call, price_module

BF16 = torch.bfloat16


def _counted(call: Callable[..., Any], *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> int:
    with FakeTensorMode():
        tensors = [torch.empty(a, dtype=dtype) if isinstance(a, tuple) else a for a in args]
        with FlopCounterMode(display=False) as counter:
            call(*tensors, **kwargs)
    return counter.get_total_flops()


MATMULS = [
    (torch.mm, ((3, 5), (5, 7))),
    (torch.bmm, ((2, 3, 5), (2, 5, 7))),
    (torch.addmm, ((7,), (3, 5), (5, 7))),
    (torch.baddbmm, ((2, 3, 7), (2, 3, 5), (2, 5, 7))),
    (torch.matmul, ((2, 4, 3, 5), (5, 7))),
    (torch.matmul, ((2, 4, 3, 5), (2, 4, 5, 7))),
    (nn.functional.linear, ((2, 3, 5), (7, 5), (7,))),
]


@pytest.mark.parametrize(("call", "shapes"), MATMULS)
def test_matmuls_equal_the_flop_counter(call: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> None:
    record = price_call(call, *shapes, dtype=BF16)
    assert record.flops("bf16") == _counted(call, *shapes, dtype=BF16) > 0


def test_einsum_is_priced_through_its_products() -> None:
    record = price_call(lambda a, b: torch.einsum("bthe,bshe->bhts", a, b), (2, 3, 4, 5), (2, 6, 4, 5), dtype=BF16)
    assert record.flops("bf16") == 2 * 2 * 4 * 3 * 6 * 5


def test_a_linear_moves_each_operand_once() -> None:
    cost = price_call(torch.mm, (3, 5), (5, 7), dtype=BF16).one("mm")
    assert (cost.bytes_read, cost.bytes_written) == (2 * (15 + 35), 2 * 21)
    assert (cost.size, cost.curve, cost.primitive) == ((3, 7, 5), "linear", Primitive.MATMUL)


def test_bias_and_scales_are_an_epilogue() -> None:
    plain = price_call(torch.addmm, (7,), (3, 5), (5, 7), dtype=BF16).one("addmm")
    assert plain.flops == {"bf16": 2 * 3 * 5 * 7, "fp32": 21}
    scaled = price_call(torch.addmm, (3, 7), (3, 5), (5, 7), dtype=BF16, alpha=2.0, beta=0.5).one("addmm")
    assert scaled.flops["fp32"] == 3 * 21
    unread = price_call(torch.addmm, (3, 7), (3, 5), (5, 7), dtype=BF16, beta=0).one("addmm")
    assert unread.bytes_read == 2 * (15 + 35)


def test_bmm_size_carries_the_batch() -> None:
    cost = price_call(torch.bmm, (2, 3, 5), (2, 5, 7), dtype=BF16).one("bmm")
    assert (cost.size, cost.curve) == ((2, 3, 7, 5), "bmm")


def test_vectors_and_complex() -> None:
    assert price_call(torch.mv, (4, 6), (6,), dtype=BF16).flops("bf16") == 2 * 24
    assert price_call(torch.dot, (6,), (6,), dtype=BF16).flops("bf16") == 12
    # (a + bi)(c + di) + e + fi: four products and four additions.
    assert price_call(torch.mm, (3, 5), (5, 7), dtype=torch.complex64).flops() == 8 * 3 * 5 * 7


def test_grouped_mm_counts_every_row_once() -> None:
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    with FakeTensorMode() as mode:
        a, b = torch.empty(64, 32, dtype=BF16, device="cuda"), torch.empty(4, 32, 16, dtype=BF16, device="cuda")
        offs = mode.from_tensor(offsets)
        out = torch.empty(64, 16, dtype=BF16, device="cuda")
    from rooflight.ops import aten

    cost = aten.price(torch.ops.aten._grouped_mm.default, (a, b, offs), {}, out)
    assert cost is not None
    assert cost.flops == {"bf16": 2 * 64 * 32 * 16}
    assert cost.bytes_read == 2 * (64 * 32 + 4 * 32 * 16) + 16


def test_fp8_is_counted_as_fp8() -> None:
    from rooflight.ops import aten

    with FakeTensorMode():
        a = torch.empty(32, 64, dtype=torch.float8_e4m3fn)
        b, one, out = torch.empty(64, 16, dtype=torch.float8_e4m3fn), torch.empty(()), torch.empty(32, 16, dtype=BF16)
    cost = aten.price(torch.ops.aten._scaled_mm.default, (a, b, one, one), {"out_dtype": BF16}, out)
    assert cost is not None
    assert cost.flops == {"fp8": 2 * 32 * 64 * 16, "fp32": 32 * 16}
    assert cost.bytes_read == 32 * 64 + 64 * 16 + 4


def test_sizes_may_be_symbolic() -> None:
    record = Recording()
    env = ShapeEnv()
    real = torch.empty(6, 8, dtype=BF16)
    with FakeTensorMode(shape_env=env) as mode:
        x = mode.from_tensor(real, static_shapes=False)
        w = torch.empty(x.shape[1], 16, dtype=BF16)
        with Recorder(record):
            torch.softmax(x @ w, -1)
    flops = record.one("mm").flops["bf16"]
    assert isinstance(flops, torch.SymInt)
    assert len(flops.node.expr.free_symbols) >= 1
    assert int(flops) == 2 * 6 * 8 * 16


def loops(out_shape: tuple[int, ...], channels: int, kernel: tuple[int, ...]) -> int:
    """Multiply-adds of a convolution, one at a time."""
    count = 0
    for _ in itertools.product(*(range(s) for s in out_shape)):
        for _ in range(channels):
            for _ in itertools.product(*(range(k) for k in kernel)):
                count += 1
    return count


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 7, 8)),
    (nn.Conv2d(4, 8, (3, 2), dilation=2, bias=False), (1, 4, 8, 9)),
    (nn.Conv2d(4, 8, 3, groups=2, bias=False), (1, 4, 5, 5)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (1, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2, bias=False), (1, 2, 4, 4, 3)),
]


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS)
def test_convolution_equals_nested_loops(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> None:
    out_shape = tuple(module(torch.empty(shape)).shape)
    macs = loops(out_shape, module.in_channels // module.groups, module.kernel_size)
    x = torch.empty(shape, dtype=BF16)
    cost = price_module(module.to(BF16), x).one("convolution")
    assert cost.flops == {"bf16": 2 * macs}
    weights = module.out_channels * module.in_channels // module.groups * _product(module.kernel_size)
    assert cost.bytes_read == 2 * (x.numel() + weights)
    assert cost.bytes_written == 2 * _product(out_shape)
    assert (cost.primitive, cost.access) == (Primitive.SLIDING_WINDOW, Access.STRIDED)


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_equals_nested_loops(groups: int) -> None:
    module = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, bias=False, dtype=BF16)
    macs = loops((1, 4, 5, 5), 6 // groups, (3, 3))
    assert price_module(module, torch.empty(1, 4, 5, 5, dtype=BF16)).flops("bf16") == 2 * macs


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        *[(m, s) for m, s in CONVOLUTIONS if m.groups == 1],
        (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (1, 4, 5, 5)),
    ],
)
def test_convolution_forward_and_backward_equal_the_flop_counter(module: nn.Module, shape: tuple[int, ...]) -> None:
    real = module.to(BF16)
    x = torch.randn(shape, dtype=BF16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        real(x).sum().backward()
    record = price_module(real, x, backward=True)
    backward = record.one("convolution_backward")
    assert record.one("convolution").flops["bf16"] + backward.flops["bf16"] == counter.get_total_flops()


def test_convolution_backward_prices_only_the_gradients_that_are_wanted() -> None:
    module = nn.Conv2d(4, 6, 3, dtype=BF16)
    forward_macs = loops((1, 6, 3, 3), 4, (3, 3))
    weights_only = price_module(module, torch.empty(1, 4, 5, 5, dtype=BF16), backward=True).one("convolution_backward")
    assert weights_only.flops == {"bf16": 2 * forward_macs, "fp32": 54}
    assert weights_only.bytes_read == 2 * (100 + 54)
