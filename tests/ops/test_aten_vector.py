"""Elementwise work, reductions, norms and optimizers against arithmetic that counts itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rooflight.ops.cost import Access, Cost, Movement, Primitive
from tests.priced import Recording, price_call, price_module, recording


class Number:
    """A number that counts the operations done with it: one for an arithmetic operation or a transcendental."""

    operations = 0

    def __init__(self, value: float):
        self.value = value

    def _by(self, value: float) -> Number:
        Number.operations += 1
        return Number(value)

    def __add__(self, other: Number | float) -> Number:
        return self._by(self.value + _value(other))

    def __sub__(self, other: Number | float) -> Number:
        return self._by(self.value - _value(other))

    def __rsub__(self, other: float) -> Number:
        return self._by(other - self.value)

    def __mul__(self, other: Number | float) -> Number:
        return self._by(self.value * _value(other))

    def __truediv__(self, other: Number | float) -> Number:
        return self._by(self.value / _value(other))

    def __rtruediv__(self, other: float) -> Number:
        return self._by(other / self.value)

    def __neg__(self) -> Number:
        return self._by(-self.value)

    def exp(self) -> Number:
        return self._by(math.exp(self.value))

    def sqrt(self) -> Number:
        return self._by(math.sqrt(self.value))

    def erf(self) -> Number:
        return self._by(math.erf(self.value))

    def tanh(self) -> Number:
        return self._by(math.tanh(self.value))

    def maximum(self, other: Number) -> Number:
        return self._by(max(self.value, other.value))


def _value(x: Number | float) -> float:
    return x.value if isinstance(x, Number) else x


def _count(run: Callable[[], object]) -> int:
    Number.operations = 0
    run()
    return Number.operations


def sigmoid(x: Number) -> Number:
    return 1 / ((-x).exp() + 1)


def gelu_tanh(x: Number) -> Number:
    return x * 0.5 * (((x + x * x * x * 0.044715) * 0.79788).tanh() + 1)


UNARY: list[tuple[Callable[..., torch.Tensor], Callable[[Number], Number]]] = [
    (torch.exp, lambda x: x.exp()),
    (torch.neg, lambda x: -x),
    (torch.sigmoid, sigmoid),
    (F.silu, lambda x: x * sigmoid(x)),
    (F.gelu, lambda x: x * 0.5 * ((x * 0.70711).erf() + 1)),
    (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh),
    (lambda x: torch.add(x, x, alpha=2.5), lambda x: x + x * 2.5),
    (lambda x: torch.addcmul(x, x, x, value=0.5), lambda x: x + x * x * 0.5),
    (lambda x: torch.lerp(x, x, 0.3), lambda x: x + (x - x) * 0.3),
]


@pytest.mark.parametrize(("call", "scalar"), UNARY)
def test_elementwise_equals_self_counting_arithmetic(
    call: Callable[..., torch.Tensor], scalar: Callable[[Number], Number]
) -> None:
    (_, cost), *others = price_call(call, (3, 5)).calls
    assert not others
    assert cost.total_flops == 15 * _count(lambda: scalar(Number(0.5)))
    # The same tensor given twice is read once.
    assert (cost.bytes_read, cost.bytes_written) == (60, 60)
    assert (cost.primitive, cost.curve) == (Primitive.ELEMENTWISE, "elementwise")


def _total(terms: list[Number]) -> Number:
    total = Number(0.0)
    for term in terms:
        total = total + term
    return total


def _softmax(row: list[Number]) -> list[Number]:
    largest = Number(-math.inf)
    for x in row:
        largest = largest.maximum(x)
    exps = [(x - largest).exp() for x in row]
    total = _total(exps)
    return [e / total for e in exps]


def _layer_norm(row: list[Number]) -> list[Number]:
    mean = Number(_total(row).value / len(row))
    centred = [x - mean for x in row]
    variance = _total([x * x for x in centred]).value / len(row)
    return [x * (variance + 1e-5) ** -0.5 * 1.5 + 0.5 for x in centred]


def test_softmax_and_layer_norm_equal_self_counting_arithmetic() -> None:
    row = [Number(0.1 * i) for i in range(7)]
    softmax = price_call(F.softmax, (4, 7), dim=-1).one("_softmax")
    assert softmax.total_flops == 4 * _count(lambda: _softmax(row))
    assert (softmax.size, softmax.curve) == ((4, 7), "softmax")
    norm = price_module(nn.LayerNorm(7), torch.empty(4, 7)).one("native_layer_norm")
    assert norm.total_flops == 4 * _count(lambda: _layer_norm(row))
    assert (norm.bytes_read, norm.bytes_written) == (4 * (28 + 14), 4 * (28 + 8))
    assert norm.movement == (Movement.REDUCTION, Movement.BROADCAST)


def _adamw(w: Number, g: Number, m: Number, v: Number) -> Number:
    w = w * 0.999
    m = m + (g - m) * 0.1
    v = v * 0.999 + g * g * 0.001
    return w - m * 0.01 / (v.sqrt() / 0.9 + 1e-8)


def test_fused_adamw_moves_28_bytes_a_parameter() -> None:
    record = _step(lambda p: torch.optim.AdamW(p, fused=True))
    cost = record.one("_fused_adamw_")
    assert cost.total_flops == 1000 * _count(lambda: _adamw(*(Number(0.5) for _ in range(4))))
    assert cost.bytes_read - 4 * 1 == 16 * 1000  # the step counter is one fp32
    assert cost.bytes_written == 12 * 1000
    assert cost.curve == "optimizer"


def _step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Recording:
    with recording() as record:
        weight = nn.Parameter(torch.empty(10, 100))
        optimizer = make([weight])
        weight.grad = torch.empty_like(weight)
        optimizer.step()
    return record


@pytest.mark.parametrize(
    ("make", "operator", "moved"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), "_fused_sgd_", 12),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True), "_fused_sgd_", 16),
        (lambda p: torch.optim.Adagrad(p, fused=True), "_fused_adagrad_", 20),
    ],
)
def test_fused_optimizers_move_each_state_once(make: Callable, operator: str, moved: int) -> None:
    cost = _step(make).one(operator)
    assert 0 <= cost.total_bytes - moved * 1000 <= 8


def test_foreach_optimizer_prices_completely() -> None:
    record = _step(lambda p: torch.optim.AdamW(p, foreach=True))
    assert record.one("_foreach_lerp_").total_flops == 3000
    assert record.one("_foreach_sqrt").bytes_read == 4000
    clipped = price_call(lambda a, b: torch.nn.utils.get_total_norm([a, b], foreach=True), (10, 10), (5,))
    assert clipped.one("_foreach_norm").total_flops == 2 * 105


def test_reductions_by_hand() -> None:
    x = (4, 6)
    assert price_call(torch.sum, x).flops() == 24
    assert price_call(torch.mean, x, dim=1).flops() == 24 + 4
    assert price_call(torch.amax, x, dim=0).flops() == 24
    assert price_call(torch.cumsum, x, dim=1).flops() == 24
    total = price_call(torch.sum, x, dim=1).one("sum")
    assert (total.bytes_read, total.bytes_written, total.primitive) == (96, 16, Primitive.REDUCTION)
    assert total.size == (4, 6)
    assert price_call(lambda a: a.t().sum(dim=0), x).one("sum").size == (4, 6)


def test_order_costs_its_comparisons() -> None:
    assert price_call(torch.sort, (3, 16)).flops() == 3 * 16 * 4
    assert price_call(torch.topk, (3, 16), k=8).flops() == 3 * 16 * 3
    assert price_call(torch.sort, (3, 16)).calls[0][1].access is Access.RANDOM


def test_fft_is_five_n_log_n() -> None:
    assert price_call(torch.fft.fft, (3, 64), dtype=torch.complex64).flops() == 5 * 3 * 64 * 6
    assert price_call(torch.fft.rfft, (3, 64)).flops() == 5 * 3 * 64 * 6 // 2
    assert price_call(torch.fft.irfft, (3, 33), dtype=torch.complex64).flops() == 5 * 3 * 64 * 6 // 2


def test_broadcast_reads_only_what_there_is() -> None:
    cost = price_call(torch.add, (8, 16), (16,)).one("add")
    assert cost.bytes_read == 4 * (128 + 16)
    assert cost.movement == (Movement.BROADCAST,)
    assert price_call(lambda x: x[:1].expand(8, 16) * 2, (8, 16)).one("mul").bytes_read == 64


def test_in_place_reads_and_writes_and_transposed_operands_are_strided() -> None:
    cost = price_call(lambda x, y: x.mul_(y), (8, 8), (8, 8)).one("mul_")
    assert (cost.bytes_read, cost.bytes_written, cost.total_flops) == (512, 256, 64)
    assert cost.access is Access.SEQUENTIAL
    assert price_call(lambda x, y: x + y.t(), (8, 8), (8, 8)).one("add").access is Access.STRIDED


NORMS = [
    (nn.BatchNorm2d(3), (2, 3, 4, 4), "native_batch_norm", 5 + 2, 9 + 1 + 2 + 1),
    (nn.GroupNorm(1, 3), (2, 3, 4, 4), "native_group_norm", 5 + 2, 9 + 1 + 2 + 1),
]


@pytest.mark.parametrize(("module", "shape", "name", "forward", "backward"), NORMS)
def test_norms_forward_and_backward(module: nn.Module, shape: tuple[int, ...], name: str, forward: int, backward: int):
    record = price_module(module, torch.empty(shape), backward=True)
    costs: dict[str, Cost] = {n.split("::")[1].split(".")[0]: c for n, c in record.calls}
    (fwd,) = (c for n, c in costs.items() if n.endswith(("norm", "_legit")))
    assert fwd.total_flops == forward * 96
    assert costs[name + "_backward"].total_flops == backward * 96


def test_frozen_batch_norm_only_applies_its_statistics() -> None:
    module = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        record = price_module(module, torch.empty(2, 3, 4, 4))
    assert record.flops() == 4 * 96
