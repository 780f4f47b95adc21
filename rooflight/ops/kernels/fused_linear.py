"""Which kernel computes a linear layer with its norm, gate or residual sum, by rows and by the size of the weight.

Measured for a layer's four products and what stands between them (`benchmarks/ops_decode_layer.py`, one H200), µs:
    rows                        1      2      8      16     32     64     128
    Qwen3-0.6B  cuBLAS apart    33.3   35.3   30.4   28.4   28.5   29.4   30.8
                few             -      13.0   13.7   32.8   26.3   -      -
                wide            -      -      -      17.7   21.9   27.1   34.0   from 64 on with a ring that is gone
    8B          cuBLAS apart    120.2  123.9  124.6  127.2  133.5  135.3
                ours            111.1         116.3  117.7  127.2                skinny, then stream
One product: with a norm, 32 rows, qkv: wide 4.8, few 7.4, cuBLAS 7.2. With a sum (1024×2048 and 1024×3072): 32 rows few
3.4 and 4.3, wide 3.9 and 5.3; 64 rows wide 4.8 and 6.9, cuBLAS 6.0 and 7.4; 128 rows 5.6 and 6.7, 6.2 and 7.4, but
there a layer with wide's sums between cuBLAS's products took 32.7.
Legend: T tokens  D width  N output width  K input width
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor
from torch.nn.functional import linear as torch_linear

from rooflight.ops.kernels import few_linear, few_plan, processors, skinny_linear, skinny_plan, stream_plan, wide_plan
from rooflight.ops.kernels.activation import gated_activation
from rooflight.ops.kernels.flash_hopper_plan import is_hopper
from rooflight.ops.kernels.norm import rms_norm

SMALL_WEIGHTS = 8 << 20  # numbers of a matrix: programs of `few` hold that much in registers
# Rows up to which `few` and `wide` are the fastest for small matrices, of products with a norm and with a sum. With a
# norm and 64 rows wide took 6.0 and 8.7 µs, cuBLAS 7.4 and 10.0, but by a ring of x whose bits were not always equal.
FEW_NORMED, FEW_ADDED, WIDE_NORMED, WIDE_ADDED = 8, 32, 32, 64
# Numbers of a matrix from which `stream` makes a plain product too: a head of 128,256×4096 247 µs at 16 rows and 254 at
# 32, cuBLAS 254 and 268; of 28,672×4096 58.3 and 60.2 against 56.7 and 62.4.
HEAD_WEIGHTS = 256 << 20
# Where cuBLAS's own sum in its epilogue costs more than a pass over the residual: 1519 µs against 1371 + 47.
LONG_ROWS, LONG_INPUTS = 4096, 8192


class Way(Enum):
    """Who computes a call."""

    SKINNY = "one row in registers"
    FEW = "a few rows of a small matrix, all inputs in a program"
    WIDE = "tens of rows of a small matrix, whose weights wait for them in shared memory"
    STREAM = "a few rows of a large matrix, by the copy engine"
    APART = "cuBLAS, and kernels beside it"


def way_of(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, normed: bool, gated: bool = False) -> Way:
    """The fastest kernel for these sizes of those that can; normed: with a norm before it, else with a sum after it."""
    if skinny_plan.takes(x_TK, weight_NK, bias_N, fused=True):
        return Way.SKINNY
    weight_rows, inputs = weight_NK.shape
    rows = x_TK.numel() // inputs
    small, hopper = weight_NK.numel() <= SMALL_WEIGHTS, is_hopper(x_TK.device)
    most = stream_plan.WIDE_ROWS if not small else WIDE_NORMED if normed else WIDE_ADDED
    if not 1 < rows <= most or x_TK.dtype not in stream_plan.DTYPES or x_TK.dim() != 2:
        return Way.APART
    # Rows begin at multiples of 16 bytes, as all these kernels want them.
    matrices = (x_TK, weight_NK)
    if inputs % 8 or any(x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16 for x in matrices):
        return Way.APART
    if not small:
        return Way.STREAM if hopper else Way.APART
    outputs = weight_rows // 2 if gated else weight_rows
    if not hopper or rows <= (FEW_NORMED if normed else FEW_ADDED):
        return Way.APART if few_plan.plan_for(rows, outputs, inputs, gated) is None else Way.FEW
    plan = None if outputs % 8 else wide_plan.plan_for(rows, outputs, inputs, gated, processors(x_TK.device))
    return Way.APART if plan is None else Way.WIDE


def _streams(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether a plain product is one of few rows and very many weights."""
    if weight_NK.numel() < HEAD_WEIGHTS or x_TK.dim() != 2 or bias_N is not None or weight_NK.dtype != x_TK.dtype:
        return False
    return way_of(x_TK, weight_NK, bias_N, normed=False) is Way.STREAM


