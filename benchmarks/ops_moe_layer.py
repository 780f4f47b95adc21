"""A mixture-of-experts layer for `ops_moe`: its models, and each operation beside torch's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflight.ops import dispatch, grouped, routing
from rooflight.ops.activation import gated_activation
from rooflight.ops.grouped_gated import grouped_gated_linear
from rooflight.ops.kernels.grouped import gated_linear, linear

INPUTS = 8
BF16 = torch.bfloat16
# Ours and torch's, of the inputs of a number; bytes that must be moved, FLOPs.
Compared = tuple[Callable[[int], Any], Callable[[int], Any], float, float]


@dataclass(frozen=True)
class Model:
    """Shapes of one layer, and how its router scores."""

    experts: int
    top_k: int
    width: int
    ffn: int
    bias: bool
    scoring: str
    kind: str


MODELS = {
    "qwen3-30b-a3b": Model(128, 8, 2048, 768, False, "softmax", "silu"),
    "gpt-oss-20b": Model(32, 4, 2880, 2880, True, "softmax_topk", "clamped_swiglu"),
    "mixtral-8x7b": Model(8, 2, 4096, 14336, False, "softmax", "silu"),
}


class Layer:
    """A model's weights, and routings of so many tokens."""

    def __init__(self, model: Model, tokens: int, weights: tuple[Any, ...]):
        self.model, self.tokens = model, tokens
        self.up, self.up_bias, self.down, self.down_bias = weights
        self.x = [torch.randn(tokens, model.width, device="cuda", dtype=BF16) for _ in range(INPUTS)]
        # Different numbers in bf16, for torch and we choose differently among equals.
        ranks = [torch.rand(tokens, model.experts, device="cuda").argsort(-1) for _ in range(INPUTS)]
        self.logits = [(rank / 16 - model.experts / 32).to(BF16) for rank in ranks]
        routes = [self.route(i) for i in range(INPUTS)]
        self.weights, self.chosen = [r[0] for r in routes], [r[1] for r in routes]
        sorts = [dispatch._permute(self.x[i], self.chosen[i], model.experts) for i in range(INPUTS)]
        self.rows, self.sources, self.counts = ([s[i] for s in sorts] for i in range(3))
        self.h = [torch.randn(tokens * model.top_k, model.ffn, device="cuda", dtype=BF16) for _ in range(INPUTS)]
        self.hit = statistics.mean(int((c > 0).sum()) for c in self.counts)

    def route(self, i: int, run: Callable[..., Any] = routing._route) -> Any:
        return run(self.logits[i], None, self.model.top_k, self.model.scoring, True, 1.0, 1, 1, "max")

    def through(self, i: int, ours: bool) -> Tensor:
        """The whole layer, from the logits on."""
        experts = self.model.experts
        if ours:
            weights, chosen = self.route(i, routing.route)
            rows, source, counts = dispatch.permute(self.x[i], chosen, experts)
            h = grouped_gated_linear(rows, self.up, self.up_bias, counts, self.model.kind)
            return dispatch.unpermute(grouped.grouped_linear(h, self.down, self.down_bias, counts), weights, source)
        weights, chosen = self.route(i)
        rows, source, counts = dispatch._permute(self.x[i], chosen, experts)
        h = gated_activation(torchs(rows, self.up, self.up_bias, counts), self.model.kind)
        return dispatch._unpermute(torchs(h, self.down, self.down_bias, counts), weights, source)


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    out = grouped._torchs_linear(x, weight, counts)
    return out if bias is None else out + bias.repeat_interleave(counts, dim=0, output_size=x.shape[0])


def weights_of(model: Model) -> tuple[Any, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=BF16) / shape[-1] ** 0.5

    up, down = draw(model.experts, 2 * model.ffn, model.width), draw(model.experts, model.width, model.ffn)
    if not model.bias:
        return up, None, down, None
    return up, draw(model.experts, 2 * model.ffn), down, draw(model.experts, model.width)


