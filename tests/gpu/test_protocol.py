"""Every operation that has a kernel, held to FlashAttention's protocol on a GPU, over odd, empty and extreme inputs.

The error against fp64 is at most twice that of torch's own arithmetic (the reference) in the same type; two runs give
equal bits; fresh memory holds NaN. The calls are those of `tests/ops/cases*`, tiny and odd, and the larger ones below;
what an operation leaves to its reference is left out. Real shapes stand in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rooflight.ops.op import Op
from tests.ops import formulas as f
from tests.ops.case import Draw
from tests.ops.cases import CASES, OPS
from tests.ops.kernels.oracle import FORMULAS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
DEVICE = "cuda"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=lambda dtype: str(dtype).removeprefix("torch."))
# Rounding of the result alone, where torch's own error happens to be none.
FLOOR = {FP32: 5e-6, FP16: 6e-4, BF16: 5e-3}
KERNELS = {name: op for name, op in OPS.items() if op.kernel is not None}
EPS = 1e-5
Args = tuple[Any, ...]


def _on_device(args: Any) -> Any:
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, args)


def _copy(args: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def _double(args: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, args)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN. Only a warning where torch itself has no deterministic way."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    settings.fill_uninitialized_memory = before[1]


def run(op: Op, function: Callable[..., Any], args: Args, mutates: tuple[int, ...] = ()) -> list[Tensor]:
    """Tensors that a call gives or, in place, leaves; on a copy of the arguments."""
    args = _copy(args)
    with torch.no_grad():
        out = function(*args)
    return _tensors([args[i] for i in mutates] if mutates else out)


def takes(op: Op, args: Args) -> bool:
    call = op.signature.bind(*args)
    call.apply_defaults()
    return op.kernel_takes is None or op.kernel_takes(*call.arguments.values())


def by_kernel(op: Op, args: Args, mutates: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The operation through the dispatcher, the reference out of reach; twice, to the bit."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    with monkeypatch.context() as patch:
        patch.setattr(op, "reference", refuse)
        first, again = (run(op, op, args, mutates) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)), "two runs differ"
    return first


def check(op: Op, args: Args, exact: list[Tensor], monkeypatch: pytest.MonkeyPatch, mutates: Any = ()) -> None:
    own, found = run(op, op.reference, args, mutates), by_kernel(op, args, mutates, monkeypatch)
    assert len(found) == len(own) == len(exact)
    for made, plain, wanted in zip(found, own, exact, strict=True):
        assert made.shape == plain.shape and made.dtype == plain.dtype
        if not made.is_floating_point():
            assert torch.equal(made, plain)
        elif made.numel():
            floor = FLOOR.get(made.dtype, 0.13)  # else fp8, with three or two bits of mantissa
            made, plain, wanted = made.double(), plain.double(), wanted.double().to(made.device)
            assert torch.equal(made.isnan(), wanted.isnan()), "NaN"
            error, theirs = ((x - wanted).abs().nan_to_num(0.0).max() for x in (made, plain))
            allowed = 2 * theirs + floor * wanted.abs().nan_to_num(0.0).max()
            assert error <= allowed, f"{error:.2e} against {theirs:.2e} of torch's own"


@DTYPES
@pytest.mark.parametrize("case", [c for c in CASES if c.name in KERNELS and c.formula and not c.collective], ids=str)
def test_tiny(case, dtype, poisoned, monkeypatch):
    op, args = KERNELS[case.name], case.args(Draw(dtype))
    if not takes(op, _on_device(args)):
        pytest.skip("left to the reference")
    wanted = _double(_copy(args))
    out = case.formula(*wanted)
    exact = _tensors([wanted[i] for i in case.mutates] if case.mutates else out)
    check(op, _on_device(args), exact, monkeypatch, case.mutates)


def r(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 13 * len(shape))).to(dtype)


def _norms(rows: int, width: int, d: torch.dtype, size: float = 1.0) -> dict[str, Args]:
    x, y, g = (size * r(rows, width, dtype=d, seed=i) for i in range(3))
    w, b = r(width, dtype=d, seed=3), r(width, dtype=d, seed=4)
    return {
        "rms_norm": (x, w, EPS, 1.0),
        "add_rms_norm": (x, y, w, EPS, 0.0),
        "rms_norm_backward": (g, y, x, w, EPS, 0.0),
        "layer_norm": (x, w, b, EPS),
        "add_layer_norm": (x, y, w, b, EPS),
        "layer_norm_backward": (g, y, x, w, EPS),
    }


def _elementwise(rows: int, width: int, d: torch.dtype, size: float = 1.0) -> dict[str, Args]:
    x, g = (size * r(rows, width, dtype=d, seed=i) for i in range(2))
    gate_up = size * r(rows, 2 * width, dtype=d, seed=2)
    scores = size * r(1, 2, rows, width, dtype=d)
    probs = scores.float().softmax(-1).to(d)
    return {
        "activation": (x, "gelu_tanh"),
        "activation_backward": (g, x, "gelu"),
        "gated_activation": (gate_up, "silu"),
        "gated_activation_backward": (g, gate_up, "silu"),
        "attention_softmax": (scores, False, 0, 0.0, None),
        "attention_softmax_backward": (scores, probs, None, 0.0, False),
    }


def _swiglu_backward(grad: Tensor, gate_up: Tensor, *_: str) -> Tensor:
    """Written out: autograd of x/(1 + e^−x) is no number where e^−x overflows."""
    (gate, up), one = gate_up.chunk(2, -1), torch.sigmoid(gate_up.chunk(2, -1)[0])
    return torch.cat((grad * up * one * (1 + gate * (1 - one)), grad * gate * one), -1)


MORE: dict[str, Any] = FORMULAS | {
    "gated_activation_backward": _swiglu_backward,
    "attention_softmax": lambda s, *_: s.softmax(-1),
    "attention_softmax_backward": lambda g, p, *_: (p * (g - (p * g).sum(-1, keepdim=True)), g.new_zeros(0)),
}


def _each(calls: dict[str, Args], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, args in calls.items():
        op, args = OPS[name], _on_device(args)
        assert takes(op, args), name
        try:
            check(op, args, _tensors(MORE[name](*_double(args))), monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (3, 80), (257, 1000), (130, 4099), (5, 16384), (7, 20001)])
def test_odd_sizes(rows, width, dtype, poisoned, monkeypatch):
    _each(_norms(rows, width, dtype) | _elementwise(rows, width, dtype), monkeypatch)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_values(size, dtype, poisoned, monkeypatch):
    _each(_norms(33, 1000, dtype, size) | _elementwise(33, 1000, dtype, size), monkeypatch)
    _each(_norms(3, 17000, dtype, size), monkeypatch)


@DTYPES
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_shows_where_torch_shows_it(value, dtype, poisoned, monkeypatch):
    """In its own row and no other; gradients of weights, to which every row adds, apart."""
    calls = _norms(9, 300, dtype) | _elementwise(9, 300, dtype)
    for name, args in calls.items():
        args[0].view(-1, args[0].shape[-1])[4, 7] = value
        op, args = OPS[name], _on_device(args)
        found, own = by_kernel(op, args, (), monkeypatch), run(op, op.reference, args)
        for made, plain in zip(found, own, strict=True):
            assert torch.equal(made.isfinite(), plain.isfinite()), name


def _rotary_args(rows: int, d: torch.dtype) -> Args:
    return r(rows, 4, 64, dtype=d), r(rows, 2, 64, dtype=d), r(rows, 32), r(rows, 32), False, False


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_no_rows(dtype, poisoned):
    """Nothing in, nothing out, and gradients of weights that are zero."""
    calls = _norms(0, 64, dtype) | _elementwise(0, 64, dtype)
    calls |= {
        "rotary": _rotary_args(0, dtype),
        "rotary_qkv": (r(0, 512, dtype=dtype), r(0, 32), r(0, 32), 4, 2, False),
        "rotary_qkv_backward": (*(r(0, h, 64, dtype=dtype) for h in (4, 2, 2)), r(0, 32), r(0, 32), False),
        "embedding_backward": (r(0, 64, dtype=dtype), torch.zeros(0, dtype=torch.int64), 9, 1.0),
        "greedy": (r(0, 99, dtype=dtype),),
        "sample_plain": (r(0, 99, dtype=dtype), r(0).double(), r(0).double()),
        "linear": (r(0, 64, dtype=dtype), r(48, 64, dtype=dtype), None),
    }
    for name, args in calls.items():
        args = _on_device(args)
        found, own = run(OPS[name], OPS[name], args), run(OPS[name], OPS[name].reference, args)
        for made, plain in zip(found, own, strict=True):
            assert made.shape == plain.shape and torch.equal(made, plain), name


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 130, 1027])
def test_rotary_and_its_inverse(rows, dtype, poisoned, monkeypatch):
    for interleaved in (False, True):
        for inverse in (False, True):
            args = _on_device((*_rotary_args(rows, dtype)[:4], interleaved, inverse))
            check(OPS["rotary"], args, _tensors(f.rotary(*_double(args))), monkeypatch)


def test_every_operation_with_a_kernel_has_a_case():
    """So that `test_tiny` leaves none out, but those whose case says where they are tested."""
    assert not set(KERNELS) - {case.name for case in CASES if (case.formula or case.why) and not case.collective}
