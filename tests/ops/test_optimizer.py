"""The AdamW class against torch.optim.AdamW: values, storage types, saving and loading, and clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops import adamw as adamw_module
from rooflight.ops.adamw import stochastically_rounded
from rooflight.ops.optimizer import AdamW, adamw, clip_scale, grad_norm, scale_

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=generator).to(dtype).requires_grad_() for n in (5, 2)]


def run(optimizers: list[torch.optim.Optimizer], params: list[list[Tensor]], steps: int, seed: int = 1) -> None:
    """The same random gradients for every copy of the parameters; the second one has none on the first step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for i, copies in enumerate(zip(*params, strict=True)):
            grad = torch.randn(copies[0].shape, generator=generator)
            for param in copies:
                param.grad = None if i == 1 and step == 0 else grad.to(param.dtype)
        for one in optimizers:
            one.step()


def test_bit_equal_to_torch_in_fp32() -> None:
    ours, theirs = parameters(), parameters()
    run([AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS, foreach=False)], [ours, theirs], 6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_masters_of_bf16_parameters_follow_fp32_and_round_into_them() -> None:
    ours, exact = parameters(torch.bfloat16), [p.detach().float().requires_grad_() for p in parameters(torch.bfloat16)]
    kept = AdamW(ours, **SETTINGS, masters=True)
    generator = torch.Generator().manual_seed(1)
    reference = torch.optim.AdamW(exact, **SETTINGS)
    for _ in range(5):
        for a, b in zip(ours, exact, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).bfloat16()
            b.grad = a.grad.float()
        kept.step()
        reference.step()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(kept.state[a]["master"], b.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(a.detach(), kept.state[a]["master"].bfloat16())


@pytest.mark.parametrize(("state_dtype", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_states_come_on_the_first_step_in_their_type(state_dtype: str, dtype: torch.dtype) -> None:
    params = parameters(torch.bfloat16)
    one = AdamW(params, state_dtype=state_dtype)
    assert not one.state
    run([one], [params], 2)
    assert {t.dtype for state in one.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])} == {dtype}
    assert [one.state[p]["step"] for p in params] == [2, 1]


def test_allocated_states_step_as_fresh_ones_do() -> None:
    params, copies = parameters(torch.bfloat16), parameters(torch.bfloat16)
    ahead, fresh = (AdamW(p, **SETTINGS, masters=True) for p in (params, copies))
    ahead.allocate()
    before = [ahead.state[p]["exp_avg"].data_ptr() for p in params]
    assert [ahead.state[p]["step"] for p in params] == [0, 0]
    run([ahead, fresh], [params, copies], 2)
    assert before == [ahead.state[p]["exp_avg"].data_ptr() for p in params]
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_saved_and_loaded_continues_exactly() -> None:
    params, copies = parameters(torch.bfloat16), parameters(torch.bfloat16)
    one = AdamW(params, **SETTINGS, masters=True)
    run([one], [params], 3)
    two = AdamW(copies, **SETTINGS, masters=True)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        for a, b in zip(copies, params, strict=True):
            a.copy_(b)
    assert two.state[copies[0]]["exp_avg"].dtype == torch.float32
    run([one, two], [params, copies], 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    assert two.state[copies[0]]["master"] is not one.state[params[0]]["master"]


def formula(tensors: list[Tensor], scale: float, step: int, lr: float, beta1: float, beta2: float) -> list[Tensor]:
    """AdamW's update of (p, g, m, v) in fp64, with ε 1e-8 and decay 0.1."""
    p, g, m, v = (tensor.double() for tensor in tensors)
    g = scale * g
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return [p - lr * (0.1 * p + m_hat / (v_hat.sqrt() + 1e-8)), m, v]


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, 0.0])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "masters"),
    [
        ("float32", "float32", False),
        ("bfloat16", "bfloat16", False),
        ("float16", "float16", False),
        ("bfloat16", "float32", False),
        ("bfloat16", "float32", True),
        ("bfloat16", "bfloat16", True),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_update_is_the_formula_rounded_once(
    dtype: str, state_dtype: str, masters: bool, scale: float | None, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way a tensor takes: whole, in blocks with a short last one, or with strides unlike the others'."""
    monkeypatch.setattr(adamw_module, "BLOCK", 32)
    kinds = [getattr(torch, name) for name in (dtype, dtype, state_dtype, state_dtype)]
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.rand(13, 7, generator=generator).to(kind)] for kind in kinds]
    if transposed:
        lists[1] = [lists[1][0].t().contiguous().t()]
    kept = [torch.rand(13, 7, generator=generator)] if masters else []
    grad = lists[1][0].clone()
    start = [(kept or lists[0])[0], *(tensors[0] for tensors in lists[1:])]
    factor = torch.tensor(1.0 if scale is None else scale)
    p, m, v = formula(start, factor.item(), 3, 0.1, 0.9, 0.99)
    adamw(*lists, kept, None if scale is None else factor, 3, 0.1, 0.9, 0.99, 1e-8, 0.1, 0)
    found = (*(kept or lists[0]), *lists[2], *lists[3])
    for tensor, exact in zip(found, (p, m, v), strict=True):
        # Half a spacing of the storage type, and fp32's own errors before it.
        half = 0.5 * torch.finfo(tensor.dtype).eps if tensor.dtype != torch.float32 else 0.0
        torch.testing.assert_close(tensor.double(), exact, rtol=half + 1e-6, atol=1e-6)
    if masters:
        assert torch.equal(lists[0][0], kept[0].to(lists[0][0].dtype))
    # A gradient may be left scaled, and nothing else.
    assert torch.equal(lists[1][0], grad) or torch.allclose(lists[1][0], grad * factor, rtol=1e-2)


