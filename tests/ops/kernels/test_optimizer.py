"""The AdamW and clipping kernels under the interpreter against fp64, and what they compile to for an H200."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import clipping, optimizer
from tests.ops import formulas
from tests.ops.kernels.conftest import Interpreter
from tests.ops.kernels.test_ahead_of_time import Compiled, compile_launch, meta

COMPILES = (
    optimizer.adamw_kernel,
    clipping.squares_kernel,
    clipping.root_of_sum_kernel,
    clipping.clip_scale_kernel,
    clipping.scale_kernel,
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# One element, odd sizes, an empty tensor, exactly a chunk, and one and a bit.
SHAPES = [(1,), (3, 5), (0,), (optimizer.CHUNK,), (optimizer.CHUNK + 77,)]
TYPES = pytest.mark.parametrize(
    ("param", "grad", "moment", "square", "masters"),
    [
        (FP32, FP32, FP32, FP32, False),
        (BF16, BF16, BF16, BF16, False),
        (BF16, FP32, FP32, FP32, True),
        (FP16, FP32, BF16, FP32, False),
        (FP32, BF16, FP32, BF16, False),
    ],
    ids=str,
)
HYPER = (3, 0.01, 0.9, 0.95, 1e-8, 0.1)
TOLERANCE = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}


def lists(param: torch.dtype, grad: torch.dtype, moment: torch.dtype, square: torch.dtype, masters: bool) -> list[Any]:
    draw = torch.Generator().manual_seed(0)

    def of(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]

    params = of(param)
    return [params, of(grad), of(moment), [v.abs() for v in of(square)], [p.float() for p in params] if masters else []]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    error = (found.double() - wanted).abs()
    assert not found.isnan().any()
    assert (error <= TOLERANCE[found.dtype] * (wanted.abs() + 0.1)).all(), float(error.max())


@TYPES
@pytest.mark.parametrize("scale", [None, 0.3])
def test_adamw_is_the_published_update(
    interpret: Interpreter, param: Any, grad: Any, moment: Any, square: Any, masters: bool, scale: float | None
) -> None:
    args = lists(param, grad, moment, square, masters)
    factor = None if scale is None else torch.tensor(scale)
    _, left = interpret.call("optimizer.adamw", *args, factor, *HYPER, 0)
    p, g, m, v, fp32 = ([tensor.double() for tensor in tensors] for tensors in args)
    formulas.adamw(p, [(scale or 1.0) * x for x in g], m, v, fp32, *HYPER)
    for found, wanted in zip(left[:5], (p, args[1], m, v, fp32), strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b.double())
    again = interpret.call("optimizer.adamw", *args, factor, *HYPER, 0)[1]
    assert all(torch.equal(a, b) for x, y in zip(left[:5], again[:5], strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_changes_nothing(interpret: Interpreter, scale: float) -> None:
    args = lists(BF16, FP32, FP32, FP32, True)
    left = interpret.call("optimizer.adamw", *args, torch.tensor(scale), *HYPER, 3)[1]
    assert all(torch.equal(a, b) for x, y in zip(left[:5], args, strict=True) for a, b in zip(x, y, strict=True))


def decayed(interpret: Interpreter, values: Tensor, dtype: torch.dtype, decay: float, seed: int) -> list[Tensor]:
    """Two tensors of the same values, times 1 − decay and no other change."""
    params = [values.to(dtype), values.to(dtype)]
    none = [torch.zeros(values.shape) for _ in params]
    _, left = interpret.call("optimizer.adamw", params, none, none, none, [], None, 1, 1.0, 0.9, 0.9, 1.0, decay, seed)
    return left[0]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_is_unbiased_gives_a_neighbour_and_never_repeats_bits(
    interpret: Interpreter, dtype: torch.dtype
) -> None:
    size = optimizer.CHUNK + 4096
    # Below 1 the spacing is 2⁻⁸ in bf16 and 2⁻¹¹ in fp16; the exact result lies 0.3 of it down.
    spacing = 2.0**-8 if dtype == BF16 else 2.0**-11
    found = decayed(interpret, torch.ones(size), dtype, 0.3 * spacing, 5)
    assert set(torch.cat(found).tolist()) == {1.0, 1.0 - spacing}
    down = [(x < 1).double() for x in found]
    assert float(torch.cat(down).mean()) == pytest.approx(0.3, abs=5 * (0.21 / (2 * size)) ** 0.5)
    # Tensors, blocks and chunks draw apart: their decisions do not correlate.
    half = size // 2
    pairs = [(down[0], down[1]), (down[0][:half], down[0][half:]), (down[0][:1024], down[0][1024:2048])]
    for a, b in pairs:
        correlation = float(((a - 0.3) * (b - 0.3)).mean() / 0.21)
        assert abs(correlation) < 5 / len(a) ** 0.5
    assert torch.equal(found[0], decayed(interpret, torch.ones(size), dtype, 0.3 * spacing, 5)[0])
    assert not torch.equal(found[0], decayed(interpret, torch.ones(size), dtype, 0.3 * spacing, 6)[0])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_keeps_what_is_exact_and_what_is_not_finite(
    interpret: Interpreter, dtype: torch.dtype
) -> None:
    # The interpreter loads bf16's subnormals as zero.
    least = torch.tensor(128 if dtype == BF16 else 1, dtype=torch.int16).view(dtype)
    largest, smallest = torch.finfo(dtype).max, float(least)
    values = torch.tensor([0.0, 1.5, largest, -largest, smallest, -3 * smallest, math.inf, math.nan])
    found = decayed(interpret, values, dtype, 0.0, 7)[0]
    torch.testing.assert_close(found, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_is_unbiased_among_fp16s_subnormals(interpret: Interpreter) -> None:
    found = decayed(interpret, torch.full((8192,), 2.0**-22), FP16, 0.05, 9)[0].double() * 2**24
    assert set(found.tolist()) == {3.0, 4.0}
    assert float(found.mean()) == pytest.approx(3.8, abs=5 * (0.16 / 8192) ** 0.5)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_norm_and_scale(interpret: Interpreter, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = (1, 0, 15, clipping.CHUNK, clipping.CHUNK + 77)
    tensors = [torch.randn(n, generator=draw).to(dtype) for n in sizes] + [torch.randn(9, generator=draw)]
    exact = torch.cat([x.double() for x in tensors]).norm()
    found = interpret("clipping.grad_norm", tensors)
    assert found.dtype == FP32 and float(found) == pytest.approx(float(exact), rel=2e-6)
    assert torch.equal(found, interpret("clipping.grad_norm", tensors))
    scaled = interpret.call("clipping.scale", tensors, torch.tensor(0.3))[1][0]
    for a, b in zip(scaled, tensors, strict=True):
        assert_close(a, b.double() * float(torch.tensor(0.3)))
    tensors[0].fill_(math.nan)
    assert interpret("clipping.grad_norm", tensors).isnan()


def test_a_factor_of_one_and_no_elements_at_all(interpret: Interpreter) -> None:
    tensors = [torch.randn(9)]
    assert torch.equal(interpret.call("clipping.scale", tensors, torch.tensor(1.0))[1][0][0], tensors[0])
    assert interpret("clipping.grad_norm", [torch.zeros(0)]) == 0


@pytest.mark.parametrize(
    ("norm", "max_norm", "scale"),
    [
        (4.0, 1.0, 1 / (4 + 1e-6)),
        (0.5, 1.0, 1.0),
        (7.0, math.inf, 1.0),
        (math.inf, 1.0, math.nan),
        (math.nan, 1.0, math.nan),
    ],
)
def test_clip_scale(interpret: Interpreter, norm: float, max_norm: float, scale: float) -> None:
    found = float(interpret("clipping.clip_scale", torch.tensor(norm), max_norm))
    assert found == pytest.approx(scale, rel=1e-6, nan_ok=True)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Compiled]]:
    """Kernels that a test launched on meta tensors, compiled for sm_90 and not run."""
    found: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(compile_launch(self, args, options, tmp_path))

    monkeypatch.setattr(JITFunction, "run", run)
    yield found
    for kernel in found:
        print(f"\n{kernel} resident threads {kernel.resident_threads}", end="")


@TYPES
@pytest.mark.parametrize("seed", [0, 5])
def test_adamw_compiles_for_hopper(
    compiled: list[Compiled], param: Any, grad: Any, moment: Any, square: Any, masters: bool, seed: int
) -> None:
    roles = [[meta(4096, 4096, dtype=dtype)] for dtype in (param, grad, moment, square)]
    fp32 = [meta(4096, 4096, dtype=FP32)] if masters else []
    optimizer.adamw(roles[0], roles[1], roles[2], roles[3], fp32, meta(dtype=FP32), *HYPER, seed)
    (kernel,) = compiled
    assert kernel.stack == 0 and kernel.wide_loads >= 4 * 4 and kernel.wide_stores >= 4 * 3
    assert kernel.resident_threads >= 512


def test_clipping_compiles_for_hopper(compiled: list[Compiled]) -> None:
    grads = [meta(4096, 4096)]
    clipping.grad_norm(grads)
    clipping.clip_scale(meta(dtype=FP32), 1.0)
    clipping.scale(grads, meta(dtype=FP32))
    assert [kernel.name for kernel in compiled] == [
        "squares_kernel",
        "root_of_sum_kernel",
        "clip_scale_kernel",
        "scale_kernel",
    ]
    assert all(kernel.stack == 0 for kernel in compiled)
    assert compiled[0].wide_loads >= clipping.ROUNDS and compiled[3].wide_stores >= clipping.ROUNDS
    assert compiled[0].resident_threads >= 1024 and compiled[3].resident_threads >= 512
