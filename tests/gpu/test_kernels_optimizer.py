"""The optimizer's and the fused loss's kernels on a GPU, through their Ops, against fp64 at real sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rooflight.ops import fused_loss
from rooflight.ops.adamw import adamw
from rooflight.ops.clipping import clip_scale, grad_norm, scale_
from rooflight.ops.fused_loss import linear_cross_entropy
from rooflight.ops.loss import IGNORE
from rooflight.ops.optimizer import AdamW
from tests.ops import formulas

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPS = (
    adamw,
    clip_scale,
    grad_norm,
    scale_,
    fused_loss.linear_cross_entropy_loss,
    fused_loss.linear_cross_entropy_with_grad,
    fused_loss.linear_cross_entropy_backward,
)
SHAPES = [(2048,), (8192, 2048), (3, 5), (0,), (50257, 768), (1,)]
HYPER = (3, 0.01, 0.9, 0.95, 1e-8, 0.1)
TOLERANCE = {FP32: 3e-6, FP16: 1.5e-3, BF16: 1e-2}
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels_only")]


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that falls back to a reference fails: the kernel is what is tested. Fresh memory holds NaN."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in OPS:
        monkeypatch.setattr(op, "reference", refuse)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kw: _poisoned(empty(self, *args, **kw)))


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x


def draw(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    error = (found.double() - wanted).abs()
    assert not found.isnan().any()
    assert (error <= TOLERANCE[found.dtype] * (wanted.abs() + 0.1)).all(), float(error.max())


@pytest.mark.parametrize(
    ("param", "grad", "moment", "square", "masters"),
    [
        (FP32, FP32, FP32, FP32, False),
        (BF16, BF16, BF16, BF16, False),
        (BF16, BF16, FP32, FP32, False),
        (BF16, FP32, FP32, FP32, True),
        (FP16, FP32, BF16, FP32, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [None, 0.3, math.nan])
def test_adamw(param: Any, grad: Any, moment: Any, square: Any, masters: bool, scale: float | None) -> None:
    roles = [[draw(*s, dtype=d, seed=i) for s in SHAPES] for i, d in enumerate((param, grad, moment, square))]
    roles[3] = [v.abs() for v in roles[3]]
    lists = [*roles, [p.float() for p in roles[0]] if masters else []]
    p, g, m, v, fp32 = ([t.double() for t in tensors] for tensors in lists)
    factor = None if scale is None else torch.tensor(scale, device="cuda")
    if scale is None or math.isfinite(scale):
        formulas.adamw(p, [(scale or 1.0) * x for x in g], m, v, fp32, *HYPER)
    again = [[t.clone() for t in tensors] for tensors in lists]
    adamw(*lists, factor, *HYPER, 0)
    adamw(*again, factor, *HYPER, 0)
    for found, wanted, same in zip(lists, (p, g, m, v, fp32), again, strict=True):
        for a, b, c in zip(found, wanted, same, strict=True):
            close(a, b)
            assert torch.equal(a, c)
            if scale is not None and math.isnan(scale):
                assert torch.equal(a.double(), b)


def test_tensors_off_16_bytes() -> None:
    """A view that starts where no vector load may: the whole call then loads element by element."""
    lists = [[draw(70001, seed=i).abs()[1:]] for i in range(4)]
    p, g, m, v = ([t.double() for t in tensors] for tensors in lists)
    adamw(*lists, [], None, *HYPER, 0)
    formulas.adamw(p, g, m, v, [], *HYPER)
    for found, wanted in zip(lists, (p, g, m, v), strict=True):
        close(found[0], wanted[0])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stochastic_rounding_is_unbiased_and_repeats_itself(dtype: torch.dtype) -> None:
    spacing, size = (2.0**-8 if dtype == BF16 else 2.0**-11), 10_000_019

    def decayed(seed: int) -> Tensor:
        params, none = [torch.ones(size, device="cuda", dtype=dtype)], [torch.zeros(size, device="cuda")]
        adamw(params, none, [none[0].clone()], [none[0].clone()], [], None, 1, 1.0, 0.9, 0.9, 1.0, 0.3 * spacing, seed)
        return params[0]

    found = decayed(5)
    assert found.unique().tolist() == [1.0 - spacing, 1.0]
    down = (found < 1).double()
    assert float(down.mean()) == pytest.approx(0.3, abs=5 * (0.21 / size) ** 0.5)
    half = size // 2
    assert abs(float(((down[:half] - 0.3) * (down[half : 2 * half] - 0.3)).mean() / 0.21)) < 5 / half**0.5
    assert torch.equal(found, decayed(5)) and not torch.equal(found, decayed(2**40 + 5))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_norm_clip_and_scale(dtype: torch.dtype) -> None:
    grads = [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
    norm = grad_norm(grads)
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    assert float(norm) == pytest.approx(float(exact), rel=2e-6)
    assert torch.equal(norm, grad_norm(grads))
    factor = clip_scale(norm, 1.0)
    assert float(factor) == pytest.approx(1 / float(exact), rel=1e-5)
    wanted = [g.double() * factor for g in grads]
    scale_(grads, factor)
    for a, b in zip(grads, wanted, strict=True):
        close(a, b)
    grads[1][5, 5] = math.inf
    assert clip_scale(grad_norm(grads), 1.0).isnan()


def test_gradients_that_move_and_rates_that_change_compile_nothing_new() -> None:
    from rooflight.ops.kernels.optimizer import adamw_kernel

    params = [draw(*shape).requires_grad_() for shape in SHAPES if math.prod(shape)]
    optimizer = AdamW(params, state_dtype="bf16")
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        held = [torch.empty(1000 * step + 1, device="cuda")]
        for i, param in enumerate(params):
            param.grad = draw(*param.shape, seed=100 * step + i)
        optimizer.step(scale=torch.tensor(0.5, device="cuda"), seed=step + 1)
        kernels = sum(len(cache[0]) for cache in adamw_kernel.device_caches.values())
        if step == 1:
            before = kernels
        assert step < 2 or kernels == before
        del held


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width", "softcap", "budget"),
    [
        (4096, 32000, 512, 0.0, 2**30),  # one chunk
        (4000, 50257, 256, 0.0, 2**27),  # several, rows padded, the last chunk short
        (1000, 128256, 256, 30.0, 2**26),
        (77, 101, 64, 0.0, 2**30),
    ],
)
@pytest.mark.parametrize("count", [0, 9999])
def test_fused_loss(
    tokens: int,
    vocabulary: int,
    width: int,
    softcap: float,
    budget: int,
    count: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_loss, "LOGITS_BYTES", budget)
    x_TD = draw(tokens, width, dtype=dtype).requires_grad_()
    weight_VD = (draw(vocabulary, width, seed=1) * width**-0.5).to(dtype).requires_grad_()
    targets_T = torch.randint(0, vocabulary, (tokens,), device="cuda")
    targets_T[::7] = IGNORE
    targets_T[3] = vocabulary - 1
    loss = linear_cross_entropy(x_TD, weight_VD, targets_T, softcap, IGNORE, count)
    found = torch.autograd.grad(loss * 0.7, (x_TD, weight_VD))
    x, weight = x_TD.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_()
    z_TV = x @ weight.t()
    z_TV = softcap * torch.tanh(z_TV / softcap) if softcap else z_TV
    wanted = cross_entropy(z_TV, targets_T, reduction="sum", ignore_index=IGNORE)
    wanted = wanted / (count or (targets_T != IGNORE).sum())
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5 if dtype == FP32 else 1e-3)
    for a, b in zip(found, torch.autograd.grad(wanted * 0.7, (x, weight)), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert a.dtype == dtype and error < (1e-5 if dtype == FP32 else 1.5e-2)
        # Rounding errors of all elements together: far smaller than the worst one.
        assert (a.double() - b).norm() / b.norm() < (1e-5 if dtype == FP32 else 6e-3)
    again = linear_cross_entropy(x_TD, weight_VD, targets_T, softcap, IGNORE, count)
    assert torch.equal(loss, again)
    same = torch.autograd.grad(again * 0.7, (x_TD, weight_VD))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    with torch.no_grad():
        # Without a gradient the kernel's blocks are smaller, and so the order of its sums is another.
        alone = linear_cross_entropy(x_TD, weight_VD, targets_T, softcap, IGNORE, count)
        torch.testing.assert_close(alone, loss.detach(), rtol=2e-6, atol=0)


def test_the_fused_loss_holds_what_its_price_says() -> None:
    x_TD, weight_VD = draw(16384, 1024).requires_grad_(), (draw(128256, 1024) / 32).requires_grad_()
    targets_T = torch.randint(0, 128256, (16384,), device="cuda")
    op = fused_loss.linear_cross_entropy_with_grad
    args = (x_TD.detach(), weight_VD.detach(), targets_T)
    cost = op.price(op(*args), *args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, grad_x, grad_weight = op(*args)
    # Logits and the fp32 sum, beside the gradient of x; or, at the end, the sum beside both gradients.
    made = sum(t.nbytes for t in (grad_x, grad_weight))
    held = torch.cuda.max_memory_allocated() - before
    assert held <= made + cost.workspace + 2**20
    assert held >= grad_x.nbytes + cost.workspace
    assert loss.isfinite()
