"""Linear layers with what stands around them in a layer at inference, for `bench ops`: norm before, gate or sum after.

Legend: T tokens  N outputs of the weights  F = N/2 outputs behind a gate  K inputs
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from rooflight.ops.fused_linear import add_linear, norm_linear
from rooflight.workload.op_bench.case import Args, Draw, Operation
from rooflight.workload.op_bench.dense import EPS, plain_gated, plain_rms


def _norm_inputs(draw: Draw, tokens: int, outputs: int, inputs: int, gate: str | None) -> Args:
    return draw(tokens, inputs), draw(inputs), draw(outputs, inputs) / inputs**0.5, gate


def _plain_norm(x_TK: Tensor, norm_weight_K: Tensor, weight_NK: Tensor, gate: str | None) -> Tensor:
    y_TN = F.linear(plain_rms(x_TK, norm_weight_K), weight_NK)
    return y_TN if gate is None else plain_gated(y_TN, gate)


def _norm_label(tokens: int, outputs: int, inputs: int, gate: str | None) -> str:
    return f"{tokens}×{outputs}×{inputs}{'' if gate is None else f', {gate}'}"


def _add_inputs(draw: Draw, tokens: int, outputs: int, inputs: int) -> Args:
    return draw(tokens, outputs), draw(tokens, inputs), draw(outputs, inputs) / inputs**0.5


def _ours_add(residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    add_linear(residual_TN, x_TK, weight_NK)
    return residual_TN


OPERATIONS = [
    Operation(
        "norm_linear",
        "RMSNorm, x·Wᵀ and, where weights hold gate and up, the gated activation",
        make=_norm_inputs,
        ours=lambda x, norm_weight, weight, gate: norm_linear(x, norm_weight, weight, None, EPS, 0.0, gate),
        plain=_plain_norm,
        label=_norm_label,
    ),
    Operation(
        "add_linear",
        "residual += x·Wᵀ, in place; eager makes a new sum",
        make=_add_inputs,
        ours=_ours_add,
        plain=lambda residual, x, weight: residual + F.linear(x, weight),
        label="{}×{}×{}".format,
    ),
]
