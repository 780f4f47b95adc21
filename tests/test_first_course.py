"""The figures of a first course on the subject come out of the code."""

from __future__ import annotations

import torch
from torch import nn

from rooflight.models import classic
from rooflight.models.config import ModelConfig, same_layers
from rooflight.models.count import parameter_counts
from rooflight.ops.cost import Access, Primitive
from rooflight.workload import program, walk
from rooflight.workload.explanation import Memory
from rooflight.workload.memory import over_time
from rooflight.workload.program import Setting
from rooflight.workload.rows import component_of
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


def _decoder(
    layers: int = 4, width: int = 512, heads: int = 8, kv_heads: int = 8, ffn_width: int = 2048
) -> ModelConfig:
    """A decoder as a first course draws it: multi-head attention, d_ff = 4·d, an ungated feed-forward."""
    return ModelConfig(
        family="gpt2",
        vocab_size=1024,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        ffn_width=ffn_width,
        layers=same_layers(layers),
        max_context=1 << 20,
        gated=False,
        activation="gelu_tanh",
    )


def _walked(config: ModelConfig, setting: Setting) -> walk.Walk:
    return walk.dry(lambda: program.decoder(config, setting, "cpu", fold=True))


def _memory(config: ModelConfig, setting: Setting) -> Memory:
    return over_time(_walked(config, setting), capacity=1e12)


def _layer_flops(config: ModelConfig, setting: Setting) -> dict[str, int]:
    """FLOPs of the matrix products inside layers, by component."""
    found: dict[str, int] = {}
    run = _walked(config, setting)
    for step in run.steps:
        record = run.trace.records[step.record]
        for component, flops in [(p.component, p.flops) for p in record.cost.parts] or [
            (component_of(record), record.cost.flops)
        ]:
            if step.layer is not None:
                found[component] = found.get(component, 0) + flops.get("bf16", 0)
    return found


def test_feed_forward_is_two_thirds_of_the_flops() -> None:
    # 8·d² of 12·d² weights a layer; the scores come on top and are few at a short context.
    for phase in ("prefill", "train"):
        found = _layer_flops(_decoder(), Setting(phase, 8, 64, optimizer="none"))
        share = found["feed-forward"] / sum(found.values())
        assert 0.64 < share < 2 / 3
        without_scores = sum(found.values()) - found["scores"] - found["context"]
        assert found["feed-forward"] * 3 == without_scores * 2
    # At a long context attention takes over.
    long = _layer_flops(_decoder(), Setting("prefill", 1, 16_384))
    assert long["feed-forward"] < long["scores"] + long["context"]


def test_adams_states_are_twice_the_parameters() -> None:
    config = _decoder()
    found = _memory(config, Setting("train", 1, 64, "fp32", optimizer="adamw"))
    assert found.weights == 4 * parameter_counts(config)["total"]
    assert found.optimizer == 2 * found.weights
    assert found.gradients == found.weights


def test_kv_cache_is_batch_layers_2_context_heads_dim_bytes() -> None:
    batch, context = 8, 4096
    sizes = {}
    for kv_heads in (8, 2, 1):
        config = _decoder(kv_heads=kv_heads)
        sizes[kv_heads] = _memory(config, Setting("decode", batch, context)).kv_cache
        assert sizes[kv_heads] == batch * 4 * 2 * context * kv_heads * 64 * 2
    # Grouped queries over 2 key heads save three quarters of it, multi-query all but an eighth.
    assert sizes[2] == sizes[8] / 4
    assert sizes[1] == sizes[8] / 8


def test_naive_attention_stores_the_scores_of_32k_and_flash_does_not() -> None:
    config, context = _decoder(layers=2, width=64, heads=1, kv_heads=1, ffn_width=256), 32_768
    matrix = 4 * context * context
    assert matrix == 4 * GIB
    naive = _memory(config, Setting("prefill", 1, context, "fp32", attention="naive"))
    flash = _memory(config, Setting("prefill", 1, context, "fp32", attention="flash"))
    # Scores and the probabilities made of them stand together.
    assert 2 * matrix <= naive.activations_peak < 2.1 * matrix
    assert flash.activations_peak < matrix / 30
    # A training step keeps each layer's probabilities for its backward.
    kept = [
        _memory(config, Setting("train", 1, context, "fp32", attention=attention)).activations_peak
        for attention in ("naive", "flash")
    ]
    assert 2 * matrix <= kept[0] - kept[1]
    assert kept[1] < matrix / 10
