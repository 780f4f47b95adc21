"""Linear layers, norms, activations, rotary positions, softmax and the embedding, for `bench ops`.

Legend: M, T rows or tokens  N outputs  K inputs (of a linear), key heads (of rotary)  D width  F feed-forward width
        H query heads  E head dim  C channel pairs  V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rooflight.ops import activation, embedding, layer_norm, linear, norm, rope, rotary_qkv
from rooflight.ops.attention.naive import attention_softmax
from rooflight.workload.op_bench import installed
from rooflight.workload.op_bench.case import Args, Draw, Operation

EPS = 1e-5
TRAINED_ROWS = 256  # fewer rows are a decode step's, which has no backward


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rows_first(rows: int, *_: int) -> bool:
    """Sizes that begin with the rows: whether a training step has so many."""
    return rows >= TRAINED_ROWS


def _linear_inputs(draw: Draw, m: int, n: int, k: int) -> Args:
    return draw(m, k), draw(n, k) / k**0.5


def _norm_inputs(draw: Draw, rows: int, width: int) -> Args:
    return draw(rows, width), draw(width)


def _add_norm_inputs(draw: Draw, rows: int, width: int) -> Args:
    return draw(rows, width), draw(rows, width), draw(width)


def plain_rms(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return F.rms_norm(x_TD, weight_D.shape, weight_D, EPS)


def _plain_add_rms(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> Args:
    total_TD = x_TD + residual_TD
    return plain_rms(total_TD, weight_D), total_TD


def _plain_add_layer_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor) -> Args:
    total_TD = x_TD + residual_TD
    return F.layer_norm(total_TD, weight_D.shape, weight_D, bias_D, EPS), total_TD


def _softmax_of(x_TD: Tensor) -> Tensor:
    powers = torch.exp(x_TD - x_TD.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def fused_qkv(draw: Draw, tokens: int, heads: int, key_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as slices of one projection's output, as a decoder has them."""
    q, k, v = draw(tokens, heads + 2 * key_heads, head_dim).split([heads, key_heads, key_heads], 1)
    return q, k, v


