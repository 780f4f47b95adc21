"""The CPU's matrix products against fp64, by MKL and by oneDNN, and that oneDNN repeats itself bit for bit.

Legend: T rows  N output width  K input width
"""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rooflight.ops import cpu_matmul
from rooflight.ops.cpu_matmul import onednn_product, pack, product
from rooflight.ops.linear import linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")
has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
# Large enough for oneDNN, odd sizes and a single row among them.
SIZES = [(512, 256, 64), (129, 200, 333), (1, 2048, 1100), (64, 1024, 96)]


def draw(*shape: int, seed: int = 0, offset: int = 0) -> Tensor:
    """Normal numbers whose memory begins `offset` elements after an allocation's beginning."""
    count = torch.Size(shape).numel()
    memory = torch.empty(count + offset)[offset:].view(shape)
    return memory.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def operands(tokens: int, n: int, k: int, offset: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The forward's product, the input gradient's and the weight gradient's, as views of the same three tensors."""
    x_TK, weight_NK, grad_TN = (
        draw(*shape, seed=i, offset=offset) for i, shape in enumerate(((tokens, k), (n, k), (tokens, n)))
    )
    return [(x_TK, weight_NK.t()), (grad_TN, weight_NK), (grad_TN.t(), x_TK)]


def digest(offset: int) -> str:
    """Of the bits of all products by oneDNN."""
    made = hashlib.sha256()
    for size in SIZES:
        for a, b in operands(*size, offset=offset):
            made.update(onednn_product(a, b).contiguous().numpy().tobytes())
    return made.hexdigest()


@has_onednn
@pytest.mark.parametrize("form", [product, onednn_product])
@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_that_of_fp64(form: type, size: tuple[int, int, int]) -> None:
    for a, b in operands(*size):
        for bias in (None, draw(b.shape[1], seed=3)):
            exact = a.double() @ b.double() + (0 if bias is None else bias.double())
            torch.testing.assert_close(form(a, b, bias).double(), exact, rtol=0, atol=3e-6 * exact.abs().max().item())


@has_onednn
def test_leading_dimensions_stay() -> None:
    x, weight = draw(2, 3, 40), draw(40, 8, seed=1)
    for form in (product, onednn_product):
        torch.testing.assert_close(form(x, weight), (x.double() @ weight.double()).float(), rtol=1e-5, atol=1e-5)


@has_onednn
def test_the_same_bits_from_any_thread_count_alignment_and_process() -> None:
    """A resumed run has to repeat the run that it resumes."""
    threads = torch.get_num_threads()
    try:
        found = set()
        for count, offset in ((1, 0), (2, 0), (1, 3), (2, 9)):
            torch.set_num_threads(count)
            found.add(digest(offset))
    finally:
        torch.set_num_threads(threads)
    code = "from tests.ops.test_cpu_matmul import digest; print(digest(1))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found == {told.stdout.strip()}


@has_onednn
def test_oneDNN_is_taken_for_large_fp32_products_on_the_processors_that_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def seen(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(a.shape)
        return onednn_product(a, b, bias)

    monkeypatch.setattr(cpu_matmul, "onednn_product", seen)
    monkeypatch.setattr(cpu_matmul, "_mkl_leaves_half", lambda: True)
    large, weight = draw(128, 128), draw(128, 128, seed=1)
    product(large, weight)
    assert len(calls) == 1
    product(large[:127], weight)
    product(large.bfloat16(), weight.bfloat16())
    product(large.double(), weight.double())
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "enabled", False)
        product(large, weight)
    assert torch.backends.mkldnn.enabled
    # It has no derivative: where one is wanted of the product itself, torch's own linear gives it.
    assert product(large, weight.clone().requires_grad_()).requires_grad
    monkeypatch.setattr(cpu_matmul, "_mkl_leaves_half", lambda: False)
    product(large, weight)
    assert len(calls) == 1


@has_onednn
def test_a_linear_layer_learns_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "_mkl_leaves_half", lambda: True)
    x, weight, bias = draw(160, 96), draw(200, 96, seed=1), draw(200, seed=2)
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    grad = draw(160, 200, seed=4)
    linear(*ours).backward(grad)
    torch.nn.functional.linear(*exact).backward(grad.double())
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=3e-6 * b.grad.abs().max().item())


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [("AMD EPYC 9J14", "AVX512", True), ("AMD EPYC 7763", "AVX2", False), ("Intel(R) Xeon(R)", "AVX512", False)],
)
def test_the_processors_that_gain(name: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_matmul._mkl_leaves_half.__wrapped__() is (expected and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def packs(dtype: torch.dtype) -> bool:
    return cpu_matmul.packs(dtype)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the products that took a packed copy."""
    seen: list[torch.Size] = []
    copy_of = cpu_matmul._copy_of

    def spy(b_KN: Tensor) -> Tensor | None:
        found = copy_of(b_KN)
        if found is not None:
            seen.append(b_KN.shape)
        return found

    monkeypatch.setattr(cpu_matmul, "_copy_of", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [(1,), (16,), (2, 3), (130,)])
def test_a_packed_weight_gives_the_product(dtype: torch.dtype, rows: tuple[int, ...], taken: list[torch.Size]) -> None:
    if not packs(dtype):
        pytest.skip(f"oneDNN packs no {dtype} here")
    x, weight, bias = draw(*rows, 100).to(dtype), draw(67, 100, seed=1).to(dtype), draw(67, seed=2).to(dtype)
    assert pack(weight) == weight.numel() * weight.element_size()
    for given in (None, bias):
        taken.clear()
        found = linear(x, weight, given)
        assert taken == [(100, 67)] and found.dtype == dtype
        exact = x.double() @ weight.double().t() + (0 if given is None else given.double())
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error <= (3e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.skipif(not cpu_matmul.packs(torch.bfloat16), reason="oneDNN packs no bf16 here")
def test_a_packed_copy_stands_only_for_the_weight_as_it_was_packed(taken: list[torch.Size]) -> None:
    x, weight = draw(4, 64).bfloat16(), draw(96, 64, seed=1).bfloat16()

    def agrees() -> bool:
        exact = x.double() @ weight.double().t()
        return bool((linear(x, weight).double() - exact).abs().max() <= 4e-3 * exact.abs().max())

    pack(weight)
    assert agrees() and len(taken) == 1
    weight.mul_(3.0)
    assert agrees() and len(taken) == 1
    # Packed anew, it is taken again; other views of its memory are not the weight.
    taken.clear()
    pack(weight)
    taken.clear()
    assert agrees() and len(taken) == 1
    product(x, weight[:32].t())
    product(draw(4, 96).bfloat16(), weight)
    product(x.float(), weight.float().t())
    assert len(taken) == 1
    # Moved to other memory, while a view keeps the old: neither may take the copy.
    old = weight[:]
    weight.data = draw(96, 64, seed=7).bfloat16()
    product(x, old.t())
    assert agrees() and len(taken) == 1


@pytest.mark.skipif(not cpu_matmul.packs(torch.bfloat16), reason="oneDNN packs no bf16 here")
def test_a_packed_copy_dies_with_its_weight_and_gives_no_derivative(taken: list[torch.Size]) -> None:
    x, weight = draw(4, 64).bfloat16(), torch.nn.Parameter(draw(96, 64, seed=1).bfloat16())
    before = len(cpu_matmul._packed)
    pack(weight)
    assert len(cpu_matmul._packed) == before + 1
    product(x, weight.t()).sum().backward()
    assert weight.grad is not None and not taken
    with torch.no_grad():
        linear(x, weight)
    with torch.inference_mode():
        linear(x, weight)
    assert len(taken) == 2
    del weight
    assert len(cpu_matmul._packed) == before


def test_what_cannot_be_packed_is_left_alone() -> None:
    with torch.inference_mode():
        unversioned = torch.ones(8, 8, dtype=torch.bfloat16)
    for weight in (torch.ones(8), torch.ones(8, 8, dtype=torch.float64), torch.ones(4, 8).t(), unversioned):
        assert pack(weight) == 0
    assert pack(torch.empty(8, 8, device="meta", dtype=torch.bfloat16)) == 0
    assert pack(torch.empty(0, 8, dtype=torch.bfloat16)) == 0
