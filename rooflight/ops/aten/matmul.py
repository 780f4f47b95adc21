"""Matrix multiplies: mm, bmm, linear, scaled, grouped and weight-only-quantized.

Legend of shape suffixes: B batch, M rows, N columns, K the dimension that is summed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import is_one, product
from rooflight.ops.cost import VECTOR, Cost, Count, matmul_cost, precision_of


def _matmul(
    call: Call,
    m: Count,
    n: Count,
    k: Count,
    *,
    like: Tensor,
    batch: Count | None = None,
    epilogue: Count = 0,
    reads: Iterable[Tensor] | None = None,
) -> Cost:
    """2·B·M·N·K; a complex multiply-add is four real ones."""
    one = matmul_cost(
        m, n, k, precision=precision_of(like), reads=call.reads if reads is None else reads, writes=call.writes
    )
    repeat = (4 if like.dtype.is_complex else 1) * (1 if batch is None else batch)
    flops = {precision: count * repeat for precision, count in one.flops.items()}
    if not (isinstance(epilogue, int) and epilogue == 0):
        flops[VECTOR] = flops.get(VECTOR, 0) + epilogue
    size = (m, n, k) if batch is None else (batch, m, n, k)
    return replace(one, flops=flops, size=size, curve="linear" if batch is None else "bmm")


def _blend(call: Call, added: str, count: Count) -> tuple[Count, tuple[Tensor, ...]]:
    """FLOPs of beta·added + alpha·product, and what is read: beta 0 does not read the addend."""
    alpha, beta = call.get("alpha"), call.get("beta")
    scaled = 0 if alpha is None or is_one(alpha) else count
    if beta == 0:
        addend = call[added]
        return scaled, tuple(t for t in call.reads if t is not addend)
    return scaled + count * (1 if beta is None or is_one(beta) else 2), call.reads


@prices("aten::mm")
def mm(call: Call) -> Cost:
    a_MK, b_KN = call["self"], call["mat2"]
    return _matmul(call, a_MK.shape[0], b_KN.shape[1], a_MK.shape[1], like=a_MK)


@prices("aten::_int_mm", "aten::_weight_int8pack_mm")
def mm_packed(call: Call) -> Cost:
    """The second operand is (K, N), or (N, K) in the packed form; either way the output tells N."""
    a_MK = call["self"]
    return _matmul(call, a_MK.shape[0], call.first_output().shape[-1], a_MK.shape[1], like=a_MK)


@prices("aten::_weight_int4pack_mm", "aten::_weight_int4pack_mm_for_cpu", "aten::_mixed_dtypes_linear")
def mm_weight_only(call: Call) -> Cost:
    """Weights in 4 or 8 bits, arithmetic in the precision of the activations, one scale a weight."""
    a_MK: Tensor = call.get("self", "input")
    k, n = a_MK.shape[-1], call.first_output().shape[-1]
    return _matmul(call, product(a_MK.shape[:-1]), n, k, like=a_MK, epilogue=2 * n * k)


@prices("aten::addmm", "aten::_addmm_activation")
def addmm(call: Call) -> Cost:
    a_MK, b_KN = call["mat1"], call["mat2"]
    m, n, k = a_MK.shape[0], b_KN.shape[1], a_MK.shape[1]
    epilogue, reads = _blend(call, "self", m * n)
    if call.name == "_addmm_activation":
        epilogue = epilogue + m * n * (5 if call["use_gelu"] else 1)
    return _matmul(call, m, n, k, like=a_MK, epilogue=epilogue, reads=reads)


@prices("aten::bmm")
def bmm(call: Call) -> Cost:
    a_BMK, b_BKN = call["self"], call["mat2"]
    return _matmul(call, a_BMK.shape[1], b_BKN.shape[2], a_BMK.shape[2], batch=a_BMK.shape[0], like=a_BMK)


@prices("aten::baddbmm", "aten::addbmm")
def baddbmm(call: Call) -> Cost:
    """addbmm also sums the products over the batch, which the K dimension then contains."""
    a_BMK, b_BKN = call["batch1"], call["batch2"]
    b, m, k, n = *a_BMK.shape, b_BKN.shape[2]
    epilogue, reads = _blend(call, "self", call.first_output().numel())
    return _matmul(call, m, n, k, batch=b, like=a_BMK, epilogue=epilogue, reads=reads)


@prices("aten::_pdist_forward", "aten::_pdist_backward")
def pairs(call: Call) -> Cost:
    """Distances of the N·(N − 1)/2 pairs of rows, as in distances."""
    a_NK = call["self"]
    n, k = a_NK.shape
    one = matmul_cost(1, 1, 1, precision=precision_of(a_NK), reads=call.reads, writes=call.writes)
    count = n * (n - 1) // 2
    return replace(one, flops={VECTOR: count * (3 * k + 1)}, size=(count, k), curve="bilinear")


@prices("aten::mv", "aten::addmv", "aten::dot", "aten::vdot")
def vector(call: Call) -> Cost:
    """Matrix × vector and vector · vector: N = 1."""
    a_MK: Tensor = call.get("mat", "self")
    m, k = (a_MK.shape[0], a_MK.shape[1]) if a_MK.ndim == 2 else (1, a_MK.shape[0])
    epilogue, reads = _blend(call, "self", m) if call.name == "addmv" else (0, call.reads)
    return _matmul(call, m, 1, k, like=a_MK, epilogue=epilogue, reads=reads)


@prices("aten::addr", "aten::outer", "aten::ger")
def outer(call: Call) -> Cost:
    """Outer product, K = 1."""
    out_MN = call.first_output()
    epilogue, reads = _blend(call, "self", out_MN.numel()) if call.name == "addr" else (0, call.reads)
    like = call.get("vec1", "self")
    return _matmul(call, out_MN.shape[0], out_MN.shape[1], 1, like=like, epilogue=epilogue, reads=reads)


@prices("aten::linear", "aten::mkldnn_linear", "mkldnn::_linear_pointwise")
def linear(call: Call) -> Cost:
    """y = x·Wᵀ + b with W (N, K)."""
    x: Tensor = call.get("input", "self", "X")
    n, k = call.first_output().shape[-1], x.shape[-1]
    m = product(x.shape[:-1])
    bias = call.get("bias", "B")
    return _matmul(call, m, n, k, like=x, epilogue=0 if bias is None else m * n)


@prices("aten::linear_backward")
def linear_backward(call: Call) -> Cost:
    """Input and weight gradients of 2·M·N·K each, and the bias gradient's sum."""
    x, grad = call["self"], call["grad_output"]
    wanted = call["output_mask"]
    m, n, k = product(x.shape[:-1]), grad.shape[-1], x.shape[-1]
    cost = _matmul(call, m, n, k, like=x, epilogue=m * n if wanted[2] else 0)
    precision = precision_of(x)
    again = 2 * m * n * k * (wanted[0] + wanted[1] - 1)
    return replace(cost, flops={**cost.flops, precision: cost.flops[precision] + again})


