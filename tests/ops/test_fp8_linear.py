"""Linears in fp8 against their definition by search among all fp8 numbers, and as layers of a decoder that trains.

Legend: T tokens  N output width  K input width
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rooflight.models.config import ModelConfig
from rooflight.models.layers import Linear
from rooflight.models.layout import Layout
from rooflight.models.presets import resolve
from rooflight.models.recompute import Recompute
from rooflight.models.transformer import Transformer
from rooflight.ops import batch
from rooflight.ops.cost import VECTOR
from rooflight.ops.fp8_linear import (
    E4M3,
    E5M2,
    LARGEST,
    SHARES,
    fits_fp8,
    fp8_amax,
    fp8_linear,
    fp8_linear_weight_grad,
    fp8_quantize,
    fp8_quantize_both,
    scaled_linear,
)
from rooflight.ops.linear import linear
from rooflight.ops.op import all_ops
from rooflight.workload import program, walk
from rooflight.workload.memory import over_time
from rooflight.workload.program import Setting
from rooflight.workload.record import BACKWARD, Record, Recorder

from .counted import MATMUL_UNIT, VECTOR_UNIT, counting, lift
from .scalar_rest import fp8_product, rounded_to_fp8

T, N, K = 48, 32, 64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers_of(dtype: torch.dtype) -> Tensor:
    """Every finite number of an fp8 format, in order, in fp64."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return numbers[numbers.isfinite()].unique()


