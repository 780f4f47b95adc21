"""The whole transformer layers that nn.TransformerEncoder and nn.MultiheadAttention call in inference.

Legend: B batch, T query positions, S key positions, D model width, F feed-forward width.
"""

from __future__ import annotations

from torch import Tensor

from rooflight.ops.aten.norm import CENTRED
from rooflight.ops.aten.pointwise import GELU_FLOPS
from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import product
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Primitive, precision_of, tensor_bytes

# A score: scale, maximum, subtract, exp, sum, divide.
SOFTMAX = 6


def _attention(query_BTD: Tensor, key_BSD: Tensor, heads: Count, masked: bool) -> tuple[Count, Count]:
    """(matrix multiply, elementwise) FLOPs: projections 2·(2·T + 2·S)·D², scores and context 2·T·S·D each; biases."""
    b, t, d = query_BTD.shape
    s = key_BSD.shape[1]
    matmul = b * (4 * (t + s) * d * d + 4 * t * s * d)
    vector = b * (2 * (t + s) * d + (SOFTMAX + masked) * heads * t * s)
    return matmul, vector


def _fused(call: Call, like_BTD: Tensor, matmul: Count, vector: Count) -> Cost:
    precision = precision_of(like_BTD)
    flops: dict[str, Count] = {precision: matmul}
    flops[VECTOR] = flops.get(VECTOR, 0) + vector
    return Cost(
        flops=flops,
        bytes_read=tensor_bytes(call.reads),
        bytes_written=tensor_bytes(call.writes),
        primitive=Primitive.DYNAMIC,
        access=Access.SEQUENTIAL,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=tuple(like_BTD.shape),
        precision=precision,
        curve="encoder_layer",
    )


@prices("aten::_native_multi_head_attention", "aten::_triton_multi_head_attention")
def multi_head(call: Call) -> Cost:
    """Fused QKV projection, attention over every pair, output projection."""
    query_BTD, key_BSD = call["query"], call["key"]
    matmul, vector = _attention(query_BTD, key_BSD, call["num_head"], call.get("mask") is not None)
    return _fused(call, query_BTD, matmul, vector)


@prices("aten::_transformer_encoder_layer_fwd")
def encoder_layer(call: Call) -> Cost:
    """Attention, feed-forward 4·T·D·F, two layer norms and two residual additions."""
    src_BTD, ffn_FD = call["src"], call["ffn_weight_1"]
    matmul, vector = _attention(src_BTD, src_BTD, call["num_heads"], call.get("mask") is not None)
    tokens, d, f = product(src_BTD.shape[:-1]), src_BTD.shape[-1], ffn_FD.shape[0]
    matmul = matmul + 4 * tokens * d * f
    activation = GELU_FLOPS["none"] if call["use_gelu"] else 1
    vector = vector + tokens * ((1 + activation) * f + d) + tokens * d * (2 * (CENTRED + 2) + 2)
    return _fused(call, src_BTD, matmul, vector)
