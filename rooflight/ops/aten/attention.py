"""Fused attention operators: what stays on the chip is not written, and what is masked is not counted.

Legend: B batch, H query heads, K key heads, T query positions, S key positions, E head width, F value head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rooflight.ops import batch as batches
from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.visible import visible_pairs
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Part, Primitive, precision_of, tensor_bytes

# A visible pair forward: scale, maximum, subtract, exp, sum. Backward: scale, subtract, exp; dP − δ, times P; scale.
SOFTMAX, SOFTMAX_BACKWARD = 5, 6


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes of one attention call, with the pairs of all sequences of one head.

    paged_positions: key positions that are read when key and value are a whole cache of pages.
    """

    batch: Count
    heads: Count
    key_heads: Count
    queries: Count
    width: Count
    value_width: Count
    pairs: Count
    paged_positions: Count | None = None

    @property
    def size(self) -> tuple[Count, ...]:
        return self.batch, self.heads, self.queries, self.width, self.key_heads


def _dense(call: Call, *, heads_first: bool, offset_bottom: bool = False) -> _Shape:
    query, key, value = call["query"], call["key"], call["value"]
    if not heads_first:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    b, h, t, e = query.shape
    s = key.shape[2]
    left, right, offset = _window(call), None, 0
    mask_type = call.get("custom_mask_type")
    if call.get("is_causal") or mask_type in (1, 2):
        right = 0
    elif call.get("window_size_right") is not None and call["window_size_right"] >= 0:
        right = call["window_size_right"]
    if mask_type == 2 or (offset_bottom and mask_type is None):
        offset = s - t
    pairs = visible_pairs(t, s, left=left, right=right, offset=offset)
    return _Shape(b, h, key.shape[1], t, e, value.shape[-1], b * pairs)


def _window(call: Call) -> Count | None:
    window = call.get("window_size_left")
    if window is not None and window >= 0:
        return window
    window = call.get("window_size")
    if isinstance(window, int) and window > 0:
        return window - 1
    return window[0] if isinstance(window, (list, tuple)) and window[0] >= 0 else None


