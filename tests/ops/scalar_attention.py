"""Attention in all its forms, one query and one visible key at a time in plain Python."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from .counted import Counted, dot, exp, log, maximum, tanh, total
from .scalar_dense import rms_norm, rotary


def _visible(query: int, queries: int, keys: int, causal: bool, window: int) -> list[int]:
    """Keys that a query sees; the queries are the last of the keys' positions."""
    position = keys - queries + query
    return [key for key in range(keys) if not causal or (key <= position and (not window or position - key < window))]


def _score(q: Any, k: Any, scale: float, softcap: float) -> tuple[Counted, Counted | None]:
    score = dot(q, k) * scale
    if not softcap:
        return score, None
    t = tanh(score / softcap)
    return t * softcap, t


def _attend(q: Any, keys: list[Any], values: list[Any], scale: float, softcap: float, sink: Any) -> tuple[Any, Any]:
    """Output of one query and its logsumexp."""
    scores = [_score(q, k, scale, softcap)[0] for k in keys]
    peak = maximum(scores, -math.inf if sink is None else sink.value)
    weights = [exp(score - peak) for score in scores]
    denominator = total(weights)
    if sink is not None:
        denominator = denominator + exp(sink - peak)
    out = [dot(weights, [value[u] for value in values]) / denominator for u in range(len(values[0]))]
    return out, log(denominator) + peak


