"""Rows of attention in all its forms.

Every size of a row differs from its other sizes where it means something else, so that a swapped dimension shows.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from rooflight.ops import attention as attn
from rooflight.ops import batch

from . import formulas as f
from . import scalar_attention as sa
from .case import Case, Draw
from .formulas import gradients

T, SLOTS = 5, torch.tensor([3, 17, 0, 8, 22])  # tokens written into a cache, and where
# Documents packed in a row: an empty one, neighbours of one length, one of a single token.
LENGTHS = (4, 0, 1, 3, 3, 2)
STARTS = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
# Sequences, queries, keys, query heads, key heads, head dim, value dim of the attention rows.
B, Q, S, H, G, E, U = 2, 5, 7, 6, 3, 8, 4
SCALE, CAP = 0.35, 3.0


def _flash_backward_args(r: Draw, causal: bool, window: int, cap: float, sinks: bool) -> tuple[Any, ...]:
    q, k, v, sink = r(B, Q, H, E), r(B, S, G, E), r(B, S, G, U), r(H) if sinks else None
    out, lse = attn.attention(q, k, v, SCALE, causal, window, cap, sink)
    return r(B, Q, H, U), q, k, v, out, lse, SCALE, causal, window, cap, sink


def _flash_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, *rest: Any) -> Any:
    scale, causal, window, cap, sinks = rest
    sink = q.new_zeros((0,)) if sinks is None else sinks
    return gradients(
        lambda a, b, c, d: f.attention(a, b, c, scale, causal, window, cap, None if sinks is None else d)[0],
        (q, k, v, sink),
        g,
    )


def _packed_args(r: Draw, value_dim: int, window: int, cap: float, sinks: bool) -> tuple[Any, ...]:
    tokens = sum(LENGTHS)
    tensors = (r(tokens, H, E), r(tokens, G, E), r(tokens, G, value_dim))
    return *tensors, STARTS, max(LENGTHS), SCALE, window, cap, r(H) if sinks else None


def _packed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Each document by itself, and one behind the other."""
    starts, _, scale, window, cap, sinks = rest
    pieces = [slice(*piece) for piece in pairwise(starts.tolist())]
    parts = [f.attention(q[None, p], k[None, p], v[None, p], scale, True, window, cap, sinks) for p in pieces]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)


def _packed_backward_args(r: Draw, *options: Any) -> tuple[Any, ...]:
    args = _packed_args(r, *options)
    out, lse = attn.packed_attention(*args)
    return r(*out.shape), *args[:3], out, lse, *args[3:]


def _packed_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, *rest: Any) -> Any:
    *options, sinks = rest
    sink = q.new_zeros((0,)) if sinks is None else sinks
    return gradients(lambda a, b, c, d: _packed(a, b, c, *options, None if sinks is None else d)[0], (q, k, v, sink), g)


def _softmax_backward_args(r: Draw, cap: float, sinks: bool) -> tuple[Any, ...]:
    scores = r(B, H, Q, S)
    probs = attn.attention_softmax(scores, True, 0, cap, r(H) if sinks else None)
    return r(B, H, Q, S), probs, scores if cap else None, cap, sinks


def _softmax_backward(g: Tensor, probs: Tensor, scores: Tensor | None, cap: float, sinks: bool) -> Any:
    """Through log p = s − log(Σ e^s + e^sink): the Jacobian diag(p) − p·pᵀ, the sink's row −p·p_sink."""
    rows = probs.flatten(0, 2)
    jacobian = torch.diag_embed(rows) - rows.unsqueeze(-1) * rows.unsqueeze(-2)
    grad = (jacobian @ g.flatten(0, 2).unsqueeze(-1)).view(g.shape)
    if scores is not None:
        grad = grad / torch.cosh(scores / cap) ** 2
    left = 1 - probs.sum(-1)
    return grad, -(left * (probs * g).sum(-1)).sum((0, 2)) if sinks else g.new_zeros((0,))


