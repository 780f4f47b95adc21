"""Recurrent layers that a backend fuses: every time step waits for the one before.

Legend: T time steps, B sequences, I input width, H hidden width, G gates (4 LSTM, 3 GRU, 1 RNN).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rooflight.ops.aten.registry import Call, prices, tensors_in
from rooflight.ops.aten.shapes import product
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Primitive, elementwise_cost, precision_of
from rooflight.ops.cost import tensor_bytes as bytes_of

# cuDNN's and oneDNN's numbers: 0 RNN with ReLU, 1 with tanh, 2 LSTM, 3 GRU.
GATES = {0: 1, 1: 1, 2: 4, 3: 3}
# Operations a hidden element and step, after the multiplies. RNN: add both products, tanh or ReLU.
# LSTM: 4 additions, 3 sigmoids (4 each), 2 tanh, c = f·c + i·g (3), h = o·tanh c (1).
# GRU: 3 additions, 2 sigmoids, r·h (1), tanh, h' = n + z·(h − n) (3).
CELL_FLOPS = {0: 2, 1: 2, 2: 22, 3: 16}
# Derivatives of the same: a sigmoid's or tanh's costs 3, and each product of two gives two products.
CELL_BACKWARD_FLOPS = {0: 3, 1: 3, 2: 27, 3: 22}


def _layers(
    matrices: Iterable[Tensor],
    tokens: Count,
    steps: Count,
    cells: Count,
    per_cell: int,
    *,
    passes: int,
    size: tuple[Count, ...],
    reads: Iterable[Tensor | None],
    writes: Iterable[Tensor | None],
) -> Cost:
    """2·tokens·(I + H)·G·H FLOPs a layer and direction, a pass; the gates on the vector units."""
    matrices = tuple(matrices)
    precision = precision_of(matrices[0])
    weights: Count = 0
    for matrix in matrices:
        weights = weights + matrix.numel()
    flops: dict[str, Count] = {precision: 2 * tokens * weights * passes}
    flops[VECTOR] = flops.get(VECTOR, 0) + per_cell * cells
    return Cost(
        flops=flops,
        bytes_read=bytes_of(reads),
        bytes_written=bytes_of(writes),
        primitive=Primitive.SEQUENTIAL_STATE,
        access=Access.SEQUENTIAL,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=size,
        precision=precision,
        curve="recurrent",
        serial_steps=steps,
    )


def _tokens(x: Tensor, batch_sizes: list[int], batch_first: bool) -> tuple[Count, Count]:
    """(tokens, steps) of a padded (T, B, I) or (B, T, I) input, or of a packed one."""
    if batch_sizes:
        return sum(batch_sizes), len(batch_sizes)
    # oneDNN is called a layer at a time with the time first, whatever batch_first says of the module.
    return product(x.shape[:-1]), x.shape[1] if batch_first else x.shape[0]


@prices("aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward")
def onednn(call: Call) -> Cost:
    """One layer in one direction, weights (G·H, I) and (G·H, H); the backward makes two products of each."""
    backward = call.name.endswith("backward")
    x, mode, h = call["input"], call["mode"], call["hidden_size"]
    names = ("weight1", "weight2") if backward else ("weight0", "weight1")
    matrices = [call[n] for n in names]
    tokens, steps = _tokens(x, [], False)
    biases = 2 * GATES[mode] if call["has_biases"] else 0
    per_cell = (CELL_BACKWARD_FLOPS if backward else CELL_FLOPS)[mode] + biases
    return _layers(
        matrices, tokens, steps, tokens * h, per_cell, passes=2 if backward else 1,
        size=(steps, tokens // steps, x.shape[-1], h), reads=call.reads, writes=call.writes,
    )  # fmt: skip


@prices("aten::_cudnn_rnn", "aten::_cudnn_rnn_backward", "aten::miopen_rnn", "aten::miopen_rnn_backward")
def cudnn(call: Call) -> Cost:
    """All layers and directions in one call. Layers wait for each other, the two directions of one do not."""
    backward = call.name.endswith("backward")
    x, mode, h, layers = call["input"], call["mode"], call["hidden_size"], call["num_layers"]
    tokens, steps = _tokens(x, call["batch_sizes"], call["batch_first"])
    directions = 2 if call["bidirectional"] else 1
    weights: list[Tensor] = call["weight"]
    matrices = [w for w in weights if w.ndim == 2]
    biases = 2 * GATES[mode] if len(matrices) < len(weights) else 0
    per_cell = (CELL_BACKWARD_FLOPS if backward else CELL_FLOPS)[mode] + biases
    # weight_buf holds the same weights again, packed: one of the two is read, and the forward hands it back untouched.
    packed = call.get("weight_buf")
    writes = call.outputs if backward or packed is None else tuple(tensors_in(call.output[:4]))
    reads = [t for t in call.reads if packed is None or t is not packed]
    return _layers(
        matrices, tokens, steps * layers, tokens * h * layers * directions, per_cell,
        passes=2 if backward else 1, size=(steps, tokens // steps, x.shape[-1], h), reads=reads, writes=writes,
    )  # fmt: skip


CELLS = {
    "_thnn_fused_lstm_cell": CELL_FLOPS[2],
    "_thnn_fused_gru_cell": CELL_FLOPS[3],
    "_thnn_fused_lstm_cell_backward_impl": CELL_BACKWARD_FLOPS[2],
    "_thnn_fused_lstm_cell_backward": CELL_BACKWARD_FLOPS[2],
    "_thnn_fused_gru_cell_backward": CELL_BACKWARD_FLOPS[3],
}


@prices(*(f"aten::{name}" for name in CELLS))
def cell(call: Call) -> Cost:
    """The gates of one step, after the multiplies that a matrix multiply has done."""
    state: Tensor = call.get("cx", "hx", "grad_hy")
    per_cell = CELLS[call.name]
    if call.get("input_bias") is not None or call.get("has_bias"):
        per_cell += 2 * (4 if "lstm" in call.name else 3)
    return elementwise_cost(
        per_cell * state.numel(),
        call.reads,
        call.writes,
        size=(state.numel(),),
        primitive=Primitive.SEQUENTIAL_STATE,
    ).named("elementwise")


@prices("aten::_cudnn_rnn_flatten_weight")
def flatten_weight(call: Call) -> Cost:
    """Weights copied into the one buffer that cuDNN wants."""
    return elementwise_cost(
        0, call["weight_arr"], call.writes, size=(call.first_output().numel(),), primitive=Primitive.DATA_MOVEMENT
    ).named("copy")


@prices("aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward")
def pack(call: Call) -> Cost:
    """Padding cut out of a batch of sequences."""
    out = call.first_output()
    return elementwise_cost(
        0,
        call.reads,
        call.writes,
        size=(out.numel(),),
        primitive=Primitive.DATA_MOVEMENT,
        access=Access.STRIDED,
        movement=(Movement.GATHER,),
    ).named("copy")


@prices("aten::_ctc_loss", "aten::_ctc_loss_backward")
def ctc_loss(call: Call) -> Cost:
    """Forward recursion over T steps and 2·L + 1 labels, each a log-sum-exp of three (10 operations) and an addition.

    The backward runs the mirrored recursion and combines the two.
    """
    alpha: Tensor = call.get("log_alpha") if call.name.endswith("backward") else call.outputs[1]
    return elementwise_cost(
        11 * alpha.numel() * (2 if call.name.endswith("backward") else 1),
        call.reads,
        call.writes,
        size=tuple(alpha.shape),
        primitive=Primitive.SEQUENTIAL_STATE,
        movement=(Movement.GATHER,),
    ).named("recurrent")