def _rotary_inputs(draw: Draw, tokens: int, heads: int, key_heads: int, head_dim: int) -> Args:
    q, k, _ = fused_qkv(draw, tokens, heads, key_heads, head_dim)
    angles_TC = draw(tokens, head_dim // 2, dtype=torch.float32)
    return q, k, angles_TC.cos(), angles_TC.sin()


def turned(x_THE: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    (a, b), cos, sin = at_least_fp32(x_THE).chunk(2, -1), cos_TC.unsqueeze(1), sin_TC.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_THE.dtype)


def _plain_rotary(q_THE: Tensor, k_TKE: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Args:
    return turned(q_THE, cos_TC, sin_TC), turned(k_TKE, cos_TC, sin_TC)


def _rotary_qkv_inputs(draw: Draw, tokens: int, heads: int, key_heads: int, head_dim: int) -> Args:
    angles_TC = draw(tokens, head_dim // 2, dtype=torch.float32)
    return draw(tokens, (heads + 2 * key_heads) * head_dim), angles_TC.cos(), angles_TC.sin(), heads, key_heads


def _plain_rotary_qkv(qkv_TW: Tensor, cos_TC: Tensor, sin_TC: Tensor, heads: int, key_heads: int) -> Args:
    q, k, v = qkv_TW.unflatten(1, (heads + 2 * key_heads, -1)).split([heads, key_heads, key_heads], 1)
    return turned(q, cos_TC, sin_TC), turned(k, cos_TC, sin_TC), v.contiguous()


def _applied(x: Tensor, kind: str) -> Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def plain_gated(gate_up_T2F: Tensor, kind: str) -> Tensor:
    gate, up = gate_up_T2F.chunk(2, -1)
    return _applied(gate, kind) * up


def _kind_first(kind: str, rows: int, *_: int) -> bool:
    return rows_first(rows)


def _liger_norm(function: Any, x_TD: Tensor, weight_D: Tensor) -> Tensor:
    # Not in place: the incoming gradient is given again in the next repeat.
    return function(x_TD, weight_D, EPS, 0.0, "llama", False)


def _liger_add_norm(function: Any, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> Args:
    return function(x_TD, residual_TD, weight_D, EPS, 0.0, "llama", False)


OPERATIONS = [
    Operation(
        "linear",
        "x·Wᵀ",
        make=_linear_inputs,
        ours=lambda x, weight: linear.linear(x, weight, None),
        plain=F.linear,
        label="{}×{}×{}".format,
        wrt=(0, 1),
        trains=rows_first,
        compiles=False,
    ),
    Operation(
        "rms_norm",
        "RMSNorm",
        make=_norm_inputs,
        ours=lambda x, weight: norm.rms_norm(x, weight, EPS),
        plain=plain_rms,
        label="{}×{}".format,
        peers=lambda device: installed.liger("liger_rms_norm", device, _liger_norm),
        wrt=(0, 1),
        trains=rows_first,
    ),
    Operation(
        "add_rms_norm",
        "residual add and RMSNorm",
        make=_add_norm_inputs,
        ours=lambda x, residual, weight: norm.add_rms_norm(x, residual, weight, EPS),
        plain=_plain_add_rms,
        label="{}×{}".format,
        peers=lambda device: installed.liger("liger_fused_add_rms_norm", device, _liger_add_norm),
        wrt=(0, 1, 2),
        trains=rows_first,
    ),
    Operation(
        "layer_norm",
        "LayerNorm",
        make=lambda draw, rows, width: (draw(rows, width), draw(width), draw(width)),
        ours=lambda x, weight, bias: layer_norm.layer_norm(x, weight, bias, EPS),
        plain=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS),
        label="{}×{}".format,
        peers=lambda device: installed.liger("liger_layer_norm", device, lambda function, *args: function(*args, EPS)),
        wrt=(0, 1, 2),
        trains=rows_first,
    ),
    Operation(
        "add_layer_norm",
        "residual add and LayerNorm",
        make=lambda draw, rows, width: (draw(rows, width), draw(rows, width), draw(width), draw(width)),
        ours=lambda x, residual, weight, bias: layer_norm.add_layer_norm(x, residual, weight, bias, EPS),
        plain=_plain_add_layer_norm,
        label="{}×{}".format,
        wrt=(0, 1, 2, 3),
        trains=rows_first,
    ),
    Operation(
        "softmax",
        "softmax of rows, as naive attention's of its scores",
        make=lambda draw, rows, width: (draw(rows, width),),
        # A view: the backward of an index would fill and copy two more matrices.
        ours=lambda x: attention_softmax(x[None, None], False).flatten(0, 2),
        plain=lambda x: torch.softmax(x, -1),
        reference=_softmax_of,
        label="{}×{}".format,
        peers=lambda device: installed.liger("liger_softmax", device, lambda function, x: function(x)),
        wrt=(0,),
        trains=rows_first,
    ),
    Operation(
        "rotary",
        "rotary positions of q and k, slices of one projection",
        make=_rotary_inputs,
        ours=lambda q, k, cos, sin: rope.rotary(q, k, cos, sin),
        plain=_plain_rotary,
        label="{}×({}+{})×{}".format,
        peers=installed.liger_rope,
        wrt=(0, 1),
        trains=rows_first,
        also=("rope",),
    ),
    Operation(
        "rotary_qkv",
        "rotary positions of q and k, and v, out of one projection; back into its gradient",
        make=_rotary_qkv_inputs,
        ours=rotary_qkv.rotary_qkv,
        plain=_plain_rotary_qkv,
        label="{}×({}+{})×{}".format,
        wrt=(0,),
        trains=rows_first,
    ),
    Operation(
        "gated_activation",
        "SwiGLU and GeGLU over stacked gate and up",
        make=lambda draw, kind, rows, width: (draw(rows, 2 * width), kind),
        ours=activation.gated_activation,
        plain=plain_gated,
        label="{} {}×{}".format,
        peers=installed.liger_gate,
        wrt=(0,),
        trains=_kind_first,
        also=("swiglu", "geglu"),
    ),
    Operation(
        "activation",
        "GELU and SiLU",
        make=lambda draw, kind, rows, width: (draw(rows, width), kind),
        ours=activation.activation,
        plain=_applied,
        label="{} {}×{}".format,
        wrt=(0,),
        trains=_kind_first,
        also=("gelu", "silu"),
    ),
    Operation(
        "embedding",
        "token embedding",
        make=lambda draw, count, vocabulary, width: (draw.tokens(count, vocabulary), draw(vocabulary, width)),
        ours=lambda tokens, weight: embedding.embedding(tokens, weight),
        plain=F.embedding,
        label="{} of {}×{}".format,
        wrt=(1,),
        trains=rows_first,
    ),
]
