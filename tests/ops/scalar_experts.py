"""Mixture of experts, row by row in plain Python."""

from __future__ import annotations

import math
from typing import Any

from .counted import Counted, exp, matmul, maximum, total, transpose
from .scalar_dense import gated_activation


def _softmax(row: Any) -> Any:
    peak = maximum(row)
    weights = [exp(x - peak) for x in row]
    denominator = total(weights)
    return [w / denominator for w in weights]


def _sigmoid(x: Counted) -> Counted:
    return 1 / (exp(-x) + 1)


def _greatest(values: Any, k: int) -> list[int]:
    """Places of the k greatest, each by one pass over all."""
    left, places = list(values), []
    for _ in range(k):
        best, place = Counted(-math.inf), -1
        for i, value in enumerate(left):
            if value > best:
                best, place = value, i
        places.append(place)
        left[place] = Counted(-math.inf)
    return places


def route(
    logits: Any,
    bias: Any,
    top_k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> Any:
    weights, experts = [], []
    for row in logits:
        scores = _softmax(row) if scoring == "softmax" else [_sigmoid(x) for x in row] if scoring == "sigmoid" else row
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
        if groups > 1:
            size = len(row) // groups
            members = [choice[g * size : (g + 1) * size] for g in range(groups)]
            if group_score == "max":
                ranks = [maximum(m) for m in members]
            else:
                ranks = []
                for m in members:
                    first, second = _greatest(m, 2)
                    ranks.append(m[first] + m[second])
            kept = _greatest(ranks, top_groups)
            choice = [c if i // size in kept else Counted(-math.inf) for i, c in enumerate(choice)]
        chosen = _greatest(choice, top_k)
        picked = [scores[i] for i in chosen]
        if scoring == "softmax_topk":
            picked = _softmax(picked)
        elif normalize:
            denominator = total(picked)
            if scoring == "sigmoid":
                denominator = denominator + 1e-20
            picked = [p / denominator for p in picked]
        weights.append(picked if scale == 1.0 else [p * scale for p in picked])
        experts.append(chosen)
    return weights, experts


def route_backward(grad: Any, logits: Any, experts: Any, scoring: str, normalize: bool, scale: float) -> Any:
    out = []
    for g_row, row, chosen in zip(grad, logits, experts, strict=True):
        g = g_row if scale == 1.0 else [x * scale for x in g_row]
        new = [Counted(0) for _ in row]
        if scoring == "softmax_topk":
            probs = _softmax([row[i] for i in chosen])
            inner = total(a * p for a, p in zip(g, probs, strict=True))
            for i, a, p in zip(chosen, g, probs, strict=True):
                new[i] = p * (a - inner)
            out.append(new)
            continue
        scores = _softmax(row) if scoring == "softmax" else {i: _sigmoid(row[i]) for i in chosen}
        picked = [scores[i] for i in chosen]
        if normalize:
            denominator = total(picked)
            if scoring == "sigmoid":
                denominator = denominator + 1e-20
            inner = total(a * (p / denominator) for a, p in zip(g, picked, strict=True))
            g = [(a - inner) / denominator for a in g]
        if scoring == "sigmoid":
            for i, a, p in zip(chosen, g, picked, strict=True):
                new[i] = a * p * (1 - p)
        else:
            inner = total(a * p for a, p in zip(g, picked, strict=True))
            for i, a in zip(chosen, g, strict=True):
                new[i] = a
            new = [s * (a - inner) for s, a in zip(scores, new, strict=True)]
        out.append(new)
    return out


def permute(x: Any, experts: Any, num_experts: int) -> Any:
    flat = [expert for row in experts for expert in row]
    source = sorted(range(len(flat)), key=lambda r: flat[r])
    return [x[r // len(experts[0])] for r in source], source, [flat.count(e) for e in range(num_experts)]


def permute_backward(grad: Any, source: list[int], top_k: int) -> Any:
    rows = [grad[source.index(r)] for r in range(len(source))]
    return [[total(column) for column in transpose(rows[t : t + top_k])] for t in range(0, len(rows), top_k)]


def unpermute(y: Any, weights: Any, source: list[int]) -> Any:
    out = []
    for t, row in enumerate(weights):
        rows = [y[source.index(t * len(row) + k)] for k in range(len(row))]
        out.append([total(v * w for v, w in zip(column, row, strict=True)) for column in transpose(rows)])
    return out


def unpermute_backward(grad: Any, y: Any, weights: Any, source: list[int]) -> Any:
    top_k = len(weights[0])
    grad_weights: Any = [[None] * top_k for _ in weights]
    grad_y = []
    for row, place in zip(y, source, strict=True):
        t, k = divmod(place, top_k)
        grad_y.append([g * weights[t][k] for g in grad[t]])
        grad_weights[t][k] = total(g * v for g, v in zip(grad[t], row, strict=True))
    return grad_y, grad_weights


def _by_expert(rows: Any, counts: list[int]) -> list[Any]:
    starts = [sum(counts[:e]) for e in range(len(counts))]
    return [rows[start : start + count] for start, count in zip(starts, counts, strict=True)]


def grouped_linear(x: Any, weight: Any, bias: Any, counts: list[int]) -> Any:
    out = []
    for e, rows in enumerate(_by_expert(x, counts)):
        if rows:
            product = matmul(rows, transpose(weight[e]))
            out += product if bias is None else [[a + b for a, b in zip(r, bias[e], strict=True)] for r in product]
    return out


def grouped_gated_linear(x: Any, weight: Any, bias: Any, counts: list[int], kind: str) -> Any:
    return gated_activation(grouped_linear(x, weight, bias, counts), kind)


def grouped_input_grad(grad: Any, weight: Any, counts: list[int]) -> Any:
    return [row for e, rows in enumerate(_by_expert(grad, counts)) if rows for row in matmul(rows, weight[e])]


def grouped_weight_grad(grad: Any, x: Any, counts: list[int]) -> Any:
    zeros = [[Counted(0) for _ in x[0]] for _ in grad[0]]
    pairs = zip(_by_expert(grad, counts), _by_expert(x, counts), strict=True)
    return [matmul(transpose(g), rows) if g else zeros for g, rows in pairs]


def grouped_bias_grad(grad: Any, counts: list[int]) -> Any:
    return [
        [total(column) for column in transpose(rows)] if rows else [Counted(0) for _ in grad[0]]
        for rows in _by_expert(grad, counts)
    ]
