"""Mixture-of-experts layers step by step, for `bench ops`: choice, rows to experts, products, rows back.

Legend: T tokens  X experts  K experts a token  R = T·K rows  D width  N outputs of the weights
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rooflight.ops.dispatch import permute, unpermute
from rooflight.ops.grouped import grouped_linear
from rooflight.ops.grouped_gated import grouped_gated_linear
from rooflight.ops.routing import route
from rooflight.workload.op_bench.case import Args, Draw, Operation
from rooflight.workload.op_bench.dense import plain_gated, rows_first


def _chosen(draw: Draw, tokens: int, experts: int, top_k: int) -> Tensor:
    return draw(tokens, experts, dtype=torch.float32).topk(top_k).indices


def _source(experts_TK: Tensor) -> Tensor:
    return experts_TK.flatten().argsort(stable=True)


def _plain_route(logits_TX: Tensor, top_k: int) -> Args:
    weights_TK, experts_TK = logits_TX.softmax(-1).topk(top_k)
    return weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK


def _plain_permute(x_TD: Tensor, experts_TK: Tensor, experts: int) -> Args:
    source_R = _source(experts_TK)
    counts_X = torch.bincount(experts_TK.flatten(), minlength=experts)
    return x_TD[source_R // experts_TK.shape[1]], source_R, counts_X


def _unpermute_inputs(draw: Draw, tokens: int, experts: int, top_k: int, width: int) -> Args:
    experts_TK = _chosen(draw, tokens, experts, top_k)
    weights_TK = draw(tokens, top_k, dtype=torch.float32).softmax(-1)
    return draw(tokens * top_k, width), weights_TK, _source(experts_TK)


def _plain_unpermute(y_RD: Tensor, weights_TK: Tensor, source_R: Tensor) -> Tensor:
    y_TKD = y_RD[source_R.argsort()].unflatten(0, weights_TK.shape)
    return (y_TKD * weights_TK.unsqueeze(-1)).sum(1).to(y_RD.dtype)


def _grouped_inputs(draw: Draw, tokens: int, experts: int, top_k: int, outputs: int, width: int) -> Args:
    chosen_R = _chosen(draw, tokens, experts, top_k).flatten()
    counts_X = chosen_R.new_zeros((experts,)).scatter_add_(0, chosen_R, torch.ones_like(chosen_R))
    return draw(tokens * top_k, width), draw(experts, outputs, width) / width**0.5, counts_X


def _plain_grouped(x_RD: Tensor, weight_XND: Tensor, counts_X: Tensor) -> Tensor:
    parts = x_RD.split(counts_X.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_XND)])


def _label(tokens: int, experts: int, top_k: int, *sizes: int) -> str:
    return ", ".join([f"{tokens} to {top_k} of {experts}", *(["×".join(map(str, sizes))] if sizes else [])])


OPERATIONS = [
    Operation(
        "route",
        "experts and weights of each token",
        make=lambda draw, tokens, experts, top_k: (draw(tokens, experts, dtype=torch.float32), top_k),
        ours=lambda logits, top_k: route(logits, None, top_k, "softmax", True),
        plain=_plain_route,
        label=_label,
        wrt=(0,),
        trains=rows_first,
        wide=torch.float64,
    ),
    Operation(
        "permute",
        "rows ordered by expert",
        make=lambda draw, tokens, experts, top_k, width: (
            *(draw(tokens, width), _chosen(draw, tokens, experts, top_k)),
            experts,
        ),
        ours=permute,
        plain=_plain_permute,
        label=_label,
        wrt=(0,),
        trains=rows_first,
        compiles=False,
    ),
    Operation(
        "unpermute",
        "weighted sums of experts' rows, back in the tokens' order",
        make=_unpermute_inputs,
        ours=unpermute,
        plain=_plain_unpermute,
        label=_label,
        wrt=(0, 1),
        trains=rows_first,
    ),
    Operation(
        "grouped_linear",
        "a product an expert; eager: one after the other",
        make=_grouped_inputs,
        ours=lambda x, weight, counts: grouped_linear(x, weight, None, counts),
        plain=_plain_grouped,
        label=_label,
        wrt=(0, 1),
        trains=rows_first,
        compiles=False,
    ),
    Operation(
        "grouped_gated_linear",
        "a product an expert and SwiGLU of its gates and values, at inference; eager: one after the other",
        make=_grouped_inputs,
        ours=lambda x, weight, counts: grouped_gated_linear(x, weight, None, counts, "silu"),
        plain=lambda *args: plain_gated(_plain_grouped(*args), "silu"),
        label=_label,
        compiles=False,
    ),
]
