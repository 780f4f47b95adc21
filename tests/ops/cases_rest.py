"""Rows of the sampling, optimizer, mixture-of-experts, collective and fp8 operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rooflight.ops import batch, dispatch, fp8_linear

from . import formulas as f
from . import scalar_experts as se
from . import scalar_rest as sr
from .case import Case, Draw
from .formulas import gradients

T, V, D = 5, 11, 6
X, K, N = 8, 3, 7  # experts, experts a token, output width


def _sample_args(r: Draw) -> tuple[Any, ...]:
    rows = 6
    return (
        r.distinct(rows, V),
        torch.tensor([1.0, 0.0, 0.7, 1.3, 1.0, 2.0]),
        torch.tensor([0, 0, 3, 0, 5, 1]),
        torch.tensor([1.0, 1.0, 1.0, 0.6, 0.9, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.05, 0.2, 0.0]),
        torch.tensor([0.37, 0.9, 0.81, 0.66, 0.97, 0.5]),
    )


def _few_args(r: Draw) -> tuple[Any, ...]:
    """The same rows, every one that is not greedy with a top_k of up to 5."""
    logits, temperature, _, *rest = _sample_args(r)
    return logits, temperature, torch.tensor([2, 0, 3, 4, 5, 1]), *rest, 5


def _plain(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    upto = (logits / temperature.clamp(min=1e-9).unsqueeze(-1)).softmax(-1).cumsum(-1)
    return torch.where(temperature == 0, logits.argmax(-1), (upto <= uniform.unsqueeze(-1)).sum(-1))


def _scale(grads: list[Tensor], factor: Tensor) -> None:
    for grad in grads:
        grad.copy_(grad * factor)


def _clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    grad = torch.nn.Parameter(torch.zeros(1, dtype=norm.dtype))
    grad.grad = norm.reshape(1).clone()
    torch.nn.utils.clip_grad_norm_([grad], max_norm or float("inf"))
    return (grad.grad / norm).reshape(())


def _adamw_args(r: Draw, masters: bool = False, scale: float | None = None, seed: int = 0) -> tuple[Any, ...]:
    sizes = (4, 3)
    p, g, m = ([r(n) for n in sizes] for _ in range(3))
    v = [r(n).abs() for n in sizes]
    fp32 = [x.float() for x in p] if masters else []
    factor = None if scale is None else torch.tensor(scale)
    return p, g, m, v, fp32, factor, 3, 0.01, 0.9, 0.95, 1e-8, 0.1, seed


def _adamw(p: Any, g: Any, m: Any, v: Any, masters: Any, scale: Tensor | None, *rest: Any) -> None:
    if scale is None or scale.isfinite():
        f.adamw(p, g if scale is None else [scale * x for x in g], m, v, masters, *rest[:-1])


def _step() -> list[Case]:
    return [
        Case("greedy", lambda r: (r.distinct(T, V),), lambda z: z.max(-1).indices, sr.greedy),
        Case("sample", _sample_args, f.sample, sr.sample),
        Case("sample", _few_args, lambda *args: f.sample(*args[:-1]), sr.sample, label="few"),
        Case("sample_plain", lambda r: tuple(_sample_args(r)[i] for i in (0, 1, 5)), _plain, sr.sample_plain),
        Case("adamw", _adamw_args, _adamw, sr.adamw, mutates=(0, 2, 3)),
        Case("adamw", lambda r: _adamw_args(r, True), _adamw, sr.adamw, mutates=(0, 2, 3, 4), label="masters"),
        Case("adamw", lambda r: _adamw_args(r, False, 0.3), _adamw, sr.adamw, mutates=(0, 2, 3), label="scale"),
        Case("adamw", lambda r: _adamw_args(r, False, 0.3, 5), _adamw, sr.adamw, mutates=(0, 2, 3), label="seed"),
        Case(
            "adamw",
            lambda r: _adamw_args(r, True, float("inf")),
            _adamw,
            mutates=(0, 2, 3, 4),
            label="called-off",
            why="prices take every step as done",
        ),
        Case("grad_norm", lambda r: ([r(4), r(3)],), lambda g: torch.cat(g).norm(), sr.grad_norm),
        Case("clip_scale", lambda r: (5 + r.fp32(), 2.0), _clip_scale, sr.clip_scale),
        Case("clip_scale", lambda r: (1 + r.fp32() / 9, 0.0), _clip_scale, sr.clip_scale, label="no-clipping"),
        Case("scale_", lambda r: ([r(4), r(3)], r.fp32()), _scale, sr.scale_, mutates=(0,)),
    ]


ROUTERS = {
    "mixtral": ("softmax", True, 1.0, 1, 1, "max"),
    "qwen3": ("softmax", False, 1.0, 1, 1, "max"),
    "gpt-oss": ("softmax_topk", False, 1.0, 1, 1, "max"),
    "deepseek-v2": ("softmax", False, 2.5, 4, 2, "max"),
    "deepseek-v3": ("sigmoid", True, 2.5, 4, 2, "top2"),
}


def _unpermute_args(r: Draw) -> tuple[Any, ...]:
    _, source, _ = dispatch.permute(r(T, D), _experts(r), X)
    return r(T * K, D), r.fp32(T, K), source


def _experts(r: Draw) -> Tensor:
    return r.distinct(T, X).topk(K).indices


# Rows of eight experts, three without a token: 15 rows reach five.
COUNTS = (4, 0, 3, 0, 1, 5, 0, 2)
BATCH = batch.Batch((), expert_tokens=COUNTS)


def _experts_rows() -> list[Case]:
    rows = []
    for label, (scoring, *options) in ROUTERS.items():
        biased = label == "deepseek-v3"
        normalize, scale = options[:2]
        rows += [
            Case(
                "route",
                lambda r, s=scoring, o=tuple(options), b=biased: (
                    r.distinct(T, X),
                    r.fp32(X) / 99 if b else None,
                    K,
                    s,
                    *o,
                ),
                f.route,
                se.route,
                (0,),
                label=label,
            ),
            Case(
                "route_backward",
                lambda r, o=(scoring, normalize, scale): (r.fp32(T, K), r.distinct(T, X), _experts(r), *o),
                f.route_backward,
                se.route_backward,
                label=label,
            ),
        ]
    counts, total = torch.tensor(COUNTS), sum(COUNTS)
    rows += [
        Case("permute", lambda r: (r(T, D), _experts(r), X), f.permute, se.permute, (0,)),
        Case(
            "permute_backward",
            lambda r: (r(T * K, D), _unpermute_args(r)[2], K),
            lambda g, source, k: g[torch.argsort(source)].view(-1, k, g.shape[1]).sum(1),
            se.permute_backward,
        ),
        Case("unpermute", _unpermute_args, f.unpermute, se.unpermute, (0, 1)),
        Case(
            "unpermute_backward",
            lambda r: (r(T, D), *_unpermute_args(r)),
            lambda g, y, w, s: gradients(lambda a, b: f.unpermute(a, b, s), (y, w), g),
            se.unpermute_backward,
        ),
        Case(
            "grouped_linear",
            lambda r: (r(total, D), r(X, N, D), r(X, N), counts),
            f.grouped_linear,
            se.grouped_linear,
            (0, 1, 2),
            label="bias",
            batch=BATCH,
        ),
        Case(
            "grouped_linear",
            lambda r: (r(total, D), r(X, N, D), None, counts),
            f.grouped_linear,
            se.grouped_linear,
            (0, 1),
        ),
        Case(
            "grouped_gated_linear",
            lambda r: (r(total, D), r(X, 2 * N, D), r(X, 2 * N), counts, "clamped_swiglu"),
            lambda *args: f.gated_activation(f.grouped_linear(*args[:-1]), args[-1]),
            se.grouped_gated_linear,
            label="bias",
            batch=BATCH,
        ),
        Case(
            "grouped_gated_linear",
            lambda r: (r(total, D), r(X, 2 * N, D), None, counts, "silu"),
            lambda *args: f.gated_activation(f.grouped_linear(*args[:-1]), args[-1]),
            se.grouped_gated_linear,
        ),
        Case(
            "grouped_input_grad",
            lambda r: (r(total, N), r(X, N, D), counts),
            lambda g, w, c: f.grouped_linear(g, w.mT, None, c),
            se.grouped_input_grad,
            batch=BATCH,
        ),
        Case(
            "grouped_weight_grad",
            lambda r: (r(total, N), r(total, D), counts),
            _grouped_weight_grad,
            se.grouped_weight_grad,
        ),
        Case(
            "grouped_bias_grad",
            lambda r: (r(total, N), counts),
            lambda g, c: torch.stack([part.sum(0) for part in g.split(c.tolist())]),
            se.grouped_bias_grad,
        ),
    ]
    return rows


def _grouped_weight_grad(g: Tensor, x: Tensor, c: Tensor) -> Tensor:
    parts = zip(g.split(c.tolist()), x.split(c.tolist()), strict=True)
    return torch.stack([a.T @ b for a, b in parts])


def _collectives() -> list[Case]:
    why = "needs ranks: values in test_collective.py over gloo, costs there against a ring played step by step"
    group = "0"  # the name of the default group
    plain = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    rows = [Case(n, lambda r: (r(4, D), group), differentiable=(0,), collective=True, why=why) for n in plain]
    return [*rows, Case("broadcast", lambda r: (r(4, D), 1, group), collective=True, why=why)]


def _amax(x: Tensor) -> Tensor:
    """All in the first of the shares; how they divide is not told to anybody."""
    return torch.cat((x.abs().max().view(1), x.new_zeros(fp8_linear.SHARES - 1)))


def _fp8(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = torch.maximum(amax.max(), torch.tensor(2.0**-100, dtype=torch.float64)) / torch.finfo(dtype).max
    return (x / scale).to(dtype), scale


def _fp8_transposed(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x8, scale = _fp8(x, amax, dtype)
    return x8.T, scale


def _fp8_both(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x8, scale = _fp8(x, amax, dtype)
    return x8, x8.T, scale


def _fp8_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *rest: Any) -> Tensor:
    out = torch.einsum("mk,nk->mn", a * scale_a, b * scale_b)
    return out + rest[0] if isinstance(rest[0], Tensor) else out


def _fp8_rows() -> list[Case]:
    e4m3, e5m2 = fp8_linear.E4M3, fp8_linear.E5M2

    def shares(r: Draw) -> Tensor:
        # As large as the values are, so that nothing overflows; one share is the largest.
        return 5 * r.fp32(fp8_linear.SHARES).abs().clamp(max=1.0)

    def operands(r: Draw, rows: int, columns: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # fp8 numbers in the row's type, which torch's checks can compare; as they are stored in test_fp8_linear.py.
        a, b = (8 * r(rows, k)).to(dtype), (8 * r(columns, k)).to(e4m3)
        return a.to(r.dtype), b.to(r.dtype), r.fp32().abs(), r.fp32().abs()

    rows = [Case("fp8_amax", lambda r: (r(T, K),), _amax, sr.fp8_amax)]
    casts = {
        "fp8_quantize": (_fp8, sr.fp8_quantize),
        "fp8_quantize_transposed": (_fp8_transposed, sr.fp8_quantize_transposed),
        "fp8_quantize_both": (_fp8_both, sr.fp8_quantize_both),
    }
    for name, (formula, scalar) in casts.items():
        for dtype, label in ((e4m3, ""), (e5m2, "gradient")):
            rows.append(Case(name, lambda r, d=dtype: (r(T, D), shares(r), d), formula, scalar, label=label))
    for bias in (False, True):
        rows.append(
            Case(
                "fp8_linear",
                lambda r, b=bias: (*operands(r, T, N, D, e4m3), r(N) if b else None, r.dtype),
                _fp8_product,
                sr.fp8_product,
                label="bias" * bias,
            )
        )
    for name, sizes in (("fp8_linear_input_grad", (T, D, N)), ("fp8_linear_weight_grad", (N, D, T))):
        rows.append(Case(name, lambda r, s=sizes: (*operands(r, *s, e5m2), r.dtype), _fp8_product, sr.fp8_product))
    return rows


def cases() -> list[Case]:
    return [*_step(), *_experts_rows(), *_collectives(), *_fp8_rows()]