def attention(
    q: Any, k: Any, v: Any, scale: float, causal: bool, window: int, softcap: float, sinks: Any
) -> tuple[Any, Any]:
    out, lse = [], []
    for q_b, k_b, v_b in zip(q, k, v, strict=True):
        queries, heads, keys = len(q_b), len(q_b[0]), len(k_b)
        group = heads // len(k_b[0])
        rows: Any = [[None] * heads for _ in range(queries)]
        sums: Any = [[None] * queries for _ in range(heads)]
        for i in range(queries):
            seen = _visible(i, queries, keys, causal, window)
            for h in range(heads):
                sink = None if sinks is None else sinks[h]
                rows[i][h], sums[h][i] = _attend(
                    q_b[i][h],
                    [k_b[s][h // group] for s in seen],
                    [v_b[s][h // group] for s in seen],
                    scale,
                    softcap,
                    sink,
                )
        out.append(rows)
        lse.append(sums)
    return out, lse


def _zeros(like: Any) -> Any:
    return [_zeros(item) for item in like] if isinstance(like, list) else Counted(0)


def _accumulate(into: list[Counted], factor: Counted, vector: list[Counted]) -> None:
    for i, value in enumerate(vector):
        into[i] = dot([factor], [value], start=into[i])


def attention_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Any,
) -> tuple[Any, ...]:
    dq, dk, dv = _zeros(q), _zeros(k), _zeros(v)
    dsinks = [] if sinks is None else _zeros(sinks)
    for b in range(len(q)):
        queries, heads, keys = len(q[b]), len(q[b][0]), len(k[b])
        group = heads // len(k[b][0])
        for i in range(queries):
            for h in range(heads):
                g, kh = grad[b][i][h], h // group
                delta = total(x * y for x, y in zip(g, out[b][i][h], strict=True))
                for s in _visible(i, queries, keys, causal, window):
                    score, t = _score(q[b][i][h], k[b][s][kh], scale, softcap)
                    p = exp(score - lse[b][h][i])
                    _accumulate(dv[b][s][kh], p, g)
                    ds = p * (dot(g, v[b][s][kh]) - delta)
                    if t is not None:
                        ds = ds * (1 - t * t)
                    ds = ds * scale
                    _accumulate(dq[b][i][h], ds, k[b][s][kh])
                    _accumulate(dk[b][s][kh], ds, q[b][i][h])
                if sinks is not None:
                    dsinks[h] = dsinks[h] - exp(sinks[h] - lse[b][h][i]) * delta
    return dq, dk, dv, dsinks


def packed_attention(
    q: Any, k: Any, v: Any, starts: list[int], max_length: int, scale: float, window: int, softcap: float, sinks: Any
) -> tuple[Any, Any]:
    """Each document by itself."""
    out, lse = [], [[] for _ in q[0]]
    for i, j in pairwise(starts):
        if i < j:
            (rows,), (heads,) = attention([q[i:j]], [k[i:j]], [v[i:j]], scale, True, window, softcap, sinks)
            out.extend(rows)
            for row, part in zip(lse, heads, strict=True):
                row.extend(part)
    return out, lse


def packed_attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, starts: list[int], max_length: int, *rest: Any
) -> tuple[Any, ...]:
    """Each document by itself; the sinks' gradients go on from one to the next."""
    scale, window, softcap, sinks = rest
    dq, dk, dv, dsinks = [], [], [], [0.0 for _ in sinks or ()]
    for i, j in pairwise(starts):
        if i < j:
            g, a, b, c, o = ([x[i:j]] for x in (grad, q, k, v, out))
            logs = [[row[i:j] for row in lse]]
            pq, pk, pv, ps = attention_backward(g, a, b, c, o, logs, scale, True, window, softcap, sinks)
            dq, dk, dv = dq + pq[0], dk + pk[0], dv + pv[0]
            dsinks = [x + y.value for x, y in zip(dsinks, ps, strict=True)]
    return dq, dk, dv, dsinks


def attention_scores(q: Any, k: Any, scale: float) -> Any:
    out = []
    for q_b, k_b in zip(q, k, strict=True):
        heads, group = len(q_b[0]), len(q_b[0]) // len(k_b[0])
        scaled = [[[x * scale for x in head] for head in row] for row in q_b]
        out.append([[[dot(row[h], key[h // group]) for key in k_b] for row in scaled] for h in range(heads)])
    return out


def attention_scores_backward(grad: Any, q: Any, k: Any, scale: float) -> tuple[Any, Any]:
    dq, dk = _zeros(q), _zeros(k)
    for b, q_b in enumerate(q):
        group = len(q_b[0]) // len(k[b][0])
        for i, row in enumerate(q_b):
            for h, head in enumerate(row):
                for s, key in enumerate(k[b]):
                    _accumulate(dq[b][i][h], grad[b][h][i][s], key[h // group])
                    _accumulate(dk[b][s][h // group], grad[b][h][i][s], head)

    def scaled(x: Any) -> Any:
        return [scaled(item) for item in x] if isinstance(x, list) else x * scale

    return scaled(dq), scaled(dk)


def attention_softmax(scores: Any, causal: bool, window: int, softcap: float, sinks: Any) -> Any:
    out = []
    for batch in scores:
        heads = []
        for h, matrix in enumerate(batch):
            rows = []
            for i, row in enumerate(matrix):
                seen = set(_visible(i, len(matrix), len(row), causal, window))
                if softcap:
                    row = [tanh(x / softcap) * softcap for x in row]
                row = [x if s in seen else Counted(-math.inf) for s, x in enumerate(row)]
                peak = maximum(row, -math.inf if sinks is None else sinks[h].value)
                weights = [exp(x - peak) for x in row]
                denominator = total(weights)
                if sinks is not None:
                    denominator = denominator + exp(sinks[h] - peak)
                rows.append([w / denominator for w in weights])
            heads.append(rows)
        out.append(heads)
    return out


def attention_softmax_backward(grad: Any, probs: Any, scores: Any, softcap: float, sinks: bool) -> tuple[Any, Any]:
    out, dsinks = [], [Counted(0) for _ in grad[0]] if sinks else []
    for b, batch in enumerate(grad):
        heads = []
        for h, matrix in enumerate(batch):
            rows = []
            for i, row in enumerate(matrix):
                p_row = probs[b][h][i]
                inner = total(p * g for p, g in zip(p_row, row, strict=True))
                new = [p * (g - inner) for p, g in zip(p_row, row, strict=True)]
                if scores is not None:
                    slopes = [tanh(x / softcap) for x in scores[b][h][i]]
                    new = [x * (1 - t * t) for x, t in zip(new, slopes, strict=True)]
                if sinks:
                    dsinks[h] = dsinks[h] - (1 - total(p_row)) * inner
                rows.append(new)
            heads.append(rows)
        out.append(heads)
    return out, dsinks


def attention_context(probs: Any, v: Any) -> Any:
    out = []
    for p_b, v_b in zip(probs, v, strict=True):
        heads, group = len(p_b), len(p_b) // len(v_b[0])
        out.append(
            [
                [
                    [dot(p_b[h][i], [value[h // group][u] for value in v_b]) for u in range(len(v_b[0][0]))]
                    for h in range(heads)
                ]
                for i in range(len(p_b[0]))
            ]
        )
    return out


def attention_context_backward(grad: Any, probs: Any, v: Any) -> tuple[Any, Any]:
    dprobs, dv = _zeros(probs), _zeros(v)
    for b, p_b in enumerate(probs):
        group = len(p_b) // len(v[b][0])
        for h, matrix in enumerate(p_b):
            for i, row in enumerate(matrix):
                for s, p in enumerate(row):
                    dprobs[b][h][i][s] = dot(grad[b][i][h], v[b][s][h // group])
                    _accumulate(dv[b][s][h // group], p, grad[b][i][h])
    return dprobs, dv


def write_kv(k: Any, v: Any, k_cache: Any, v_cache: Any, slots: list[int]) -> None:
    block = len(k_cache[0])
    for t, slot in enumerate(slots):
        k_cache[slot // block][slot % block] = k[t]
        if v is not None:
            v_cache[slot // block][slot % block] = v[t]


def _heads_normed(x: Any, *args: Any) -> Any:
    rows = rms_norm([head for token in x for head in token], *args)
    return [rows[i : i + len(x[0])] for i in range(0, len(rows), len(x[0]))]


def rotate_and_cache(
    qkv: Any, cos: Any, sin: Any, k_cache: Any, v_cache: Any, slots: Any, heads: int, interleaved: bool, *norm: Any
) -> Any:
    q_weight, k_weight, *constants = norm
    width, key_heads = len(k_cache[0][0][0]), len(k_cache[0][0])
    rows = [[token[i : i + width] for i in range(0, len(token), width)] for token in qkv]
    q, k, v = ([row[i:j] for row in rows] for i, j in ((0, heads), (heads, heads + key_heads), (-key_heads, None)))
    if q_weight is not None:
        q, k = _heads_normed(q, q_weight, *constants), _heads_normed(k, k_weight, *constants)
    q, k = rotary(q, k, cos, sin, interleaved, False)
    write_kv(k, v, k_cache, v_cache, slots)
    return q


def paged_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: list[list[int]],
    context_lengths: list[int],
    query_starts: list[int],
    max_query: int,
    value_dim: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Any,
) -> Any:
    out: list[Any] = []
    for b, context in enumerate(context_lengths):
        keys = [row for block in block_table[b] for row in k_cache[block]][:context]
        if v_cache is None:
            values = [[head[:value_dim] for head in row] for row in keys]
        else:
            values = [row for block in block_table[b] for row in v_cache[block]][:context]
        queries = q[query_starts[b] : query_starts[b + 1]]
        sequence, _ = attention([queries], [keys], [values], scale, True, window, softcap, sinks)
        out.extend(sequence[0])
    return out


def gather_kv(
    k_cache: Any, v_cache: Any, block_table: list[list[int]], context: int, value_dim: int, dtype: Any
) -> Any:
    keys = [[row for block in blocks for row in k_cache[block]][:context] for blocks in block_table]
    if v_cache is None:
        return keys, [[[head[:value_dim] for head in row] for row in sequence] for sequence in keys]
    return keys, [[row for block in blocks for row in v_cache[block]][:context] for blocks in block_table]