@prices("aten::matmul")
def matmul(call: Call) -> Cost:
    """Any ranks: leading dimensions are a batch, folded into M when the second operand has none."""
    a, b, out = call["self"], call["other"], call.first_output()
    k = a.shape[-1]
    n = b.shape[-1] if b.ndim > 1 else 1
    m = a.shape[-2] if a.ndim > 1 else 1
    if b.ndim <= 2:
        return _matmul(call, product(a.shape[:-1]), n, k, like=a)
    trailing = (a.ndim > 1) + (b.ndim > 1)
    return _matmul(call, m, n, k, like=a, batch=product(out.shape[: out.ndim - trailing]))


@prices("aten::_scaled_mm", "aten::_scaled_mm_v2")
def scaled_mm(call: Call) -> Cost:
    """Low-precision operands with scales; scaling the product is one multiplication an output."""
    a_MK, b_KN = call["self"], call["mat2"]
    m, n = a_MK.shape[0], b_KN.shape[1]
    return _matmul(call, m, n, a_MK.shape[1], like=a_MK, epilogue=m * n * (1 if call.get("bias") is None else 2))


@prices("aten::_grouped_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2")
def grouped_mm(call: Call) -> Cost:
    """One multiply a group, groups laid out along the ragged dimension, so its total length tells the work.

    (M, K)·(G, K, N): rows divided over groups; (M, K)·(K, N) → (G, M, N): K divided; (G, M, K)·(K, N): columns divided.
    """
    a, b = call["self"], call["mat2"]
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    scaled = call.first_output().numel() if "scaled" in call.name else 0
    if a.ndim == 3 and b.ndim == 3:
        return _matmul(call, m, n, k, batch=a.shape[0], like=a, epilogue=scaled)
    return _matmul(call, m, n, k, like=a, epilogue=scaled).named("grouped_mm")


@prices("aten::_trilinear")
def trilinear(call: Call) -> Cost:
    """nn.Bilinear and its gradients: the product of three tensors at every point of their common shape, then sums."""
    shapes = []
    for tensor, expanded in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        shape = list(call[tensor].shape)
        for dim in call[expanded]:
            shape.insert(dim, 1)
        shapes.append(shape)
    points = product(torch.broadcast_shapes(*shapes))
    one = matmul_cost(1, 1, 1, precision=precision_of(call["i2"]), reads=call.reads, writes=call.writes)
    out = call.first_output().numel()
    return replace(one, flops={one.precision or VECTOR: 3 * points}, size=(out, points), curve="bilinear")


@prices("aten::_cdist_forward", "aten::_euclidean_dist", "aten::_cdist_backward")
def distances(call: Call) -> Cost:
    """Distance of every pair of rows: a difference and a multiply-add a coordinate, then a root.

    Backward: the difference again, and a multiply-add of it into each coordinate's gradient.
    """
    a, out = call["x1"], call.get("cdist")
    out = call.first_output() if out is None else out
    m, n, k = out.shape[-2], out.shape[-1], a.shape[-1]
    return _matmul(call, m, n, k, batch=product(out.shape[:-2]), like=a, epilogue=out.numel() * (k + 1))
