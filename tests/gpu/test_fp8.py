"""Linears in fp8 on a GPU that has it: casts bit by bit, products against fp64, a layer with its gradients, a decoder.

Legend: T tokens  N output width  K input width
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.models.layout import Layout
from rooflight.models.presets import resolve
from rooflight.ops import batch, fp8_linear
from rooflight.ops.fp8_linear import E4M3, E5M2, fp8_amax, fp8_quantize, fp8_quantize_both, fp8_quantize_transposed
from rooflight.workload import program

pytestmark = pytest.mark.gpu
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
SIZES = pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(16384, 3072, 2048), (4096, 16384, 3072), (4096, 4096, 14336), (1008, 48, 80), (16, 16, 16)],
)
OPS = (
    fp8_amax,
    fp8_quantize,
    fp8_quantize_both,
    fp8_quantize_transposed,
    fp8_linear.scaled_linear,
    fp8_linear.fp8_linear_input_grad,
    fp8_linear.fp8_linear_weight_grad,
)


@pytest.fixture(autouse=True)
def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to a reference fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in OPS:
        monkeypatch.setattr(op, "reference", refuse)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed), dtype=dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@FORMATS
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16384, 4096), (4096, 28672), (1008, 80), (7, 33), (1, 1)], ids=str)
def test_casts_equal_the_reference_bit_by_bit(shape, source, dtype):
    # Many magnitudes, so that subnormals and ties are among them.
    x = draw(*shape, dtype=torch.float32) * torch.exp(3 * draw(*shape, seed=1, dtype=torch.float32)).clamp(max=1000)
    x = x.clamp(-60000, 60000).to(source)
    amax = fp8_amax(x)
    assert amax.max() == x.abs().max().float()
    both, rows, turned = (op(x, amax, dtype) for op in (fp8_quantize_both, fp8_quantize, fp8_quantize_transposed))
    # On the CPU: CUDA's division by a number multiplies by its reciprocal, which is off by a bit.
    wanted, scale = (part.cuda() for part in fp8_quantize.reference(x.cpu(), amax.cpu(), dtype))
    assert torch.equal(bits(rows[0]), bits(wanted)) and torch.equal(bits(both[0]), bits(wanted))
    assert torch.equal(bits(turned[0]), bits(wanted).t()) and torch.equal(bits(both[1]), bits(wanted).t())
    assert all(found[-1] == scale for found in (both, rows, turned))


def test_casts_of_more_than_2_to_the_31_elements():
    x = torch.ones(2**19 + 16, 4096, device="cuda", dtype=torch.bfloat16)
    x[-1] = draw(4096)
    amax = fp8_amax(x)
    assert amax.max() == x[-1].abs().max().float()
    x8, x8_turned, _ = fp8_quantize_both(x, amax, E4M3)
    wanted = fp8_quantize.reference(x[-16:].cpu(), amax.cpu(), E4M3)[0].cuda()
    assert torch.equal(bits(x8[-16:]), bits(wanted)) and torch.equal(bits(x8_turned[:, -16:]), bits(wanted).t())


def emulated(x: Tensor, dtype: torch.dtype) -> Tensor:
    x8, scale = fp8_quantize(x, fp8_amax(x), dtype)
    return x8.double() * scale.double()


@SIZES
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(kernels_only, tokens, outputs, inputs, bias):
    x, weight = draw(tokens, inputs).requires_grad_(), (draw(outputs, inputs, seed=1) / 50).requires_grad_()
    b = draw(outputs, seed=2).requires_grad_() if bias else None
    grad = draw(tokens, outputs, seed=3) / 1000
    leaves = [x, weight, *([b] if b is not None else [])]
    out = fp8_linear.fp8_linear(x, weight, b)
    found = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    x8, weight8, grad8 = emulated(x.detach(), E4M3), emulated(weight.detach(), E4M3), emulated(grad, E5M2)
    expected = x8 @ weight8.T + (0 if b is None else b.detach().double())
    # The forward's sums are short of fp32; the gradients' are not, beyond bf16's own rounding.
    print(f"\nforward {relative(out, expected):.2e}", end="")
    assert relative(out, expected) < 2e-2
    wanted = [grad8 @ weight8, grad8.T @ x8, *([grad.double().sum(0)] if bias else [])]
    for got, exact in zip(found, wanted, strict=True):
        print(f" gradient {relative(got, exact):.2e}", end="")
        assert relative(got, exact) < 4e-3
    again = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, c) for a, c in zip(found, again, strict=True))


# The mode that refuses to wait warns once that it is young.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_host(kernels_only):
    x, weight = draw(512, 256).requires_grad_(), draw(128, 256, seed=1).requires_grad_()
    grad = draw(512, 128, seed=2)
    fp8_linear.fp8_linear(x, weight).backward(grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fp8_linear.fp8_linear(x, weight).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_stays_so(kernels_only, place, value):
    tensors = [draw(512, 256), draw(128, 256, seed=1), draw(512, 128, seed=2)]
    tensors[place][100, 77] = value
    x, weight, grad = tensors
    out = fp8_linear.fp8_linear(x.requires_grad_(), weight.requires_grad_())
    out.backward(grad)
    finite = [bool(t.isfinite().all()) for t in (x.grad, weight.grad, out.detach()) if t is not None]
    assert not any(finite[i] for i in range(3) if i != place)


def test_zeros(kernels_only):
    x, weight = torch.zeros_like(draw(512, 256)).requires_grad_(), draw(128, 256, seed=1).requires_grad_()
    out = fp8_linear.fp8_linear(x, weight)
    out.backward(draw(512, 128, seed=2))
    assert not out.any() and weight.grad is not None and not weight.grad.any()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


def test_the_backward_keeps_a_byte_an_element():
    tokens, width, outputs = 16384, 4096, 256
    weight = draw(outputs, width, seed=1).requires_grad_()

    def held() -> tuple[Tensor, int]:
        before = torch.cuda.memory_allocated()
        out = fp8_linear.fp8_linear(draw(tokens, width), weight)
        return out, torch.cuda.memory_allocated() - before - out.numel() * out.element_size()

    held()
    _, size = held()
    assert tokens * width <= size < 1.01 * tokens * width + 2**20


def test_a_decoder_learns_as_in_bf16(kernels_only):
    config = resolve("tiny")[1]
    rows, context = 8, 256
    pattern = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(0))
    tokens = pattern.repeat(rows * context // 32).cuda()
    losses: dict[str, list[float]] = {}
    for dtype in ("bf16", "fp8"):
        model = program.build_model(config, dtype, "cuda").initialize(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[dtype] = []
        for _ in range(20):
            positions = torch.arange(context, device="cuda").repeat(rows)
            with batch.use(batch.Batch.uniform(rows, context, context)):
                loss = model(tokens, positions, Layout((rows, context)), tokens.roll(-1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
    assert losses["bf16"][-1] < 0.65 * losses["bf16"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)
