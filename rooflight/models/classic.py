"""The computational patterns as small modules: MLP, CNN, recurrent networks, and a bare attention layer.

Legend: B batch, I inputs, O outputs, C input channels, F filters, X·Y positions, T time steps, H hidden width or heads,
N tokens, D model width, E head width. A multiply-add is 2 FLOPs; memory is in elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rooflight.errors import InvalidValue


class MLP(nn.Module):
    """Linear layers with ReLU between them: every output meets every input.

    Memory: I·O weights a layer. Computation: I·O multiply-adds an input. Movement: an input is broadcast to all O
    outputs and each output is a reduction over I; all weights are read once for the whole batch, in sequence.
    """

    def __init__(self, sizes: Sequence[int], bias: bool = False):
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise InvalidValue(f"MLP sizes {tuple(sizes)} are not two or more positive widths; give e.g. (784, 100)")
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes))

    def forward(self, x_BI: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x_BI = torch.relu(layer(x_BI))
        return self.layers[-1](x_BI)


class CNN(nn.Module):
    """Convolutions with ReLU between them: one window of weights slides over every position.

    Memory: F·C·k² weights a layer, and F·X·Y activations. Computation: F·C·k² multiply-adds at each of X·Y positions.
    Movement: the weights are broadcast to all positions; neighbouring windows overlap, so inputs are gathered with
    strides and reduced over C·k².
    """

    def __init__(self, channels: Sequence[int], kernel: int = 3, bias: bool = False):
        super().__init__()
        if len(channels) < 2 or min(channels) < 1:
            raise InvalidValue(f"CNN channels {tuple(channels)} are not two or more positive counts; give e.g. (1, 32)")
        if kernel < 1 or kernel % 2 == 0:
            raise InvalidValue(f"CNN kernel {kernel} cannot keep the image's size; use an odd number such as 3")
        self.layers = nn.ModuleList(
            nn.Conv2d(c, f, kernel, padding=kernel // 2, bias=bias) for c, f in pairwise(channels)
        )

    def forward(self, x_BCXY: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x_BCXY = torch.relu(layer(x_BCXY))
        return self.layers[-1](x_BCXY)


CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    """A recurrent layer: each step needs the state that the last one left.

    Memory: G·H·(I + H) weights with G = 1 gates (rnn), 4 (lstm) or 3 (gru), and H of state (lstm 2·H) a sequence.
    Computation: G·H·(I + H) multiply-adds a step and sequence. Movement: the T steps run one after the other, and each
    reads the H·H weights of the state again unless they stay on the chip; only the I·H part can be done for all T
    steps at once.
    """

    def __init__(self, kind: str, input: int, hidden: int, bias: bool = False):
        super().__init__()
        if kind not in CELLS:
            raise InvalidValue(f"recurrent kind {kind!r} is unknown; use {', '.join(CELLS)}")
        self.cell = CELLS[kind](input, hidden, bias=bias)

    def forward(self, x_TBI: Tensor) -> Tensor:
        return self.cell(x_TBI)[0]


class AttentionLayer(nn.Module):
    """Multi-head attention alone, written out: which token matters to which is computed from the tokens.

    Memory: no weights of its own; N² scores a head are stored. Computation: N²·D multiply-adds for the scores and again
    for the context. Movement: each query is broadcast to all keys, the softmax reduces N scores to a sum and spreads
    it again, and values are gathered by weights that depend on the data.
    """

    def __init__(self, width: int, heads: int = 1):
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise InvalidValue(f"{heads} heads do not divide the width {width}; use a divisor of {width}")
        self.heads = heads

    def forward(self, q_BND: Tensor, k_BND: Tensor, v_BND: Tensor) -> Tensor:
        q_BHNE, k_BHNE, v_BHNE = (
            x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x_BND in (q_BND, k_BND, v_BND)
        )
        scores_BHNN = q_BHNE @ k_BHNE.transpose(-1, -2) / math.sqrt(q_BHNE.shape[-1])
        return (scores_BHNN.softmax(-1) @ v_BHNE).transpose(1, 2).flatten(-2)


Example = tuple[nn.Module, tuple[Tensor, ...]]


def mlp() -> Example:
    """784 → 100 for one image of 28 × 28: 78,400 weights and as many multiply-adds."""
    return MLP((784, 100)), (torch.randn(1, 784),)


def cnn() -> Example:
    """32 filters of 3 × 3 over one image of 28 × 28: 288 weights, used at each of 784 positions."""
    return CNN((1, 32)), (torch.randn(1, 1, 28, 28),)


def rnn() -> Example:
    """100 → 128 over 16 steps: 12,800 + 16,384 weights and as many multiply-adds a step."""
    return Recurrent("rnn", 100, 128), (torch.randn(16, 1, 100),)


def lstm() -> Example:
    """100 → 128 over 16 steps, four gates."""
    return Recurrent("lstm", 100, 128), (torch.randn(16, 1, 100),)


def gru() -> Example:
    """100 → 128 over 16 steps, three gates."""
    return Recurrent("gru", 100, 128), (torch.randn(16, 1, 100),)


def attention() -> Example:
    """1,024 tokens of width 512 in 8 heads: 2·N²·D multiply-adds and 8·N² stored scores."""
    q, k, v = torch.randn(3, 1, 1024, 512).unbind()
    return AttentionLayer(512, 8), (q, k, v)
