"""Attention within documents that lie one after the other in a row of tokens: no token sees across a border.

out_t = Σ_s softmax_s(q_t·k_s·scale)·v_s over the tokens s ≤ t of t's own document (Krell et al. 2107.02027).
Lengths stand in `ops.batch`, for no shape holds them.
Legend: T tokens  N documents  H query heads  K key heads  E head dim  U value dim
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops import batch
from rooflight.ops.attention import choice, chunked, flash, pairs
from rooflight.ops.attention.chunked import Sight
from rooflight.ops.cost import Access, Cost, Count, precision_of, tensor_bytes
from rooflight.ops.op import Op


def _runs(starts_N1: Tensor, tokens: int, max_length: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Neighbouring documents of one length as (tokens, (documents, length)): a run is one call without a copy."""
    starts = starts_N1.tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or min(lengths, default=0) < 0:
        raise InvalidValue(f"starts must rise from 0 to the {tokens} tokens; they are {_shown(starts)}")
    if max(lengths, default=0) > max_length:
        raise InvalidValue(f"max_length {max_length} is less than the longest document, {max(lengths)} tokens")
    start = 0
    for length, equal in groupby(lengths):
        count = len(list(equal))
        if length:
            yield slice(start, start + count * length), (count, length)
        start += count * length


def _shown(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, …, {values[-1]}]"


def _sight(starts_N1: Tensor, tokens: int, max_length: int, scale: float, window: int, softcap: float) -> Sight:
    """Documents as a mask from the starts alone, whose values the host never reads."""
    tokens_T = torch.arange(tokens, dtype=starts_N1.dtype, device=starts_N1.device)
    document_T = torch.searchsorted(starts_N1[1:], tokens_T, right=True)
    return Sight(scale, True, window, softcap, starts_N1[document_T], max_length)


