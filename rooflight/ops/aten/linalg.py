"""Fourier transforms and dense factorisations.

Legend: N, M rows and columns of a matrix, R right-hand sides. Counts: Golub and Van Loan, Matrix Computations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import log2, product
from rooflight.ops.cost import VECTOR, Access, Cost, Count, Movement, Primitive, precision_of, tensor_bytes


def _factor(call: Call, like: Tensor, flops: Count, size: tuple[Count, ...]) -> Cost:
    """Columns wait for the columns before them, but nearly all work is matrix multiply on what is left."""
    precision = precision_of(like)
    return Cost(
        flops={precision: flops * (4 if like.dtype.is_complex else 1)},
        bytes_read=tensor_bytes(call.reads),
        bytes_written=tensor_bytes(call.writes),
        primitive=Primitive.MATMUL,
        access=Access.STRIDED,
        movement=(Movement.BROADCAST, Movement.REDUCTION),
        size=size,
        precision=precision,
        curve="factorization",
    )


@prices("aten::_fft_c2c", "aten::_fft_r2c", "aten::_fft_c2r")
def fft(call: Call) -> Cost:
    """5·N·log₂N a complex transform of N points, half of it when one side is real. Source: FFTW's convention."""
    x = call["self"]
    real = call.name != "_fft_c2c"
    signal = call.first_output() if call.name == "_fft_c2r" else x
    points = product(signal.shape[d] for d in call["dim"])
    flops = 5 * signal.numel() * log2(points)
    return Cost(
        flops={VECTOR: flops // 2 if real else flops},
        bytes_read=tensor_bytes(call.reads),
        bytes_written=tensor_bytes(call.writes),
        access=Access.STRIDED,
        movement=(Movement.GATHER, Movement.REDUCTION),
        size=(signal.numel() // points, points),
        precision=VECTOR,
        curve="fft",
    )


def _matrix(a: Tensor) -> tuple[Count, Count, Count]:
    """(batch, rows, columns)."""
    return product(a.shape[:-2]), a.shape[-2], a.shape[-1]


# FLOPs over n³ of a square matrix: Cholesky 1/3, LU 2/3, inverse 2, symmetric eigenvectors 9, general ones 25.
CUBES: dict[str, tuple[int, int]] = {
    "linalg_cholesky_ex": (1, 3), "cholesky": (1, 3), "cholesky_inverse": (2, 3), "linalg_inv_ex": (2, 1),
    "_linalg_det": (2, 3), "_linalg_slogdet": (2, 3), "_linalg_eigh": (9, 1), "linalg_eig": (25, 1),
    "_linalg_eigvals": (10, 1), "linalg_matrix_exp": (20, 1), "linalg_pinv": (14, 1), "linalg_ldl_factor_ex": (1, 3),
}  # fmt: skip


@prices(*(f"aten::{name}" for name in CUBES))
def cube(call: Call) -> Cost:
    a = call.reads[0]
    batch, n, _ = _matrix(a)
    over, under = CUBES[call.name]
    return _factor(call, a, batch * over * n * n * n // under, (batch, n))


@prices("aten::linalg_lu_factor_ex", "aten::linalg_lu", "aten::linalg_qr", "aten::geqrf", "aten::_linalg_svd")
def rectangular(call: Call) -> Cost:
    """LU n²·(m − n/3); QR 2·n²·(m − n/3), twice that with Q formed; SVD 4·m·n² + 8·n³, m ≥ n the two sides."""
    a: Tensor = call.get("A", "self")
    batch, rows, columns = _matrix(a)
    m, n = (rows, columns) if rows >= columns else (columns, rows)
    lu = n * n * m - n * n * n // 3
    if "svd" in call.name:
        flops = 4 * m * n * n + 8 * n * n * n
    else:
        flops = lu if "lu" in call.name else 2 * lu if call.name == "geqrf" else 4 * lu
    return _factor(call, a, batch * flops, (batch, m, n))


@prices(
    "aten::linalg_solve_triangular", "aten::triangular_solve", "aten::_cholesky_solve_helper", "aten::linalg_lu_solve",
    "aten::linalg_ldl_solve", "aten::cholesky_solve", "aten::_linalg_solve_ex", "aten::linalg_lstsq",
)  # fmt: skip
def solve(call: Call) -> Cost:
    """n²·r a triangle; two triangles after a factorisation, plus the factorisation (2/3·n³) where it is inside."""
    pair: Iterable[Tensor] = call.reads
    sides, matrix = call.get("B", "self"), call.get("A", "LU", "LD", "input2")
    matrix = matrix if matrix is not None and matrix is not sides else tuple(pair)[-1]
    batch, n, _ = _matrix(matrix)
    r = sides.numel() // torch.sym_max(batch * n, 1)
    triangles = 1 if "triangular" in call.name else 2
    inside = 2 * n * n * n // 3 if call.name in ("_linalg_solve_ex", "linalg_lstsq") else 0
    return _factor(call, matrix, batch * (triangles * n * n * r + inside), (batch, n, r))


@prices("aten::linalg_cross")
def cross(call: Call) -> Cost:
    """Three components, each of two products and a difference."""
    out = call.first_output()
    return Cost(
        flops={VECTOR: 3 * out.numel()},
        bytes_read=tensor_bytes(call.reads),
        bytes_written=tensor_bytes(out),
        size=(out.numel(),),
        precision=precision_of(out),
        curve="elementwise",
    )


@prices("aten::linalg_householder_product", "aten::ormqr")
def householder(call: Call) -> Cost:
    """n reflections of an m × n matrix: 4·m·n² − 4·n³/3 in all, applied to what is asked for."""
    a: Tensor = call.get("input", "self")
    batch, m, n = _matrix(a)
    return _factor(call, a, batch * (4 * m * n * n - 4 * n * n * n // 3), (batch, m, n))
