"""The flash attention kernels under the interpreter, outputs and gradients, against fp64 over a mask.

The interpreter multiplies no bf16 matrices: that type is tested on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops.attention import choice
from rooflight.ops.kernels import flash_hopper_plan
from rooflight.ops.kernels.flash_tile import Plan

from .flash_oracle import Setup, Tensors, arguments, build, drawn, exact
from .oracle import bits_equal

# Tiles of other lengths and more than one of each, so that whole and masked ones meet.
SMALL = Plan(16, 16, 4, 2), (Plan(16, 32, 4, 2), Plan(32, 16, 4, 2))


def assert_close(found: Any, wanted: Any) -> None:
    """Within roundings of fp32; gradients of a row that sees a single key are noise about 0."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.is_contiguous() and not a.isnan().any()
        if a.numel():
            assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


def run(interpret: Any, setup: Setup, tensors: Tensors, plans: Any = SMALL) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and gradients of q, k, v and of sinks where there are any."""
    forward, backward = plans
    name = "packed_attention" if setup.documents else "attention"
    args = arguments(setup, tensors)
    out, lse = interpret(f"flash_forward.{name}", *args, forward)
    inputs = (tensors.grad, *args[:3], out, lse, *args[3:])
    *grads, sinks = interpret(f"flash_backward.{name}_backward", *inputs, backward)
    assert (tensors.sinks is None) == (not sinks.numel())
    return out, lse, *grads, *([] if tensors.sinks is None else [sinks])


def check(interpret: Any, setup: Setup, seed: int = 0) -> None:
    tensors = build(setup, seed=seed)
    assert_close(run(interpret, setup, tensors), exact(setup, tensors))


@pytest.mark.parametrize("seed", range(40))
def test_drawn_cases(interpret, seed):
    check(interpret, drawn(seed), seed=seed)


@pytest.mark.parametrize("documents", [(), (30, 0, 1, 47)], ids=["dense", "packed"])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(0, 0.0, False), (20, 2.0, True)])
def test_half_precision(interpret, window, softcap, sinks, documents):
    setup = Setup(50, 50, documents=documents, window=window, softcap=softcap, sinks=sinks)
    tensors = build(setup, torch.float16)
    # Probabilities are rounded before their products, and so are the scores' gradients.
    for found, wanted in zip(run(interpret, setup, tensors), exact(setup, tensors), strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() < 2e-3


@pytest.mark.parametrize("window", [1, 15, 16, 17, 31, 32, 33, 48, 79, 80])
@pytest.mark.parametrize("keys", [80, 96])
def test_windows_that_end_on_and_beside_a_tile(interpret, window, keys):
    check(interpret, Setup(80, keys, window=window, batch=1, heads=2, key_heads=1))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 63, 64, 65])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_that_end_on_and_beside_a_tile(interpret, length, causal):
    check(interpret, Setup(length, length, causal=causal, batch=1, heads=2, key_heads=2))


def test_documents_that_end_on_and_beside_a_tile(interpret):
    check(interpret, Setup(documents=(16, 15, 1, 32, 0, 0, 33, 31, 64), heads=2, key_heads=1))


def test_more_documents_than_are_searched_together(interpret):
    check(interpret, Setup(documents=(1, 0) * 5 + (5,) + (0,) * 130 + (2, 0), heads=1, key_heads=1))


def test_rows_without_a_key_are_zeros(interpret):
    """More queries than keys: the first stand before them all."""
    setup = Setup(50, 20, batch=1)
    tensors = build(setup)
    out, lse, dq, dk, dv = run(interpret, setup, tensors)
    assert not out[:, :30].any() and not dq[:, :30].any() and (lse[..., :30] == float("-inf")).all()
    rest = Setup(20, 20, batch=1)
    alone = Tensors(tensors.q[:, 30:], tensors.k, tensors.v, tensors.grad[:, 30:], None)
    assert_close(
        (out[:, 30:].contiguous(), lse[..., 30:].contiguous(), dq[:, 30:].contiguous(), dk, dv),
        exact(rest, alone),
    )


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(interpret, queries, keys):
    setup = Setup(queries, keys, causal=False)
    out, lse, *grads = run(interpret, setup, build(setup))
    assert not out.any() and (lse == float("-inf")).all() and not any(grad.any() for grad in grads)


def test_gradients_that_are_expanded_or_transposed(interpret):
    setup = Setup(20, 20)
    tensors = build(setup)
    for grad in (torch.ones(()).expand_as(tensors.grad), tensors.grad.transpose(1, 2).contiguous().transpose(1, 2)):
        other = Tensors(tensors.q, tensors.k, tensors.v, grad, None)
        assert_close(run(interpret, setup, other), exact(setup, other))


def test_deterministic(interpret):
    setup = Setup(40, 40, batch=1, sinks=True)
    tensors = build(setup)
    assert bits_equal(run(interpret, setup, tensors), run(interpret, setup, tensors))


def test_plans_of_a_gpu(interpret):
    """What runs there, without plans of the test's own."""
    for head_dim, value_dim in ((64, 64), (192, 128)):
        setup = Setup(70, 70, batch=1, heads=1, key_heads=1, head_dim=head_dim, value_dim=value_dim, scale=0.1)
        tensors = build(setup)
        assert_close(run(interpret, setup, tensors, (None, None)), exact(setup, tensors))