def test_clipping_as_torch_does() -> None:
    ours, theirs = parameters(), parameters()
    for a, b in zip(ours, theirs, strict=True):
        a.grad = 4 * a.detach()
        b.grad = a.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    grads = [p.grad for p in ours if p.grad is not None]
    found = grad_norm(grads)
    torch.testing.assert_close(found, norm)
    scaled = [grad.clone() for grad in grads]
    scale_(scaled, clip_scale(found, 1.0))
    for a, b in zip(scaled, theirs, strict=True):
        torch.testing.assert_close(a, b.grad)
    # Folded into the update instead, it is the same step.
    AdamW(ours, **SETTINGS).step(scale=clip_scale(found, 1.0))
    torch.optim.AdamW(theirs, **SETTINGS).step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_a_norm_that_is_not_finite_gives_a_scale_that_is_not(norm: float, max_norm: float) -> None:
    assert clip_scale(torch.tensor(norm), max_norm).isnan()
    assert clip_scale(torch.tensor(7.0), max_norm) == (1.0 if max_norm in (0.0, math.inf) else pytest.approx(1 / 7))


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_max_norm_that_is_none_is_refused(max_norm: float) -> None:
    with pytest.raises(InvalidValue, match=f"max_norm {max_norm}"):
        clip_scale(torch.tensor(1.0), max_norm)


@pytest.mark.parametrize(
    ("dtype", "masters"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_a_step_called_off_and_rewound_never_was(dtype: torch.dtype, masters: bool) -> None:
    params, copies = parameters(dtype), parameters(dtype)
    one, other = AdamW(params, **SETTINGS, masters=masters), AdamW(copies, **SETTINGS, masters=masters)
    run([one, other], [params, copies], 2)
    before = [p.detach().clone() for p in params]
    one.step(scale=torch.tensor(math.nan), seed=4)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert [one.state[p]["step"] for p in params] == [3, 2]
    one.rewind()
    one.rewind()
    assert [one.state[p]["step"] for p in params] == [2, 1]
    run([one, other], [params, copies], 2, seed=2)
    for a, b in zip(params, copies, strict=True):
        assert torch.equal(a, b)
        for name, value in one.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[b][name])), name