def masked_forward(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operation without any host synchronisation: a GPU's way where no kernel takes the call."""
    sight = _sight(starts_N1, q_THE.shape[0], max_length, scale, window, softcap)
    q, k, v = (x.unsqueeze(0) for x in (q_THE, k_TKE, v_TKU))
    out, lse = chunked.forward(q, k, v, sight, sinks_H)
    return out[0], lse[0]


def masked_backward(
    grad_THU: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    out_THU: Tensor,
    lse_HT: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its backward, likewise without synchronisation."""
    sight = _sight(starts_N1, q_THE.shape[0], max_length, scale, window, softcap)
    grad, q, k, v, out, lse = (x.unsqueeze(0) for x in (grad_THU, q_THE, k_TKE, v_TKU, out_THU, lse_HT))
    dq, dk, dv, grad_sinks = chunked.backward(grad, q, k, v, out, lse, sight, sinks_H)
    return dq[0], dk[0], dv[0], grad_sinks


def _packed(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if q_THE.device.type != "cpu":
        return masked_forward(q_THE, k_TKE, v_TKU, starts_N1, max_length, scale, window, softcap, sinks_H)
    out, lse = _packed_shape(q_THE, k_TKE, v_TKU)
    for piece, run in _runs(starts_N1, q_THE.shape[0], max_length):
        q, k, v = (x[piece].unflatten(0, run) for x in (q_THE, k_TKE, v_TKU))
        run_out, run_lse = flash.attention.reference(q, k, v, scale, True, window, softcap, sinks_H)
        out[piece] = run_out.flatten(0, 1)
        lse[:, piece] = run_lse.transpose(0, 1).flatten(1)
    return out, lse


def _packed_shape(q_THE: Tensor, k_TKE: Tensor, v_TKU: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads = q_THE.shape[:2]
    out = q_THE.new_empty((tokens, heads, v_TKU.shape[-1]))
    return out, q_THE.new_empty((heads, tokens), dtype=torch.float32)


def _visible(tokens: Count, window: int) -> tuple[Count, Count]:
    """Visible pairs of all documents, and the length of the document in which a mean token stands."""
    total: Count = 0
    pair_count: Count = 0
    squares: Count = 0
    for group in batch.current().groups:
        total = total + group.count * group.query
        pair_count = pair_count + group.count * pairs.visible_pairs(group.query, group.query, True, window)
        squares = squares + group.count * group.query * group.query
    if isinstance(total, int) and isinstance(tokens, int) and total != tokens:
        raise InvalidValue(
            f"the batch in force holds documents of {total} tokens and packed attention runs over {tokens}; "
            "use the one that Layout.of_documents returns"
        )
    return pair_count, squares // total


def _packed_cost(
    out: tuple[Tensor, Tensor],
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> Cost:
    tokens, heads, head_dim = q_THE.shape
    pair_count, length = _visible(tokens, window)
    parts = flash.forward_parts(
        precision_of(q_THE),
        heads * pair_count,
        heads * tokens,
        head_dim,
        v_TKU.shape[-1],
        softcap,
        sinks_H,
        tensor_bytes((q_THE, k_TKE, starts_N1)),
        tensor_bytes(v_TKU),
        tensor_bytes(out),
    )
    size = (tokens, heads, length, head_dim, k_TKE.shape[1])
    return flash.fused_cost(parts, size, precision_of(q_THE), Access.SEQUENTIAL)


def _packed_backward(
    grad_THU: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    out_THU: Tensor,
    lse_HT: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (grad_THU, q_THE, k_TKE, v_TKU, out_THU)
    if q_THE.device.type != "cpu":
        return masked_backward(*tensors, lse_HT, starts_N1, max_length, scale, window, softcap, sinks_H)
    *grads, none = _packed_backward_shape(grad_THU, q_THE, k_TKE, v_TKU, sinks_H)
    grad_sinks = torch.zeros_like(none, dtype=torch.float32)
    for piece, run in _runs(starts_N1, q_THE.shape[0], max_length):
        laid = (x[piece].unflatten(0, run) for x in tensors)
        lse = lse_HT[:, piece].unflatten(1, run).transpose(0, 1)
        *found, sinks = flash.attention_backward.reference(*laid, lse, scale, True, window, softcap, sinks_H)
        for grad, part in zip(grads, found, strict=True):
            grad[piece] = part.flatten(0, 1)
        grad_sinks += sinks
    dq, dk, dv = grads
    return dq, dk, dv, grad_sinks.to(none.dtype)


def _packed_backward_shape(
    grad_THU: Tensor, q_THE: Tensor, k_TKE: Tensor, v_TKU: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks_H = rest[-1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_THE, k_TKE, v_TKU))
    return dq, dk, dv, q_THE.new_empty((0,)) if sinks_H is None else sinks_H.new_empty(sinks_H.shape)


def _packed_backward_cost(
    out: tuple[Tensor, ...],
    grad_THU: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKU: Tensor,
    out_THU: Tensor,
    lse_HT: Tensor,
    starts_N1: Tensor,
    max_length: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> Cost:
    tokens, heads, head_dim = q_THE.shape
    pair_count, length = _visible(tokens, window)
    parts = flash.backward_parts(
        precision_of(q_THE),
        heads * pair_count,
        heads * tokens,
        head_dim,
        v_TKU.shape[-1],
        softcap,
        sinks_H is not None,
        read=((q_THE, k_TKE, starts_N1), (out_THU, lse_HT, sinks_H), (grad_THU, v_TKU)),
        written=(out[:2], out[3], out[2]),
    )
    size = (tokens, heads, length, head_dim, k_TKE.shape[1])
    return flash.fused_cost(parts, size, precision_of(q_THE), Access.SEQUENTIAL)


packed_attention_backward = Op(
    "packed_attention_backward",
    _packed_backward,
    cost=_packed_backward_cost,
    shape=_packed_backward_shape,
    kernel=choice.packed_backward,
    kernel_takes=choice.takes_packed_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.max_length, ctx.scale, ctx.window, ctx.softcap, sinks = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, starts, sinks)


def _backward(ctx: Any, grad_THU: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, sinks = ctx.saved_tensors
    options = (ctx.max_length, ctx.scale, ctx.window, ctx.softcap, sinks)
    dq, dk, dv, grad_sinks = packed_attention_backward(grad_THU, *tensors, *options)
    return dq, dk, dv, None, None, None, None, None, None if sinks is None else grad_sinks


packed_attention = Op(
    "packed_attention",
    _packed,
    cost=_packed_cost,
    shape=_packed_shape,
    kernel=choice.packed_forward,
    kernel_takes=choice.takes_packed_forward,
    backward=_backward,
    setup=_setup,
)
