"""Loss, sampling, AdamW and casts to fp8, element by element in plain Python."""

from __future__ import annotations

import math
from typing import Any

from .counted import Counted, exp, larger, log, matmul, maximum, smaller, sqrt, tanh, total, transpose


def _capped(row: Any, softcap: float) -> tuple[Any, Any]:
    if not softcap:
        return row, None
    slopes = [tanh(x / softcap) for x in row]
    return [t * softcap for t in slopes], slopes


def _logsumexp(row: Any) -> Counted:
    peak = maximum(row)
    return log(total(exp(x - peak) for x in row)) + peak


def _mean_loss(rows: Any, sums: Any, targets: list[int], ignore_index: int, of: int = 0) -> tuple[Counted, Counted]:
    """The mean over the tokens that are kept, or over `of` tokens of which these are some."""
    loss, count = Counted(0), Counted(of)
    for row, lse, target in zip(rows, sums, targets, strict=True):
        if target != ignore_index:
            loss = loss + (lse - row[target])
            if not of:
                count = count + 1
    return loss / count, count


def cross_entropy(logits: Any, targets: list[int], ignore_index: int, softcap: float) -> Any:
    rows = [_capped(row, softcap)[0] for row in logits]
    sums = [_logsumexp(row) for row in rows]
    return _mean_loss(rows, sums, targets, ignore_index)[0], sums


def _row_grad(row: Any, slopes: Any, lse: Counted, target: int, ignore_index: int, factor: Counted) -> Any:
    if target == ignore_index:
        return [Counted(0) for _ in row]
    grad = [exp(x - lse) for x in row]
    grad[target] = grad[target] - 1
    grad = [g * factor for g in grad]
    return grad if slopes is None else [g * (1 - t * t) for g, t in zip(grad, slopes, strict=True)]


def cross_entropy_backward(
    grad: Counted, logits: Any, targets: list[int], lse: Any, ignore_index: int, softcap: float
) -> Any:
    factor = grad / total(Counted(1) for target in targets if target != ignore_index)
    return [
        _row_grad(*_capped(row, softcap), row_lse, target, ignore_index, factor)
        for row, row_lse, target in zip(logits, lse, targets, strict=True)
    ]


def linear_cross_entropy(x: Any, weight: Any, targets: list[int], softcap: float, ignore_index: int, of: int) -> Any:
    rows = [_capped(row, softcap)[0] for row in matmul(x, transpose(weight))]
    return _mean_loss(rows, [_logsumexp(row) for row in rows], targets, ignore_index, of)[0]


def linear_cross_entropy_with_grad(
    x: Any, weight: Any, targets: list[int], softcap: float, ignore_index: int, of: int
) -> Any:
    capped = [_capped(row, softcap) for row in matmul(x, transpose(weight))]
    sums = [_logsumexp(row) for row, _ in capped]
    loss, count = _mean_loss([row for row, _ in capped], sums, targets, ignore_index, of)
    factor = Counted(1 / of) if of else 1 / count
    grad = [
        _row_grad(row, slopes, lse, target, ignore_index, factor)
        for (row, slopes), lse, target in zip(capped, sums, targets, strict=True)
    ]
    return loss, matmul(grad, weight), matmul(transpose(grad), x)


def linear_cross_entropy_backward(grad: Counted, grad_x: Any, grad_weight: Any) -> None:
    for row in (*grad_x, *grad_weight):
        row[:] = [v * grad for v in row]


def _greatest(row: Any) -> tuple[Any, int]:
    best, token = Counted(-math.inf), 0
    for i, value in enumerate(row):
        if value > best:
            best, token = value, i
    return best, token


def greedy(logits: Any) -> Any:
    return [_greatest(row)[1] for row in logits]


_WHOLE = 2.0**40  # weights are whole numbers of this part of the likeliest token's


def _weight(value: Any, greatest: Any, divisor: Any) -> tuple[Counted, Counted]:
    ratio = exp((value - greatest) / divisor)
    return ratio, Counted(math.floor((ratio * _WHOLE).value))


def _upto(weights: Any) -> list[Counted]:
    cumulative, running = [], Counted(0)
    for weight in weights:
        running = running + weight
        cumulative.append(running)
    return cumulative