def _packed(call: Call) -> _Shape:
    """Sequences laid end to end, (total, H, E): their lengths are in the Batch, for no shape tells them."""
    query, key, value = (call[n].flatten(0, -3) for n in ("query", "key", "value"))
    window = call.get("window_size")
    window_right = window[1] if isinstance(window, (list, tuple)) else call.get("window_size_right")
    causal = call.get("is_causal") or call.get("custom_mask_type") in (1, 2)
    right = 0 if causal else window_right if window_right is not None and window_right >= 0 else None
    left = _window(call)
    pairs: Count = 0
    sequences: Count = 0
    positions: Count = 0
    for group in batches.current().groups:
        offset = 0 if call.get("custom_mask_type") == 1 else group.context - group.query
        pairs = pairs + group.count * visible_pairs(group.query, group.context, left=left, right=right, offset=offset)
        sequences = sequences + group.count
        positions = positions + group.count * group.context
    t, h, e = query.shape
    paged = positions if call.get("block_table", "seqused_k") is not None else None
    return _Shape(sequences, h, key.shape[1], t // sequences, e, value.shape[-1], pairs, paged)


def _key_bytes(cache: Tensor, shape: _Shape) -> Count:
    """Bytes of keys or of values that are read: all of them, or of a paged cache the positions in context."""
    if shape.paged_positions is None:
        return tensor_bytes(cache)
    return shape.paged_positions * shape.key_heads * cache.shape[-1] * cache.element_size()


def _forward(call: Call, shape: _Shape) -> Cost:
    """Scores 2·H·P·E and context 2·H·P·F for P visible pairs, softmax 5·H·P + T·H·F; scores stay on the chip.

    Source: Dao, FlashAttention-2, 2307.08691.
    """
    query, key, value = call["query"], call["key"], call["value"]
    precision = precision_of(query)
    out, *others = call.writes
    mask = call.get("attn_bias", "attn_mask", "bias")
    pairs = shape.heads * shape.pairs
    softmax = (SOFTMAX + (mask is not None) + (2 if call.get("dropout_p") else 0)) * pairs + out.numel()
    rest = tensor_bytes(_rest(call, query, key, value))
    key_bytes, value_bytes = _key_bytes(key, shape), _key_bytes(value, shape)
    parts = (
        Part("scores", {precision: 2 * pairs * shape.width}, tensor_bytes(query) + key_bytes),
        Part("softmax", {VECTOR: softmax}, rest, tensor_bytes(others)),
        Part("context", {precision: 2 * pairs * shape.value_width}, value_bytes, tensor_bytes(out)),
    )
    return _sum(parts, shape, precision, "attention")


def _rest(call: Call, *known: Tensor) -> tuple[Tensor, ...]:
    """What is read besides: masks, lengths, statistics."""
    return tuple(t for t in call.reads if not any(t is k for k in known))


def _backward(call: Call, shape: _Shape) -> Cost:
    """Five products: the scores again, dP = dO·Vᵀ, dV, dQ and dK: 2·H·P·(3·E + 2·F), and δ = Σ dO·O a row."""
    query, key, value = call["query"], call["key"], call["value"]
    grad_out, out = call.get("grad_out", "grad_out_"), call["out"]
    precision = precision_of(query)
    grads = call.outputs
    pairs = shape.heads * shape.pairs
    softmax = (SOFTMAX_BACKWARD + (2 if call.get("dropout_p") else 0)) * pairs + 2 * out.numel()
    parts = (
        Part("scores", {precision: 6 * pairs * shape.width}, tensor_bytes((query, key)), tensor_bytes(grads[:2])),
        Part(
            "softmax",
            {VECTOR: softmax},
            tensor_bytes((out, *_rest(call, query, key, value, out, grad_out))),
            tensor_bytes(grads[3:]),
        ),
        Part(
            "context",
            {precision: 4 * pairs * shape.value_width},
            tensor_bytes((value, grad_out)),
            tensor_bytes(grads[2:3]),
        ),
    )
    return _sum(parts, shape, precision, "attention_backward")


def _sum(parts: tuple[Part, ...], shape: _Shape, precision: str, curve: str) -> Cost:
    flops: dict[str, Count] = {}
    read: Count = 0
    written: Count = 0
    for part in parts:
        read, written = read + part.bytes_read, written + part.bytes_written
        for name, count in part.flops.items():
            flops[name] = flops.get(name, 0) + count
    return Cost(
        flops=flops,
        bytes_read=read,
        bytes_written=written,
        primitive=Primitive.DYNAMIC,
        access=Access.SEQUENTIAL,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=shape.size,
        precision=precision,
        curve=curve,
        parts=parts,
    )


SDPA = tuple(
    f"aten::_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
        "attention_math_for_mps",
    )
)


@prices(*SDPA)
def sdpa(call: Call) -> Cost:
    """(B, H, T, E) × (B, K, S, E): causal aligns the top left corner, as scaled_dot_product_attention documents it."""
    return _forward(call, _dense(call, heads_first=True))


@prices(*(f"{name}_backward" for name in SDPA if not name.endswith("mps")))
def sdpa_backward(call: Call) -> Cost:
    return _backward(call, _dense(call, heads_first=True))


def _flash_shape(call: Call) -> _Shape:
    lengths: Any = call.get("cum_seq_q", "cu_seqlens_q", "cu_seq_q")
    # The dense backward is handed placeholders for lengths: only three dimensions or CUTLASS's mask type mean packed.
    packed = lengths is not None and (call["query"].ndim == 3 or call.get("custom_mask_type") is not None)
    if packed or call.get("block_table", "seqused_k") is not None:
        return _packed(call)
    heads_first = "cudnn" in call.name
    # FlashAttention 2.1 and later align a causal mask at the bottom right; cuDNN's and CUTLASS's say which.
    return _dense(call, heads_first=heads_first, offset_bottom=call.name.startswith("_flash"))


@prices(
    "aten::_flash_attention_forward", "aten::_flash_attention_forward_no_dropout_inplace",
    "aten::_efficient_attention_forward", "aten::_cudnn_attention_forward", "torch_attn::_varlen_attn",
    "torch_attn::_varlen_attn_out",
)  # fmt: skip
def flash(call: Call) -> Cost:
    """The kernels beneath SDPA: (B, T, H, E) layout, sliding windows, and packed sequences of the current Batch."""
    return _forward(call, _flash_shape(call))


@prices(
    "aten::_flash_attention_backward", "aten::_efficient_attention_backward", "aten::_cudnn_attention_backward",
    "torch_attn::_varlen_attn_backward",
)  # fmt: skip
def flash_backward(call: Call) -> Cost:
    return _backward(call, _flash_shape(call))