def _paged_args(r: Draw, latent: bool, window: int, cap: float, sinks: bool, decode: bool) -> tuple[Any, ...]:
    starts = torch.tensor([0, 1, 2]) if decode else torch.tensor([0, 3, 5])
    cache = r(6, 4, G, E)
    return (
        r(int(starts[-1]), H, E),
        cache,
        None if latent else r(6, 4, G, U),
        torch.tensor([[4, 1], [0, 5]]),
        torch.tensor([7, 5]),
        starts,
        1 if decode else 3,
        U,
        SCALE,
        window,
        cap,
        r(H) if sinks else None,
    )


def _rotate_and_cache_args(r: Draw, channels: int, interleaved: bool, norm: bool, offset: float) -> tuple[Any, ...]:
    tables, caches = (r.fp32(T, channels), r.fp32(T, channels)), (r(6, 4, G, E), r(6, 4, G, E))
    weights = (r(E), r(E)) if norm else (None, None)
    return r(T, (H + 2 * G) * E), *tables, *caches, SLOTS, H, interleaved, *weights, 0.01, offset


def _rotate_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, heads: int, *rest: Any
) -> Tensor:
    """The formulas of the operations that it fuses, one after the other."""
    interleaved, q_weight, k_weight, *norm = rest
    q, k, v = qkv.unflatten(1, (-1, k_cache.shape[3])).split([heads, k_cache.shape[2], k_cache.shape[2]], dim=1)
    if q_weight is not None:
        q, k = f.rms_norm(q, q_weight, *norm), f.rms_norm(k, k_weight, *norm)
    q, k = f.rotary(q, k, cos, sin, interleaved, False)
    f.write_kv(k, v, k_cache, v_cache, slots)
    return q