def sample_plain(logits: Any, temperature: Any, uniform: Any) -> Any:
    tokens = []
    for row, heat, u in zip(logits, temperature, uniform, strict=True):
        greatest, likeliest = _greatest(row)
        is_greedy = heat <= 0
        divisor = Counted(1) if is_greedy else heat
        cumulative = _upto(_weight(value, greatest, divisor)[1] for value in row)
        draw = u * cumulative[-1]
        token = sum(upto <= draw for upto in cumulative)
        tokens.append(likeliest if is_greedy else token)
    return tokens


def sample(logits: Any, temperature: Any, top_k: list[int], top_p: Any, min_p: Any, uniform: Any, most: int = 0) -> Any:
    tokens = []
    for b, row in enumerate(logits):
        order = sorted(range(len(row)), key=lambda i: -row[i].value)[: most or None]
        is_greedy = temperature[b] <= 0
        divisor = Counted(1) if is_greedy else temperature[b]
        limit = top_k[b] if top_k[b] > 0 else len(row)
        weights = []
        for rank, i in enumerate(order):
            ratio, weight = _weight(row[i], row[order[0]], divisor)
            keep = ratio >= min_p[b]
            weights.append(weight if keep and rank < limit else Counted(0))
        cumulative = _upto(weights)
        enough = top_p[b] * cumulative[-1]
        short = sum(upto < enough for upto in cumulative)
        draw = uniform[b] * cumulative[short]
        rank = sum(upto <= draw for upto in cumulative)
        tokens.append(order[0 if is_greedy else rank])
    return tokens


def adamw(
    params: Any,
    grads: Any,
    exp_avgs: Any,
    exp_avg_sqs: Any,
    masters: Any,
    scale: Counted | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    keep, rest1, rest2 = 1 - lr * weight_decay, 1 - beta1, 1 - beta2
    for i, values in enumerate(masters or params):
        for j, value in enumerate(values):
            g, m, v = grads[i][j], exp_avgs[i][j], exp_avg_sqs[i][j]
            if scale is not None:
                g = g * scale
            m = m + (g - m) * rest1
            v = v * beta2 + g * rest2 * g
            values[j] = value * keep + m * -step_size / (sqrt(v) / root + eps)
            exp_avgs[i][j], exp_avg_sqs[i][j] = m, v
            if masters:
                params[i][j] = values[j]


def grad_norm(grads: Any) -> Any:
    return sqrt(total(g * g for grad in grads for g in grad))


def clip_scale(norm: Counted, max_norm: float) -> Counted:
    limited = smaller((max_norm or math.inf) / (norm + 1e-6), 1.0)
    return limited if norm < math.inf else Counted(math.nan)


def scale_(grads: Any, factor: Counted) -> None:
    for grad in grads:
        for i, g in enumerate(grad):
            grad[i] = g * factor


# Explicit mantissa bits, least normal exponent and greatest number of each format (2209.05433, table 1).
_FP8 = {"torch.float8_e4m3fn": (3, -6, 448.0), "torch.float8_e5m2": (2, -14, 57344.0)}
_SHARES = 512


def rounded_to_fp8(value: float, dtype: Any) -> float:
    """The nearest number of the format, of two equally near ones the even one; a subnormal below the least exponent."""
    bits, least, _ = _FP8[str(dtype)]
    if not value:
        return value
    spacing = 2.0 ** (max(math.frexp(value)[1] - 1, least) - bits)
    return round(value / spacing) * spacing


def fp8_amax(x: Any) -> Any:
    return [maximum((abs(v) for row in x for v in row), 0.0), *[0.0] * (_SHARES - 1)]


def fp8_quantize(x: Any, amax: Any, dtype: Any) -> Any:
    scale = larger(maximum(amax, 0.0), 2.0**-100) / _FP8[str(dtype)][2]
    factor = 1 / scale
    return [[rounded_to_fp8((v * factor).value, dtype) for v in row] for row in x], scale


def fp8_quantize_transposed(x: Any, amax: Any, dtype: Any) -> Any:
    x8, scale = fp8_quantize(x, amax, dtype)
    return transpose(x8), scale


def fp8_quantize_both(x: Any, amax: Any, dtype: Any) -> Any:
    x8, scale = fp8_quantize(x, amax, dtype)
    return x8, transpose(x8), scale


def fp8_product(a: Any, b: Any, scale_a: Any, scale_b: Any, *rest: Any) -> Any:
    factor = scale_a * scale_b
    out = [[value * factor for value in row] for row in matmul(a, transpose(b))]
    if not isinstance(rest[0], list):
        return out
    return [[value + bias for value, bias in zip(row, rest[0], strict=True)] for row in out]