def nearest(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as the nearest multiples of its scale that fp8 has, dequantised, and that scale; all in fp64."""
    numbers = numbers_of(dtype)
    scale = x.double().abs().max() / numbers[-1]
    above = torch.searchsorted(numbers, x.double() / scale).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = (low + high) / 2
    return torch.where(x.double() / scale < middle, low, high) * scale, scale


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradients(f, *leaves: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = f(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_formats(dtype):
    assert numbers_of(dtype)[-1] == LARGEST[dtype]
    values = torch.cat((numbers_of(dtype), draw(4000, seed=1).double() * LARGEST[dtype] / 8))
    values = values[values.abs() <= LARGEST[dtype]]
    assert [rounded_to_fp8(v, dtype) for v in values.tolist()] == values.to(dtype).double().tolist()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_quantised_is_the_nearest(dtype, size):
    x = (draw(T, K).double() * size).to(torch.bfloat16)
    x8, x8_turned, scale = fp8_quantize_both(x, fp8_amax(x), dtype)
    expected, wanted_scale = nearest(x, dtype)
    assert scale.item() == pytest.approx(wanted_scale.item(), rel=1e-6)
    # Of a number half way between two, either may be taken: the scale is rounded to fp32.
    spacing = torch.maximum(expected.abs(), scale * 2.0**-6) * (2.0**-3 if dtype == E4M3 else 2.0**-2)
    error = (x8.double() * scale - x.double()).abs()
    assert (error <= (expected - x.double()).abs() + 1e-6 * spacing).all()
    assert x8_turned.is_contiguous() and torch.equal(x8_turned.float().t(), x8.float())
    assert x8.float().abs().max() == LARGEST[dtype]


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_definition(bias):
    x, weight, grad = draw(T, K), draw(N, K, seed=1) / 8, draw(T, N, seed=2) / 1000
    b = draw(N, seed=3)
    out, found = gradients(fp8_linear, x, weight, *([b] if bias else []), grad=grad)
    (x8, _), (weight8, _), (grad8, _) = nearest(x, E4M3), nearest(weight, E4M3), nearest(grad, E5M2)
    wanted = [grad8 @ weight8, grad8.T @ x8, *([grad.double().sum(0)] if bias else [])]
    assert relative(out, x8 @ weight8.T + (b.double() if bias else 0)) < 4e-3
    for got, expected in zip(found, wanted, strict=True):
        assert got.dtype == torch.bfloat16 and got.shape == expected.shape
        assert relative(got, expected) < 4e-3


def test_near_the_linear_that_it_stands_for():
    """Rounding to m bits errs by u·2⁻ᵐ⁻¹ with u the root mean square of a uniform error over a uniform mantissa."""
    x, weight, grad = (
        draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(256, 512), (128, 512), (256, 128)])
    )
    out, found = gradients(fp8_linear, x, weight, grad=grad)
    exact, wanted = gradients(linear, x, weight, grad=grad)

    def rounding(bits: int) -> float:
        return 2.0**-bits / math.sqrt(12) / math.sqrt(7 / 3)

    forward, backward = math.sqrt(2) * rounding(3), math.hypot(rounding(3), rounding(2))
    assert forward < 0.04 and backward < 0.06
    assert 0.5 * forward < relative(out, exact) < 1.3 * forward
    for got, expected in zip(found, wanted, strict=True):
        assert 0.5 * backward < relative(got, expected) < 1.3 * backward


def test_an_outlier_costs_the_small_values_their_bits_and_no_more():
    x, weight = draw(T, K), draw(N, K, seed=1)
    x[3, 5] = 20000.0
    x8, scale = fp8_quantize(x, fp8_amax(x), E4M3)
    error = (x8.double() * scale.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() * 2.0**-4, scale.double() * 2.0**-10) * (1 + 1e-6)).all()
    out = fp8_linear(x, weight)
    assert relative(out[3], x[3].double() @ weight.double().T) < 0.05


def test_zeros_are_no_division_by_zero():
    zeros = torch.zeros(T, K, dtype=torch.bfloat16)
    weight, grad = draw(N, K, seed=1), draw(T, N, seed=2)
    out, (grad_x, grad_weight) = gradients(fp8_linear, zeros, weight, grad=grad)
    assert not out.any() and not grad_weight.any() and grad_x.isfinite().all() and grad_x.any()
    out, found = gradients(fp8_linear, draw(T, K), torch.zeros_like(weight), grad=torch.zeros_like(grad))
    assert not out.any() and not any(g.any() for g in found)


@pytest.mark.parametrize("least", [1e-37, 1e-30, 1e-20])
def test_tiny_values_stay_finite(least):
    x = (draw(T, K).float() * least).to(torch.bfloat16)
    out = fp8_linear(x, draw(N, K, seed=1))
    assert out.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["x", "weight", "grad"])
def test_what_is_not_finite_stays_so(value, place):
    tensors = {"x": draw(T, K), "weight": draw(N, K, seed=1), "grad": draw(T, N, seed=2)}
    tensors[place][7, 3] = value
    out, (grad_x, grad_weight) = gradients(fp8_linear, tensors["x"], tensors["weight"], grad=tensors["grad"])
    assert place == "grad" or not out.isfinite().all()
    assert place == "x" or not grad_x.isfinite().all()
    assert place == "weight" or not grad_weight.isfinite().all()


def recorded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Record]:
    with Recorder() as recorder:
        out = fp8_linear(x, weight, bias)
        if out.requires_grad:
            out.backward(torch.ones_like(out))
    return [record for record in recorder.records if not record.name.startswith("aten.")]


def names(records: list[Record]) -> list[str]:
    return [record.name.removeprefix("fp8_") for record in records]


def test_only_wanted_gradients_are_computed_and_kept():
    def leaves(x: bool, weight: bool) -> tuple[Tensor, Tensor]:
        return draw(T, K).requires_grad_(x), draw(N, K, seed=1).requires_grad_(weight)

    forward = ["amax", "amax", "quantize_both", "quantize", "linear"]
    assert names(recorded(*leaves(True, True))) == [
        *forward,
        *("amax", "quantize_both", "quantize_transposed", "linear_input_grad", "linear_weight_grad"),
    ]
    assert names(recorded(*leaves(False, True))) == [*forward, "amax", "quantize_both", "linear_weight_grad"]
    plain = ["amax", "amax", "quantize", "quantize", "linear"]
    frozen = [*plain, "amax", "quantize", "quantize_transposed", "linear_input_grad"]
    assert names(recorded(*leaves(True, False))) == frozen
    with torch.no_grad():
        assert names(recorded(*leaves(True, True))) == plain
    bias = draw(N).requires_grad_()
    assert names(recorded(*leaves(False, False), bias)) == [*plain, "bias_grad"]


def test_the_backward_keeps_a_byte_an_element_of_the_input_and_none_of_the_weight():
    kept: list[Tensor] = []
    x, weight = draw(T, K).requires_grad_(), draw(N, K, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        fp8_linear(x, weight)
    known = weight.untyped_storage().data_ptr()
    made = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != known]
    assert sum(tensor.numel() * tensor.element_size() for tensor in made) == T * K + 4 + 4 * SHARES
    assert {tensor.dtype for tensor in made} == {E4M3, torch.float32}


def test_prices():
    records = {record.name: record for record in recorded(draw(T, K).requires_grad_(), draw(N, K).requires_grad_())}
    products = {
        "fp8_linear": (T, N, K),
        "fp8_linear_input_grad": (T, K, N),
        "fp8_linear_weight_grad": (N, K, T),
    }
    for name, (m, n, k) in products.items():
        cost = records[name].cost
        assert cost.flops == {"fp8": 2 * m * n * k, VECTOR: m * n + 1}
        assert (cost.bytes_read, cost.bytes_written) == (m * k + n * k + 8, 2 * m * n)
        assert (cost.precision, cost.size) == ("fp8", (m, n, k))
    assert records["fp8_linear_weight_grad"].phase == BACKWARD
    # Two passes: the largest magnitude reads all that the cast then reads again.
    assert records["fp8_amax"].cost.bytes_read == 2 * T * N
    assert records["fp8_quantize_both"].cost.bytes_written == 2 * T * N + 4
    assert records["fp8_quantize_transposed"].cost.bytes_written == N * K + 4


def test_a_product_in_fp8_is_counted_by_its_scalar_program():
    a, b = draw(5, 8).to(E4M3), draw(7, 8, seed=1).to(E4M3)
    scale_a, scale_b, bias = torch.tensor(0.5), torch.tensor(3.0), draw(7)
    args = (a, b, scale_a, scale_b, bias, torch.bfloat16)
    out = scaled_linear(*args)
    with counting() as tally:
        fp8_product(*(lift(x.tolist()) for x in (a.float(), b.float(), scale_a, scale_b, bias)), torch.bfloat16)
    assert scaled_linear.price(out, *args).flops == {"fp8": tally[MATMUL_UNIT], VECTOR: tally[VECTOR_UNIT]}


@pytest.mark.parametrize("operation", [op for op in all_ops() if op.name.startswith("fp8_")], ids=str)
def test_shapes_on_fake_tensors(operation):
    a, b, one = draw(T, K).to(E5M2), draw(N, K).to(E4M3), torch.ones(())
    calls = {
        "fp8_amax": (draw(T, K),),
        "fp8_linear": (a, b, one, one, draw(N), torch.bfloat16),
        "fp8_linear_input_grad": (a, b, one, one, torch.float16),
        "fp8_linear_weight_grad": (a, b, one, one, torch.float32),
    }
    args = calls.get(operation.name, (draw(T, K), torch.ones(SHARES), E5M2))
    torch.library.opcheck(operation.overload, args, test_utils=("test_faketensor",))


@pytest.mark.parametrize("sizes", [(T + 1, N, K), (T, N + 8, K), (T, N, K + 4), (0, N, K)])
def test_other_sizes_take_the_plain_linear(sizes):
    tokens, outputs, inputs = sizes
    layer = Linear(inputs, outputs).to(torch.bfloat16)
    layer.weight.data = draw(outputs, inputs, seed=1)
    x = draw(tokens, inputs)
    layer.fp8 = True
    assert not fits_fp8(x, layer.weight)
    assert torch.equal(layer(x), linear(x, layer.weight, None))


def test_a_layer_with_leading_dimensions_and_a_bias():
    layer = Linear(K, N, bias=True).to(torch.bfloat16)
    layer.load_state_dict({"weight": draw(N, K, seed=1), "bias": draw(N, seed=2)})
    plain = layer(draw(3, T, K)).detach()
    layer.fp8 = True
    out = layer(draw(3, T, K)).detach()
    assert out.shape == (3, T, N) and out.dtype == torch.bfloat16
    assert 0.01 < relative(out, plain) < 0.05


def fp8_names(model: Transformer) -> set[str]:
    layers = {name.partition(".")[2] for name, m in model.layers.named_modules() if isinstance(m, Linear) and m.fp8}
    assert not any(isinstance(m, Linear) and m.fp8 for m in (model.embedding, model.norm, model.head))
    return layers


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("tiny", {"attention.qkv", "attention.out", "ffn.up", "ffn.down"}),
        ("qwen3-30b-a3b", {"attention.qkv", "attention.out"}),
        (
            "deepseek-v2-lite",  # one dense layer; experts, shared ones too, and the router stay
            {*(f"attention.{name}" for name in ("down", "q_up", "kv_up", "out")), "ffn.up", "ffn.down"},
        ),
    ],
)
def test_the_layers_that_run_in_fp8(preset, expected):
    config = resolve(preset)[1].folded()[0]
    model = program.build_model(config, "fp8", "meta")
    assert fp8_names(model) == expected
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not fp8_names(program.build_model(config, "bf16", "meta"))


def tiny(dtype: str) -> tuple[ModelConfig, Transformer]:
    config = resolve("tiny")[1]
    return config, program.build_model(config, dtype, "cpu").initialize(3)


BATCH, CONTEXT = 2, 64


def loss_of(model: Transformer, tokens: Tensor, recompute: Recompute = "none") -> Tensor:
    positions = torch.arange(CONTEXT).repeat(BATCH)
    with batch.use(batch.Batch.uniform(BATCH, CONTEXT, CONTEXT)):
        return model(tokens, positions, Layout((BATCH, CONTEXT)), tokens.roll(-1), recompute=recompute)


@pytest.mark.parametrize("seed", range(3))
def test_a_decoder_learns_as_in_bf16(seed):
    losses: dict[str, list[float]] = {}
    # The same few words over and over: there is something to learn.
    pattern = torch.randint(0, 256, (16,), generator=torch.Generator().manual_seed(seed))
    tokens = pattern.repeat(BATCH * CONTEXT // 16)
    for dtype in ("bf16", "fp8"):
        model = program.build_model(resolve("tiny")[1], dtype, "cpu").initialize(seed)
        # Steps that are not so long that two runs part by themselves.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[dtype] = []
        for _ in range(20):
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
    assert losses["bf16"][-1] < 0.65 * losses["bf16"][0]
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.01)


@pytest.mark.parametrize("recompute", ["selective", "full", frozenset({"fp8_quantize_both", "gated_activation"})])
def test_recomputation_changes_no_bit(recompute):
    # With bf16 around them, full recomputation adds the residual elsewhere and rounds it elsewhere.
    model = program.use_fp8(tiny("fp32")[1])
    tokens = torch.randint(0, 256, (BATCH * CONTEXT,), generator=torch.Generator().manual_seed(1))
    found = []
    for how in ("none", recompute):
        model.zero_grad()
        loss_of(model, tokens, how).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


DEEP = 40  # layers, so that what one layer holds for a moment counts for little


def activations(config: ModelConfig, dtype: str, recompute: str = "none") -> float:
    setting = Setting("train", BATCH, CONTEXT, dtype, recompute=recompute)
    walked = walk.dry(lambda: program.decoder(config, setting, "cpu", fold=True))
    return over_time(walked, 0.0).activations_peak


def test_activations_take_less_memory_dry():
    config = resolve("tiny")[1]
    config = replace(config, layers=(config.layers[0],) * DEEP)
    # A byte an element less of the two norms' outputs and of the gated product; the attention's output stays in bf16
    # for its own backward, with an fp8 copy beside it. The largest magnitudes of four weights.
    a_token = 2 * config.width + config.ffn_width - config.heads * config.head_dim
    saved = DEEP * (BATCH * CONTEXT * a_token - 4 * 4 * SHARES)
    plain, fp8 = activations(config, "bf16"), activations(config, "fp8")
    assert plain - fp8 == pytest.approx(saved, rel=0.05)
    assert activations(config, "fp8", "selective") < fp8


def test_the_walk_is_what_runs():
    config, model = tiny("fp8")
    setting = Setting("train", BATCH, CONTEXT, "fp8", optimizer="none")
    dry = walk.dry(lambda: program.decoder(config, setting, "cpu", fold=False))
    wet = walk.record(program.decoder(config, setting, "cpu", fold=False, model=model))
    assert [r.name for r in dry.trace.records] == [r.name for r in wet.trace.records]
    assert sum(r.name == fp8_linear_weight_grad.name for r in dry.trace.records) == 4 * len(config.layers)
