"""Linear layers, norms, rotary positions, activations and embedding, element by element in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .counted import Counted, cos, dot, erf, exp, larger, matmul, rsqrt, sin, smaller, tanh, total, transpose

Vector = Sequence[Any]
Matrix = Sequence[Vector]


def linear(x: Matrix, weight: Matrix, bias: Vector | None) -> Any:
    out = matmul(x, transpose(weight))
    return out if bias is None else [[value + b for value, b in zip(row, bias, strict=True)] for row in out]


def linear_input_grad(grad: Matrix, weight: Matrix) -> Any:
    return matmul(grad, weight)


def linear_weight_grad(grad: Matrix, x: Matrix) -> Any:
    return matmul(transpose(grad), x)


def bias_grad(grad: Matrix) -> Any:
    return [total(column) for column in transpose(grad)]


def head_linear(x: Sequence[Matrix], weight: Sequence[Matrix]) -> Any:
    return [[[dot(row, w) for w in head] for row, head in zip(token, weight, strict=True)] for token in x]


def head_input_grad(grad: Sequence[Matrix], weight: Sequence[Matrix]) -> Any:
    return [[matmul([row], head)[0] for row, head in zip(token, weight, strict=True)] for token in grad]


def head_weight_grad(grad: Sequence[Matrix], x: Sequence[Matrix]) -> Any:
    heads = range(len(grad[0]))
    return [matmul(transpose([token[h] for token in grad]), [token[h] for token in x]) for h in heads]


def _shifted(weight: Vector, offset: float) -> Vector:
    return [w + offset for w in weight] if offset else weight


def rms_norm(x: Matrix, weight: Vector, eps: float, offset: float) -> Any:
    weight = _shifted(weight, offset)
    out = []
    for row in x:
        scale = rsqrt(total(v * v for v in row) / len(row) + eps)
        out.append([v * scale * w for v, w in zip(row, weight, strict=True)])
    return out


def _added(x: Matrix, residual: Matrix) -> Matrix:
    return [[a + b for a, b in zip(left, right, strict=True)] for left, right in zip(x, residual, strict=True)]


def add_rms_norm(x: Matrix, residual: Matrix, weight: Vector, eps: float, offset: float) -> Any:
    residual = _added(x, residual)
    return rms_norm(residual, weight, eps, offset), residual


def rms_norm_backward(
    grad: Matrix, grad_residual: Matrix | None, x: Matrix, weight: Vector, eps: float, offset: float
) -> Any:
    weight = _shifted(weight, offset)
    grad_x, products = [], []
    for i, (g_row, row) in enumerate(zip(grad, x, strict=True)):
        scale = rsqrt(total(v * v for v in row) / len(row) + eps)
        x_hat = [v * scale for v in row]
        weighted = [g * w for g, w in zip(g_row, weight, strict=True)]
        mean = total(a * b for a, b in zip(weighted, x_hat, strict=True)) / len(row)
        out = [(a - b * mean) * scale for a, b in zip(weighted, x_hat, strict=True)]
        grad_x.append(out if grad_residual is None else [a + b for a, b in zip(out, grad_residual[i], strict=True)])
        products.append([g * v for g, v in zip(g_row, x_hat, strict=True)])
    return grad_x, [total(column) for column in transpose(products)]


def layer_norm(x: Matrix, weight: Vector, bias: Vector, eps: float) -> Any:
    out = []
    for row in x:
        mean = total(row) / len(row)
        centred = [v - mean for v in row]
        scale = rsqrt(total(v * v for v in centred) / len(row) + eps)
        out.append([v * scale * w + b for v, w, b in zip(centred, weight, bias, strict=True)])
    return out


def add_layer_norm(x: Matrix, residual: Matrix, weight: Vector, bias: Vector, eps: float) -> Any:
    residual = _added(x, residual)
    return layer_norm(residual, weight, bias, eps), residual


def layer_norm_backward(grad: Matrix, grad_residual: Matrix | None, x: Matrix, weight: Vector, eps: float) -> Any:
    grad_x, products = [], []
    for i, (g_row, row) in enumerate(zip(grad, x, strict=True)):
        n = len(row)
        mean = total(row) / n
        centred = [v - mean for v in row]
        scale = rsqrt(total(v * v for v in centred) / n + eps)
        x_hat = [v * scale for v in centred]
        weighted = [g * w for g, w in zip(g_row, weight, strict=True)]
        shift = total(weighted) / n
        slope = total(a * b for a, b in zip(weighted, x_hat, strict=True)) / n
        out = [(a - shift - b * slope) * scale for a, b in zip(weighted, x_hat, strict=True)]
        grad_x.append(out if grad_residual is None else [a + b for a, b in zip(out, grad_residual[i], strict=True)])
        products.append([g * v for g, v in zip(g_row, x_hat, strict=True)])
    return grad_x, [total(column) for column in transpose(products)], [total(column) for column in transpose(grad)]


def rotary_table(positions: Vector, frequencies: Vector, scale: float) -> Any:
    cosines, sines = [], []
    for position in positions:
        angles = [f * position for f in frequencies]
        cosines.append([cos(angle) * scale for angle in angles])
        sines.append([sin(angle) * scale for angle in angles])
    return cosines, sines


def rotary(q: Any, k: Any, cosines: Matrix, sines: Matrix, interleaved: bool, inverse: bool) -> Any:
    channels = len(cosines[0])
    if inverse:
        sines = [[-s for s in row] for row in sines]

    def turn(x: Any) -> Any:
        out = [[list(head) for head in token] for token in x]
        for t, token in enumerate(x):
            for h, head in enumerate(token):
                for i in range(channels):
                    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + channels)
                    a, b, c, s = head[first], head[second], cosines[t][i], sines[t][i]
                    out[t][h][first], out[t][h][second] = a * c - b * s, b * c + a * s
        return out

    return turn(q), turn(k)


def rotary_qkv(qkv: Matrix, cosines: Matrix, sines: Matrix, heads: int, key_heads: int, interleaved: bool) -> Any:
    width = len(qkv[0]) // (heads + 2 * key_heads)
    split = [[row[i : i + width] for i in range(0, len(row), width)] for row in qkv]
    q, k = ([token[a:b] for token in split] for a, b in ((0, heads), (heads, heads + key_heads)))
    return *rotary(q, k, cosines, sines, interleaved, False), [token[heads + key_heads :] for token in split]


def rotary_qkv_backward(
    grad_q: Any, grad_k: Any, grad_v: Any, cosines: Matrix, sines: Matrix, interleaved: bool
) -> Any:
    grads = (*rotary(grad_q, grad_k, cosines, sines, interleaved, True), grad_v)
    return [[x for heads in token for head in heads for x in head] for token in zip(*grads, strict=True)]


def _sigmoid(x: Counted) -> Counted:
    return 1 / (exp(-x) + 1)


def _function(x: Counted, kind: str) -> Counted:
    if kind == "silu":
        return x * _sigmoid(x)
    if kind == "gelu":
        return x * 0.5 * (erf(x * 0.5**0.5) + 1)
    if kind == "gelu_tanh":
        return x * 0.5 * (tanh((x + x * x * x * 0.044715) * 0.7978845608028654) + 1)
    return larger(x, 0.0)


def _slope(grad: Counted, x: Counted, kind: str) -> Counted:
    """f'(x)·grad."""
    if kind == "silu":
        s = _sigmoid(x)
        return grad * (s * (x * (1 - s) + 1))
    if kind == "gelu":
        density = exp(x * -0.5 * x) * 0.3989422804014327
        return grad * ((erf(x * 0.5**0.5) + 1) * 0.5 + x * density)
    if kind == "gelu_tanh":
        t = tanh((x + x * 0.044715 * x * x) * 0.7978845608028654)
        inner = (1 - t * t) * 0.7978845608028654
        return grad * ((t + 1) * 0.5 + x * 0.5 * inner * (x * 0.134145 * x + 1))
    return grad * float(x > 0)