def test_gradients_given_apart_take_the_place_of_those_on_the_parameters() -> None:
    params, copies = parameters(torch.bfloat16), [p.detach().float() for p in parameters(torch.bfloat16)]
    exact = [p.requires_grad_() for p in copies]
    sums = {p: torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(params)}
    params[0].grad = torch.full_like(params[0], math.nan)
    for copy, grad in zip(exact, sums.values(), strict=True):
        copy.grad = grad
    ours = AdamW(params, **SETTINGS, masters=True)
    ours.step(grads=sums)
    torch.optim.AdamW(exact, **SETTINGS).step()
    for p, copy in zip(params, exact, strict=True):
        torch.testing.assert_close(ours.state[p]["master"], copy.detach(), rtol=1e-6, atol=1e-6)
    before = params[1].detach().clone()
    ours.step(grads={params[0]: sums[params[0]]})
    assert torch.equal(params[1], before) and [ours.state[p]["step"] for p in params] == [2, 1]
    with pytest.raises(InvalidValue, match=r"\(3, 5\) is given for a parameter of shape \(5, 3\)"):
        ours.step(grads={params[0]: sums[params[0]].t()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_gives_a_neighbour(dtype: torch.dtype) -> None:
    info, draws = torch.finfo(dtype), 4096
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(16, generator=generator) * torch.logspace(-7 if dtype == torch.float16 else -39, 4, 16)
    value[0], value[1] = info.max, -value[1].to(dtype).float()  # held exactly
    found = stochastically_rounded(value.expand(draws, -1).contiguous(), dtype, generator)
    near = value.to(dtype)
    bits = near.view(torch.int16)
    away = (bits + 1).view(dtype)
    toward = torch.where(near == 0, -away, (bits - 1).view(dtype))
    same = (found == near) | (found == away) | (found == toward)
    assert same.all() and torch.equal(found[:, :2], near[:2].expand(draws, -1))
    spacing = (away.double() - near.double()).abs().nan_to_num(0)
    # The mean of n draws strays by half a spacing over √n; five times that for 16 values.
    error = (found.double().mean(0) - value.double()).abs()
    assert (error[1:] <= 2.5 * spacing[1:] / draws**0.5).all()


def test_stochastic_rounding_leaves_what_is_not_finite_and_rounds_beyond_the_range_to_nearest() -> None:
    value = torch.tensor([math.inf, -math.inf, math.nan, 65519.0, 65520.0, -70000.0, 0.0])
    for seed in range(20):
        found = stochastically_rounded(value, torch.float16, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found, value.half(), rtol=0, atol=0, equal_nan=True)
    assert stochastically_rounded(torch.tensor([3.3e38]), torch.bfloat16, torch.Generator()).isfinite().all()


def test_a_seed_moves_weights_that_rounding_to_nearest_keeps_and_repeats_itself() -> None:
    def stepped(seed: int) -> Tensor:
        param = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
        optimizer = AdamW([param], lr=1e-4, weight_decay=0.0)
        for step in range(4):
            param.grad = torch.ones_like(param)
            optimizer.step(seed=seed and seed + step)
        return param.detach()

    assert torch.equal(stepped(0), torch.ones(4096, dtype=torch.bfloat16))
    found = stepped(1)
    # Each of four steps is 1e-4 down, a fortieth of the spacing of 2⁻⁸ below 1.
    assert float(found.float().mean()) == pytest.approx(1 - 4e-4, abs=5 * 2**-8 * (0.1 / 4096) ** 0.5)
    assert torch.equal(found, stepped(1)) and not torch.equal(found, stepped(9))


def test_second_moments_in_bf16_decay_only_with_a_seed() -> None:
    def decayed(seed: int) -> float:
        param = torch.zeros(4096, dtype=torch.bfloat16, requires_grad=True)
        optimizer = AdamW([param], betas=(0.9, 0.999), state_dtype="bf16")
        optimizer.allocate()
        optimizer.state[param]["exp_avg_sq"].fill_(1.0)
        for step in range(50):
            param.grad = torch.zeros_like(param)
            optimizer.step(seed=seed and seed + step)
        return float(optimizer.state[param]["exp_avg_sq"].float().mean())

    assert decayed(0) == 1.0
    assert decayed(3) == pytest.approx(0.999**50, abs=0.003)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"betas": (0.9, 1.0)}, "beta2 1.0"),
        ({"eps": float("nan")}, "eps nan"),
        ({"state_dtype": "fp8"}, "'fp8' is unknown; use one of fp32, bf16"),
    ],
)
def test_bad_settings_are_refused_by_name(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        AdamW(parameters(), **bad)
