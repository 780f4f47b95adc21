"""The figures of a first course on the subject come out of the code."""

from __future__ import annotations

import torch
from torch import nn

from rooflight.models import classic
from rooflight.ops.cost import Access, Primitive
from tests.priced import price_call, price_module

# In bf16 the multiply-adds stand under "bf16" and the elementwise work under "fp32", so the two can be told apart.
BF16 = torch.bfloat16
GIB = 2**30


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _multiply_adds(module: nn.Module, *shape: int) -> int:
    return price_module(module.to(BF16), torch.empty(shape, dtype=BF16)).flops("bf16") // 2


def test_mlp_784_to_100() -> None:
    model = classic.MLP((784, 100))
    assert _weights(model) == 78_400
    assert _multiply_adds(model, 1, 784) == 78_400
    assert _multiply_adds(model, 64, 784) == 64 * 78_400


def test_cnn_of_32_filters_on_28_by_28() -> None:
    model = classic.CNN((1, 32), kernel=3)
    assert _weights(model) == 288
    cost = price_module(model, torch.empty(1, 1, 28, 28)).one("convolution")
    assert cost.bytes_written == 4 * 25_088
    assert cost.total_flops == 2 * 288 * 784
    assert (cost.primitive, cost.access) == (Primitive.SLIDING_WINDOW, Access.STRIDED)


def test_rnn_100_to_128() -> None:
    model = classic.Recurrent("rnn", 100, 128)
    assert [p.numel() for p in model.parameters()] == [12_800, 16_384]
    assert _weights(model) == 29_184
    for steps in (1, 7):
        assert _multiply_adds(model, steps, 1, 100) == steps * 29_184


def test_an_rnn_is_serial_over_its_steps() -> None:
    # Without fusion, each step is a multiply of its own over the state's weights; the inputs' is one for all steps.
    record = price_module(classic.Recurrent("rnn", 100, 128), torch.empty(7, 1, 100))
    multiplies = [c for _, c in record.calls if c.primitive is Primitive.MATMUL]
    assert sorted(c.size for c in multiplies) == [(1, 128, 128)] * 7 + [(7, 128, 100)]
    lstm = price_module(classic.Recurrent("lstm", 100, 128), torch.empty(7, 1, 100))
    serial = sum(c.serial_steps for _, c in lstm.calls if c.primitive is Primitive.SEQUENTIAL_STATE)
    assert serial == 7 or len(lstm.named("mm")) + len(lstm.named("addmm")) + len(lstm.named("linear")) == 8


def test_attention_is_n_squared_d_twice() -> None:
    n, d = 64, 48
    for heads in (1, 4):
        inputs = [torch.empty(1, n, d, dtype=BF16) for _ in range(3)]
        record = price_module(classic.AttentionLayer(d, heads), *inputs)
        scores, context = record.named("bmm")
        assert scores.flops == context.flops == {"bf16": 2 * n * n * d}
        # N² weights a head are stored, and read back.
        assert scores.bytes_written == record.one("_softmax").bytes_written == 2 * heads * n * n


def test_flash_attention_does_not_store_the_scores() -> None:
    n, d = 256, 16
    record = price_call(torch.nn.functional.scaled_dot_product_attention, *[(1, 1, n, d)] * 3, dtype=BF16)
    (cost,) = (c for _, c in record.calls if c.curve == "attention")
    assert cost.flops["bf16"] == 4 * n * n * d
    assert cost.bytes_written == 2 * n * d + 4 * n
    assert cost.bytes_written < 2 * n * n


def test_one_score_matrix_of_32k_is_4_gib() -> None:
    cost = price_call(torch.mm, (32_768, 128), (128, 32_768)).one("mm")
    assert cost.bytes_written == 4 * GIB


def test_an_embedding_of_100_000_by_4096_is_1_6_gb() -> None:
    with torch.device("meta"):
        table = nn.Embedding(100_000, 4096)
    assert _weights(table) * 4 == 1_638_400_000
    ids = torch.zeros(1, 10, dtype=torch.int64, device="meta")
    backward = price_module(table, ids, backward=True).one("embedding_dense_backward")
    assert backward.bytes_written == 1_638_400_000
    # A lookup touches its rows only.
    assert price_module(table, ids).one("embedding").bytes_read == 10 * 4096 * 4 + 10 * 8