def activation(x: Matrix, kind: str) -> Any:
    return [[_function(v, kind) for v in row] for row in x]


def activation_backward(grad: Matrix, x: Matrix, kind: str) -> Any:
    return [[_slope(g, v, kind) for g, v in zip(g_row, row, strict=True)] for g_row, row in zip(grad, x, strict=True)]


def gated_activation(gate_up: Matrix, kind: str) -> Any:
    out = []
    for row in gate_up:
        width = len(row) // 2
        if kind != "clamped_swiglu":
            out.append([_function(row[i], kind) * row[width + i] for i in range(width)])
            continue
        clamped = []
        for raw_gate, raw_up in zip(row[0::2], row[1::2], strict=True):
            gate, up = smaller(raw_gate, 7.0), smaller(larger(raw_up, -7.0), 7.0)
            clamped.append((up + 1) * (gate * _sigmoid(gate * 1.702)))
        out.append(clamped)
    return out


def norm_linear(
    x: Matrix, norm: Vector, weight: Matrix, bias: Vector | None, eps: float, offset: float, gate: str | None, *_: Any
) -> Any:
    out = linear(rms_norm(x, norm, eps, offset), weight, bias)
    return out if gate is None else gated_activation(out, gate)


def add_linear(residual: Any, x: Matrix, weight: Matrix, bias: Vector | None) -> None:
    for i, row in enumerate(linear(x, weight, bias)):
        for j, value in enumerate(row):
            residual[i][j] = residual[i][j] + value


def gated_activation_backward(grad: Matrix, gate_up: Matrix, kind: str) -> Any:
    out = []
    for g_row, row in zip(grad, gate_up, strict=True):
        width = len(g_row)
        new: list[Any] = [None] * (2 * width)
        for i, g in enumerate(g_row):
            if kind != "clamped_swiglu":
                gate, up = row[i], row[width + i]
                new[i], new[width + i] = _slope(g * up, gate, kind), g * _function(gate, kind)
                continue
            raw_gate, raw_up = row[2 * i], row[2 * i + 1]
            gate, up = smaller(raw_gate, 7.0), smaller(larger(raw_up, -7.0), 7.0)
            s = _sigmoid(gate * 1.702)
            slope = s + gate * 1.702 * s * (1 - s)
            new[2 * i] = g * (up + 1) * slope * float(raw_gate <= 7.0)
            new[2 * i + 1] = g * gate * s * float(abs(raw_up) <= 7.0)
        out.append(new)
    return out


def embedding(tokens: Vector, weight: Matrix, scale: float) -> Any:
    return [[w if scale == 1.0 else w * scale for w in weight[token]] for token in tokens]


def embedding_backward(grad: Matrix, tokens: Vector, vocabulary: int, scale: float) -> Any:
    out = [[Counted(0) for _ in grad[0]] for _ in range(vocabulary)]
    for row, token in zip(grad, tokens, strict=True):
        for i, g in enumerate(row):
            out[token][i] = out[token][i] + (g if scale == 1.0 else g * scale)
    return out


def softcap(x: Matrix, cap: float) -> Any:
    return [[tanh(v / cap) * cap for v in row] for row in x]


def softcap_backward(grad: Matrix, out: Matrix, cap: float) -> Any:
    result = []
    for g_row, row in zip(grad, out, strict=True):
        ratios = [v / cap for v in row]
        result.append([g * (1 - r * r) for g, r in zip(g_row, ratios, strict=True)])
    return result
