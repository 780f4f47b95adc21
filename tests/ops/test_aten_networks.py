"""Whole networks price completely: forward, backward and optimizer, on fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rooflight.ops.cost import Primitive
from tests.priced import price_module, recording


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)), inplace=True)
        return F.relu(self.norm2(self.second(y)).add_(self.shortcut(x)))


class Classifier(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], layers: int = 1, bidirectional: bool = False):
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.rnn = kind(12, 16, num_layers=layers, bidirectional=bidirectional)
        self.head = nn.Linear(16 * (1 + bidirectional), 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0][-1]).log_softmax(-1)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.MaxPool2d(2))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.PReLU(), nn.Dropout(0.1))
        self.head = nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.up(self.down(x)), size=x.shape[-2:], mode="bilinear")
        return F.adaptive_avg_pool2d(self.head(torch.cat((x, y), 1)), (3, 3)).flatten(1)


IMAGE = torch.empty(2, 3, 8, 8)
IDS = torch.zeros(5, 2, dtype=torch.int64)
TOKENS = torch.empty(2, 5, 16)
NETWORKS: list[tuple[str, Callable[[], nn.Module], tuple[Tensor, ...]]] = [
    ("residual block", lambda: ResidualBlock(3, 8, 2), (IMAGE,)),
    ("u-net", UNet, (IMAGE,)),
    ("rnn", lambda: Classifier(nn.RNN), (IDS,)),
    ("lstm", lambda: Classifier(nn.LSTM, 2, True), (IDS,)),
    ("gru", lambda: Classifier(nn.GRU, 2), (IDS,)),
    ("multi-head attention", lambda: nn.MultiheadAttention(16, 2, batch_first=True), (TOKENS, TOKENS, TOKENS)),
    ("embedding bag", lambda: nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 2), nn.GELU()), (IDS,)),
    (
        "encoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        (TOKENS,),
    ),
    (
        "decoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, activation="gelu"), 1),
        (TOKENS, TOKENS),
    ),
]


@pytest.mark.parametrize(("make", "inputs"), [n[1:] for n in NETWORKS], ids=[n[0] for n in NETWORKS])
def test_networks_price_completely(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    trained = price_module(make(), *inputs, backward=True)
    with torch.no_grad():
        answered = price_module(make().eval(), *inputs)
    with torch.inference_mode():
        inferred = price_module(make().eval(), *inputs)
    for record in (trained, answered, inferred):
        assert record.flops() > 0
        assert all(c.total_flops >= 0 and c.total_bytes >= 0 for _, c in record.calls)
    # A backward has twice the matrix work of a forward, less the gradient of the inputs.
    assert 1.5 < trained.flops() / answered.flops() < 4
    assert inferred.flops() == pytest.approx(answered.flops(), rel=0.1)


def test_a_residual_block_equals_the_flop_counter() -> None:
    block = ResidualBlock(3, 8, 2).to(torch.bfloat16)
    x = IMAGE.to(torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    assert price_module(block, x, backward=True).flops("bf16") == counter.get_total_flops()


def test_an_encoder_layer_counts_the_same_fused_and_apart() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, dtype=torch.bfloat16)
    apart = price_module(layer.train(), TOKENS.to(torch.bfloat16))
    with torch.no_grad():
        fused = price_module(layer.eval(), TOKENS.to(torch.bfloat16))
    assert apart.flops("bf16") == fused.flops("bf16") == 2 * 5 * 2 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 4 * 5 * 5 * 16


def test_a_fused_lstm_is_serial_over_its_steps() -> None:
    lstm = nn.LSTM(12, 16, dtype=torch.bfloat16)
    record = price_module(lstm, torch.empty(5, 2, 12, dtype=torch.bfloat16))
    fused = record.named("mkldnn_rnn_layer")
    if not fused:
        pytest.skip("this build of torch does not fuse an LSTM on the CPU")
    (cost,) = fused
    assert cost.flops["bf16"] == 2 * 5 * 2 * 4 * 16 * (12 + 16)
    assert (cost.primitive, cost.serial_steps) == (Primitive.SEQUENTIAL_STATE, 5)
    assert cost.size == (5, 2, 12, 16)


def test_a_whole_training_step_prices() -> None:
    with recording() as record:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        loss = F.cross_entropy(model(torch.empty(6, 8)), torch.empty(6, dtype=torch.int64))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert {"aten::addmm", "aten::mm", "aten::_fused_adamw_", "aten::_foreach_norm.Scalar"} <= record.names
