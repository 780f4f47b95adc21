"""cuDNN's fused recurrent operators, priced from shapes alone as a GPU would dispatch them."""

from __future__ import annotations

import pytest
import torch

from rooflight.ops import aten
from rooflight.ops.cost import Cost, Primitive

T, B, WIDTH, H, LAYERS, DIRECTIONS = 5, 2, 12, 16, 2, 2
BF16 = torch.bfloat16
MODES = {"rnn": (1, 1), "lstm": (2, 4), "gru": (3, 3)}


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16, device="meta")


def _weights(gates: int) -> list[torch.Tensor]:
    weights = []
    for layer in range(LAYERS):
        width = WIDTH if layer == 0 else H * DIRECTIONS
        for _ in range(DIRECTIONS):
            weights += [_meta(gates * H, width), _meta(gates * H, H), _meta(gates * H), _meta(gates * H)]
    return weights


def _multiply_adds(gates: int) -> int:
    """Every layer, direction, step, sequence, gate and hidden unit meets the layer's input and its own state."""
    count = 0
    for layer in range(LAYERS):
        for _direction in range(DIRECTIONS):
            for _step in range(T):
                for _sequence in range(B):
                    count += gates * H * ((WIDTH if layer == 0 else H * DIRECTIONS) + H)
    return count


def _cudnn(mode: int, gates: int, *, backward: bool = False) -> tuple[Cost, list[torch.Tensor]]:
    x, state, weights = _meta(T, B, WIDTH), _meta(LAYERS * DIRECTIONS, B, H), _weights(gates)
    out, packed = _meta(T, B, H * DIRECTIONS), _meta(sum(w.numel() for w in weights))
    shape = (mode, H, 0, LAYERS, False, 0.0, True, True, [], None)
    if backward:
        func = torch.ops.aten._cudnn_rnn_backward.default
        args = (x, weights, 4, packed, state, None, out, out.clone(), None, None, *shape, _meta(1), [True] * 4)
        output = (_meta(T, B, WIDTH), _meta(LAYERS * DIRECTIONS, B, H), None, [torch.empty_like(w) for w in weights])
    else:
        func = torch.ops.aten._cudnn_rnn.default
        args = (x, weights, 4, packed, state, None, *shape)
        output = (out, state.clone(), None, _meta(1), packed)
    cost = aten.price(func, args, {}, output)
    assert cost is not None
    return cost, weights


@pytest.mark.parametrize("kind", MODES)
def test_cudnn_forward_and_backward_equal_nested_loops(kind: str) -> None:
    mode, gates = MODES[kind]
    forward, weights = _cudnn(mode, gates)
    backward, _ = _cudnn(mode, gates, backward=True)
    assert forward.flops["bf16"] == 2 * _multiply_adds(gates)
    assert backward.flops["bf16"] == 2 * forward.flops["bf16"]
    assert forward.serial_steps == backward.serial_steps == T * LAYERS
    assert forward.primitive is Primitive.SEQUENTIAL_STATE
    # The weights are handed over twice, apart and packed, and read once.
    read = 2 * (T * B * WIDTH + LAYERS * DIRECTIONS * B * H + sum(w.numel() for w in weights))
    assert forward.bytes_read == read
    assert forward.bytes_written == 2 * (T * B * H * DIRECTIONS + LAYERS * DIRECTIONS * B * H + 1)


def test_packed_sequences_count_their_tokens() -> None:
    weights, state = _weights(4), _meta(LAYERS * DIRECTIONS, 2, H)
    args = (
        _meta(7, WIDTH),
        weights,
        4,
        None,
        state,
        state,
        2,
        H,
        0,
        LAYERS,
        False,
        0.0,
        True,
        True,
        [2, 2, 2, 1],
        None,
    )
    output = (_meta(7, H * DIRECTIONS), state, state, _meta(1), _meta(1))
    cost = aten.price(torch.ops.aten._cudnn_rnn.default, args, {}, output)
    assert cost is not None
    assert cost.flops["bf16"] == 2 * _multiply_adds(4) * 7 // (T * B)
    assert cost.serial_steps == 4 * LAYERS


def test_one_fused_cell_costs_its_gates() -> None:
    gates, cell = _meta(B, 4 * H), _meta(B, H)
    output = (_meta(B, H), _meta(B, H), _meta(B, 4 * H))
    cost = aten.price(torch.ops.aten._thnn_fused_lstm_cell.default, (gates, gates.clone(), cell), {}, output)
    assert cost is not None
    # Four additions, three sigmoids of four, two tanh, two products and a sum for the cell, one for the output.
    assert cost.total_flops == (4 + 3 * 4 + 2 + 3 + 1) * B * H
