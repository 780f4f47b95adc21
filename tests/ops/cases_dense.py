"""Rows of the dense operations: linear layers, norms, rotary positions, activations, embedding.

Every size of a row differs from its other sizes where it means something else, so that a swapped dimension shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import formulas as f
from . import scalar_dense as sd
from .case import Case
from .formulas import gradients

T, N, K, D = 5, 7, 6, 8  # rows and widths of the dense rows
EPS = 1e-5


def _norm_linear(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Any, eps: float, offset: float, gate: Any, *_: Any
) -> Tensor:
    out = f.linear(f.rms_norm(x, norm, eps, offset), weight, bias)
    return out if gate is None else f.gated_activation(out, gate)


def _add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    residual += f.linear(x, weight, bias)


def cases() -> list[Case]:
    rows = [
        Case("linear", lambda r: (r(T, K), r(N, K), r(N)), f.linear, sd.linear, (0, 1, 2), label="bias"),
        Case("linear", lambda r: (r(T, K), r(N, K), None), f.linear, sd.linear, (0, 1)),
        *(
            Case(
                "norm_linear",
                lambda r, o=(offset, gate), b=bias: (
                    r(T, K),
                    r(K),
                    r(2 * N, K),
                    r(2 * N) if b else None,
                    0.01,
                    *o,
                ),
                _norm_linear,
                sd.norm_linear,
                label=f"{gate or 'plain'}{'-offset' * bool(offset)}{'-bias' * bias}",
            )
            for offset, gate, bias in ((0.0, None, True), (1.0, "silu", False), (0.0, "gelu_tanh", True))
        ),
        *(
            Case(
                "add_linear",
                lambda r, b=bias: (r(T, N), r(T, K), r(N, K), r(N) if b else None),
                _add_linear,
                sd.add_linear,
                mutates=(0,),
                label="bias" * bias,
            )
            for bias in (True, False)
        ),
        Case("linear_input_grad", lambda r: (r(T, N), r(N, K)), lambda g, w: g @ w, sd.linear_input_grad),
        Case("linear_weight_grad", lambda r: (r(T, N), r(T, K)), lambda g, x: g.T @ x, sd.linear_weight_grad),
        Case("bias_grad", lambda r: (r(T, N),), lambda g: g.sum(0), sd.bias_grad),
        Case(
            "head_linear",
            lambda r: (r(T, 3, K), r(3, N, K)),
            lambda x, w: torch.stack([x[:, h] @ w[h].T for h in range(3)], 1),
            sd.head_linear,
            (0, 1),
        ),
        Case(
            "head_input_grad",
            lambda r: (r(T, 3, N), r(3, N, K)),
            lambda g, w: torch.stack([g[:, h] @ w[h] for h in range(3)], 1),
            sd.head_input_grad,
        ),
        Case(
            "head_weight_grad",
            lambda r: (r(T, 3, N), r(T, 3, K)),
            lambda g, x: torch.stack([g[:, h].T @ x[:, h] for h in range(3)]),
            sd.head_weight_grad,
        ),
        Case("rotary_table", lambda r: (r.below(99, T), r.fp32(K).abs(), 1.5), f.rotary_table, sd.rotary_table),
        Case("embedding", lambda r: (r.below(N, T), r(N, D), 1.0), f.embedding, sd.embedding, (1,)),
        Case("embedding", lambda r: (r.below(N, T), r(N, D), 2.5), f.embedding, sd.embedding, (1,), label="scaled"),
    ]
    for offset in (0.0, 1.0):
        label = "offset" if offset else ""
        rows += [
            Case("rms_norm", lambda r, o=offset: (r(T, D), r(D), EPS, o), f.rms_norm, sd.rms_norm, (0, 1), label=label),
            Case(
                "add_rms_norm",
                lambda r, o=offset: (r(T, D), r(T, D), r(D), EPS, o),
                lambda x, y, w, e, o: (f.rms_norm(x + y, w, e, o), x + y),
                sd.add_rms_norm,
                (0, 1, 2),
                label=label,
            ),
            Case(
                "rms_norm_backward",
                lambda r, o=offset: (r(T, D), r(T, D) if o else None, r(T, D), r(D), EPS, o),
                f.rms_norm_backward,
                sd.rms_norm_backward,
                label=label,
            ),
        ]
    rows += [
        Case("layer_norm", lambda r: (r(T, D), r(D), r(D), EPS), f.layer_norm, sd.layer_norm, (0, 1, 2)),
        Case(
            "add_layer_norm",
            lambda r: (r(T, D), r(T, D), r(D), r(D), EPS),
            lambda x, y, w, b, e: (f.layer_norm(x + y, w, b, e), x + y),
            sd.add_layer_norm,
            (0, 1, 2, 3),
        ),
        Case(
            "layer_norm_backward",
            lambda r: (r(T, D), None, r(T, D), r(D), EPS),
            f.layer_norm_backward,
            sd.layer_norm_backward,
        ),
        Case(
            "layer_norm_backward",
            lambda r: (r(T, D), r(T, D), r(T, D), r(D), EPS),
            f.layer_norm_backward,
            sd.layer_norm_backward,
            label="residual",
        ),
    ]
    for interleaved, inverse, width in ((False, False, 8), (True, False, 8), (False, True, 10)):
        rows.append(
            Case(
                "rotary",
                lambda r, i=interleaved, n=inverse, w=width: (r(T, 3, w), r(T, 2, w), r.fp32(T, 4), r.fp32(T, 4), i, n),
                f.rotary,
                sd.rotary,
                (0, 1),
                label=f"{'interleaved' if interleaved else 'halves'}{'-inverse' * inverse}",
            )
        )
    # Of 8 and of 10 channels: all turn, and a part.
    for interleaved, width in ((False, 8), (True, 10)):
        label = "interleaved" if interleaved else "halves"
        rows += [
            Case(
                "rotary_qkv",
                lambda r, i=interleaved, w=width: (r(T, 7 * w), r.fp32(T, 4), r.fp32(T, 4), 3, 2, i),
                f.rotary_qkv,
                sd.rotary_qkv,
                (0,),
                label=label,
            ),
            Case(
                "rotary_qkv_backward",
                lambda r, i=interleaved, w=width: (*(r(T, h, w) for h in (3, 2, 2)), r.fp32(T, 4), r.fp32(T, 4), i),
                f.rotary_qkv_backward,
                sd.rotary_qkv_backward,
                label=label,
            ),
        ]
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        rows += [
            Case("activation", lambda r, k=kind: (r(T, D), k), f.activation, sd.activation, (0,), label=kind),
            Case(
                "activation_backward",
                lambda r, k=kind: (r(T, D), r(T, D), k),
                lambda g, x, k: gradients(lambda y: f.activation(y, k), (x,), g)[0],
                sd.activation_backward,
                label=kind,
            ),
        ]
    for kind in ("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"):
        rows += [
            Case(
                "gated_activation",
                lambda r, k=kind: (4 * r(T, 2 * D), k),
                f.gated_activation,
                sd.gated_activation,
                (0,),
                label=kind,
            ),
            Case(
                "gated_activation_backward",
                lambda r, k=kind: (r(T, D), 4 * r(T, 2 * D), k),
                lambda g, x, k: gradients(lambda y: f.gated_activation(y, k), (x,), g)[0],
                sd.gated_activation_backward,
                label=kind,
            ),
        ]
    rows += [
        Case("softcap", lambda r: (r(T, D), 3.0), lambda x, c: c * (x / c).tanh(), sd.softcap, (0,)),
        Case(
            "softcap_backward",
            lambda r: (r(T, D), r(T, D), 3.0),
            lambda g, y, c: g * (1 - (y / c) ** 2),
            sd.softcap_backward,
        ),
    ]
    for scale in (1.0, 2.5):
        rows.append(
            Case(
                "embedding_backward",
                lambda r, s=scale: (r(T, D), r.below(N, T), N, s),
                lambda g, t, v, s: gradients(
                    lambda w: f.embedding(t, w, s), (torch.zeros(v, g.shape[1], dtype=g.dtype),), g
                )[0],
                sd.embedding_backward,
                label="scaled" if scale != 1.0 else "",
            )
        )
    return rows