def name_of(setup: Setup, dtype: torch.dtype = torch.bfloat16) -> str | None:
    kernel = choice.chosen(choice.PACKED if setup.documents else choice.DENSE, *arguments(setup, build(setup, dtype)))
    return None if kernel is None else kernel.name


def dense(head_dim: int = 64, value_dim: int = 64, **changes: Any) -> Setup:
    return Setup(**{"queries": 9, "keys": 9, "head_dim": head_dim, "value_dim": value_dim, **changes})


def test_which_kernel_computes_which_call():
    assert name_of(dense(128, 128)) == "cuDNN"
    assert name_of(dense()) == name_of(dense(window=9)) == name_of(dense(causal=False, keys=5)) == "cuDNN"
    # Without a causal mask there is no window.
    assert name_of(dense(causal=False, window=3)) == "cuDNN"
    assert name_of(dense(window=8)) == name_of(dense(256, 256)) == "FlashAttention-2"
    for setup in (dense(softcap=2.0), dense(sinks=True), dense(192, 128), dense(keys=11), dense(20, 20)):
        assert name_of(setup) == "Triton"
    assert name_of(dense(), torch.float32) == "Triton"
    assert name_of(dense(264, 264)) is name_of(dense(), torch.float64) is None
    assert name_of(dense(documents=(4, 5), sinks=True)) == "FlashAttention-2"
    assert name_of(dense(documents=(4, 5), softcap=2.0)) == name_of(dense(64, 128, documents=(4, 5))) == "Triton"
    assert name_of(dense(documents=(4, 5)), torch.float32) == "Triton"
    assert name_of(dense(264, 264, documents=(4, 5))) is None


def test_on_hopper_heads_of_128_channels_run_in_its_own_forward(monkeypatch):
    monkeypatch.setattr(flash_hopper_plan, "is_hopper", lambda device: True)
    wide = dense(128, 128)
    for setup in (wide, dense(128, 128, window=9), dense(128, 128, causal=False, keys=5)):
        assert name_of(setup) == "Hopper"
    assert name_of(dense(128, 128, window=8)) == "Triton, windows"
    assert name_of(wide, torch.float32) == name_of(dense(128, 128, softcap=2.0)) == "Triton"
    assert name_of(dense()) == "cuDNN"


def test_a_kernel_without_a_backward_leaves_it_to_one_below():
    def made_by(name: str) -> Any:
        return lambda *args: name

    def always(*args: Any) -> bool:
        return True

    table = (
        choice.Kernel("first", "", always, made_by("out"), None),
        choice.Kernel("second", "", always, made_by("other"), made_by("gradients")),
        choice.Kernel("third", "", always, made_by("other"), made_by("the same gradients"), repeatable=True),
    )
    _, forward, takes_backward, backward = choice._entries(table)
    args = arguments(dense(), build(dense()))
    given = args[0], *args[:3], args[0], args[0], *args[3:]
    assert forward(*args) == "out" and takes_backward(*given) and backward(*given) == "gradients"
    torch.use_deterministic_algorithms(True)
    try:
        assert takes_backward(*given) and backward(*given) == "the same gradients"
    finally:
        torch.use_deterministic_algorithms(False)
