"""The AdamW class against torch.optim.AdamW: values, storage types, saving and loading, and clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops import optimizer
from rooflight.ops.optimizer import AdamW, grad_norm, scale_

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


def test_torchs_fused_kernel_agrees_with_the_reference() -> None:
    def lists() -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        return [[torch.rand(n, generator=generator) for n in (40, 7)] for _ in range(4)]

    ours, fused = lists(), lists()
    assert optimizer._fused_takes(*fused, [])
    assert not optimizer._fused_takes(*fused, fused[0])
    for update, tensors in ((optimizer._adamw, ours), (optimizer._fused_adamw, fused)):
        params, grads, means, squares = tensors
        update(params, grads, means, squares, [], 3, 0.1, 0.9, 0.99, 1e-8, 0.1)
    torch.testing.assert_close(fused, ours, rtol=1e-5, atol=1e-6)


def test_clipping_as_torch_does() -> None:
    ours, theirs = parameters(), parameters()
    for a, b in zip(ours, theirs, strict=True):
        a.grad = 4 * a.detach()
        b.grad = a.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    grads = [p.grad for p in ours if p.grad is not None]
    found = grad_norm(grads)
    torch.testing.assert_close(found, norm)
    scale_(grads, 1.0 / (found + 1e-6))
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a, b.grad)


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