def operations(layer: Layer) -> dict[str, Compared]:
    m, t = layer.model, layer.tokens
    rows = t * m.top_k
    row_bytes = 2 * m.width
    up_bytes, down_bytes = (layer.hit * w[0].numel() * 2 for w in (layer.up, layer.down))
    up_bytes += 2 * rows * (m.width + 2 * m.ffn)
    down_bytes += 2 * rows * (m.width + m.ffn)
    flops = 2.0 * rows * m.width * m.ffn
    up, down = (layer.up, layer.up_bias), (layer.down, layer.down_bias)
    found: dict[str, Compared] = {
        "route": (lambda i: layer.route(i, routing.route), layer.route, 2.0 * t * m.experts + 12 * rows, 0),
        "permute": (
            lambda i: dispatch.permute(layer.x[i], layer.chosen[i], m.experts),
            lambda i: dispatch._permute(layer.x[i], layer.chosen[i], m.experts),
            (t + rows) * row_bytes + 16.0 * rows,
            0,
        ),
        "up product": (
            lambda i: linear(layer.rows[i], *up, layer.counts[i]),
            lambda i: torchs(layer.rows[i], *up, layer.counts[i]),
            up_bytes,
            2 * flops,
        ),
        "up, activation": (
            lambda i: gated_linear(layer.rows[i], *up, layer.counts[i], m.kind),
            lambda i: gated_activation(torchs(layer.rows[i], *up, layer.counts[i]), m.kind),
            up_bytes,
            2 * flops,
        ),
        "down product": (
            lambda i: linear(layer.h[i], *down, layer.counts[i]),
            lambda i: torchs(layer.h[i], *down, layer.counts[i]),
            down_bytes,
            flops,
        ),
        "unpermute": (
            lambda i: dispatch.unpermute(layer.rows[i], layer.weights[i], layer.sources[i]),
            lambda i: dispatch._unpermute(layer.rows[i], layer.weights[i], layer.sources[i]),
            (t + rows) * row_bytes + 12.0 * rows,
            0,
        ),
        "layer": (
            lambda i: layer.through(i, True),
            lambda i: layer.through(i, False),
            up_bytes + down_bytes,
            3 * flops,
        ),
    }
    if t >= 1024:
        found |= backwards(layer, rows, row_bytes)
    return found


def backwards(layer: Layer, rows: int, row_bytes: int) -> dict[str, Compared]:
    m, t = layer.model, layer.tokens

    def route_args(i: int) -> tuple[Any, ...]:
        return layer.weights[i], layer.logits[i], layer.chosen[i], m.scoring, True, 1.0

    def sum_args(i: int) -> tuple[Any, ...]:
        return layer.x[i], layer.rows[i], layer.weights[i], layer.sources[i]

    return {
        "route back": (
            lambda i: routing.route_backward(*route_args(i)),
            lambda i: routing._route_backward(*route_args(i)),
            4.0 * t * m.experts + 12 * rows,
            0,
        ),
        "permute back": (
            lambda i: dispatch.permute_backward(layer.rows[i], layer.sources[i], m.top_k),
            lambda i: dispatch._permute_backward(layer.rows[i], layer.sources[i], m.top_k),
            (t + rows) * row_bytes + 8.0 * rows,
            0,
        ),
        "unpermute back": (
            lambda i: dispatch.unpermute_backward(*sum_args(i)),
            lambda i: dispatch._unpermute_backward(*sum_args(i)),
            (t + 2.0 * rows) * row_bytes + 16 * rows,
            0,
        ),
        "bias gradient": (
            lambda i: grouped.grouped_bias_grad(layer.rows[i], layer.counts[i]),
            lambda i: grouped._bias_grad(layer.rows[i], layer.counts[i]),
            (rows + m.experts) * float(row_bytes),
            0,
        ),
    }