def cases() -> list[Case]:
    rows = []
    options = ((True, 0, 0.0, False), (False, 0, 0.0, False), (True, 3, CAP, True), (True, 0, 0.0, True))
    for causal, window, cap, sinks in options:
        label = f"{'causal' if causal else 'full'}{'-window' * bool(window)}{'-softcap' * bool(cap)}{'-sinks' * sinks}"
        rows += [
            Case(
                "attention",
                lambda r, o=(causal, window, cap), s=sinks: (
                    r(B, Q, H, E),
                    r(B, S, G, E),
                    r(B, S, G, U),
                    SCALE,
                    *o,
                    r(H) if s else None,
                ),
                f.attention,
                sa.attention,
                (0, 1, 2, 7) if sinks else (0, 1, 2),
                label=label,
            ),
            Case(
                "attention_backward",
                lambda r, o=(causal, window, cap, sinks): _flash_backward_args(r, *o),
                _flash_backward,
                sa.attention_backward,
                label=label,
            ),
            Case(
                "attention_softmax",
                lambda r, o=(causal, window, cap), s=sinks: (r(B, H, Q, S), *o, r(H) if s else None),
                f.attention_softmax,
                sa.attention_softmax,
                (0, 4) if sinks else (0,),
                label=label,
            ),
        ]
    for value_dim, window, cap, sinks in ((E, 0, 0.0, False), (U, 2, CAP, True)):
        label, options = "window-softcap-sinks" if sinks else "", (value_dim, window, cap, sinks)
        facts = batch.Batch.of(LENGTHS, LENGTHS)
        rows += [
            Case(
                "packed_attention",
                lambda r, o=options: _packed_args(r, *o),
                _packed,
                sa.packed_attention,
                (0, 1, 2, 8) if sinks else (0, 1, 2),
                label=label,
                batch=facts,
            ),
            Case(
                "packed_attention_backward",
                lambda r, o=options: _packed_backward_args(r, *o),
                _packed_backward,
                sa.packed_attention_backward,
                label=label,
                batch=facts,
            ),
        ]
    rows.append(  # the shape that torch's own CPU kernel takes
        Case(
            "attention",
            lambda r: (r(B, Q, H, E), r(B, Q, G, E), r(B, Q, G, E), SCALE, True, 0, 0.0, None),
            f.attention,
            sa.attention,
            (0, 1, 2),
            label="square",
        )
    )
    for cap, sinks in ((0.0, False), (CAP, True)):
        rows.append(
            Case(
                "attention_softmax_backward",
                lambda r, o=(cap, sinks): _softmax_backward_args(r, *o),
                _softmax_backward,
                sa.attention_softmax_backward,
                label="softcap-sinks" if sinks else "",
            )
        )
    rows += [
        Case(
            "attention_scores",
            lambda r: (r(B, Q, H, E), r(B, S, G, E), SCALE),
            f.attention_scores,
            sa.attention_scores,
            (0, 1),
        ),
        Case(
            "attention_scores_backward",
            lambda r: (r(B, H, Q, S), r(B, Q, H, E), r(B, S, G, E), SCALE),
            lambda g, q, k, s: gradients(lambda a, b: f.attention_scores(a, b, s), (q, k), g),
            sa.attention_scores_backward,
        ),
        Case(
            "attention_context",
            lambda r: (r(B, H, Q, S), r(B, S, G, U)),
            f.attention_context,
            sa.attention_context,
            (0, 1),
        ),
        Case(
            "attention_context_backward",
            lambda r: (r(B, Q, H, U), r(B, H, Q, S), r(B, S, G, U)),
            lambda g, p, v: gradients(f.attention_context, (p, v), g),
            sa.attention_context_backward,
        ),
        Case(
            "write_kv",
            lambda r: (r(T, G, E), r(T, G, U), r(6, 4, G, E), r(6, 4, G, U), SLOTS),
            f.write_kv,
            sa.write_kv,
            mutates=(2, 3),
        ),
        Case(
            "write_kv",
            lambda r: (r(T, 1, E), None, r(6, 4, 1, E), None, SLOTS),
            f.write_kv,
            sa.write_kv,
            mutates=(2,),
            label="latent",
        ),
    ]
    for channels, interleaved, norm, offset in ((4, False, False, 0.0), (3, True, True, 0.0), (4, False, True, 1.0)):
        rows.append(
            Case(
                "rotate_and_cache",
                lambda r, o=(channels, interleaved, norm, offset): _rotate_and_cache_args(r, *o),
                _rotate_and_cache,
                sa.rotate_and_cache,
                mutates=(3, 4),
                label=f"{'interleaved-part' if interleaved else 'halves'}{'-norm' * norm}{'-offset' * bool(offset)}",
            )
        )
    table = torch.tensor([[4, 1, 2], [0, 5, 3]])
    rows += [
        Case(
            "attention_schedule",
            lambda r: (torch.tensor([7, 5]), torch.tensor([0, 1, 2]), 8, G, 3),
            why="a CPU cuts nothing; tests/ops/kernels/test_paged.py has what a GPU makes",
        ),
        Case("gather_kv", lambda r: (r(6, 4, G, E), r(6, 4, G, U), table, 7, U, r.dtype), f.gather_kv, sa.gather_kv),
        Case(
            "gather_kv",
            lambda r: (r(6, 4, G, E), None, table, 7, U, r.dtype),
            f.gather_kv,
            sa.gather_kv,
            label="latent",
        ),
    ]
    for latent, window, cap, sinks, decode in (
        (False, 0, 0.0, False, True),
        (False, 3, CAP, True, False),
        (True, 0, 0.0, False, False),
    ):
        lengths = (1, 1) if decode else (3, 2)
        label = f"{'latent' if latent else 'kv'}-{'decode' if decode else 'ragged'}{'-window-softcap-sinks' * sinks}"
        rows.append(
            Case(
                "paged_attention",
                lambda r, o=(latent, window, cap, sinks, decode): _paged_args(r, *o),
                f.paged_attention,
                sa.paged_attention,
                label=label,
                batch=batch.Batch.of(lengths, (7, 5)),
            )
        )
    return rows