def takes_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> bool:
    """Whether `linear` makes this product; the others are cuBLAS's."""
    return skinny_plan.takes(x_TK, weight_NK, bias_N) or _streams(x_TK, weight_NK, bias_N)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b of few rows. The weights may be what the launch ahead has just written, unlike those of a layer."""
    if not _streams(x_TK, weight_NK, bias_N):
        return skinny_linear.linear(x_TK, weight_NK, bias_N)
    from rooflight.ops.kernels.stream_linear import stream_linear

    return stream_linear(x_TK, weight_NK, early=False)


def norm_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    eps: float,
    offset: float = 0.0,
    gate: str | None = None,
) -> Tensor:
    """f(RMSNorm(x)·Wᵀ + b)."""
    way = way_of(x_TD, weight_ND, bias_N, normed=True, gated=gate is not None)
    if way is Way.SKINNY:
        return skinny_linear.norm_linear(x_TD, norm_weight_D, weight_ND, bias_N, eps, offset, gate)
    if way is Way.FEW:
        return few_linear.norm_linear(x_TD, norm_weight_D, weight_ND, bias_N, eps, offset, gate)
    # Gluon is imported where it runs: the interpreter has none.
    if way is Way.WIDE:
        from rooflight.ops.kernels import wide_linear

        return wide_linear.norm_linear(x_TD, norm_weight_D, weight_ND, bias_N, eps, offset, gate)
    if way is Way.STREAM:
        from rooflight.ops.kernels.stream_linear import stream_linear

        options = {"norm_weight_K": norm_weight_D, "eps": eps, "offset": offset, "activation": gate}
        return stream_linear(x_TD, weight_ND, bias_N, **options)
    y_TN = torch_linear(rms_norm(x_TD, norm_weight_D, eps, offset), weight_ND, bias_N)
    return y_TN if gate is None else gated_activation(y_TN, gate)


def add_linear(residual_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    """residual += x·Wᵀ + b; cuBLAS adds in its epilogue."""
    way = way_of(x_TK, weight_NK, bias_N, normed=False)
    outputs, inputs = weight_NK.shape
    if way is Way.SKINNY:
        skinny_linear.add_linear(residual_TN, x_TK, weight_NK, bias_N)
    elif way is Way.FEW:
        few_linear.add_linear(residual_TN, x_TK, weight_NK, bias_N)
    elif way is Way.WIDE:
        from rooflight.ops.kernels import wide_linear

        wide_linear.add_linear(residual_TN, x_TK, weight_NK, bias_N)
    elif way is Way.STREAM:
        from rooflight.ops.kernels.stream_linear import stream_linear

        stream_linear(x_TK, weight_NK, bias_N, residual_MN=residual_TN)
    elif bias_N is not None or (x_TK.numel() >= LONG_ROWS * inputs and inputs > LONG_INPUTS):
        residual_TN.add_(torch_linear(x_TK, weight_NK, bias_N))
    else:
        residual_TN.view(-1, outputs).addmm_(x_TK.reshape(-1, inputs), weight_NK.t())
