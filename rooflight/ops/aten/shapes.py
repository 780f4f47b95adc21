"""Small sums over shapes and strides that the rules share; every size may be symbolic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Access, Count


def product(sizes: Iterable[Count]) -> Count:
    """Product of sizes; 1 of none."""
    total: Count = 1
    for size in sizes:
        total = total * size
    return total


def elements(tensors: Iterable[Tensor]) -> Count:
    """Elements of several tensors together."""
    total: Count = 0
    for tensor in tensors:
        total = total + tensor.numel()
    return total


def log2(size: Count) -> Count:
    """ceil(log2(size)), an int, or its symbolic logarithm."""
    if isinstance(size, int):
        return max(1, (size - 1).bit_length())
    return torch._sym_log2(size)  # pyright: ignore[reportAttributeAccessIssue]


def rows_and_columns(tensor: Tensor, columns: Count) -> tuple[Count, Count]:
    """(elements / columns, columns): how a row-wise kernel sees a tensor."""
    return tensor.numel() // columns if columns else tensor.numel(), columns


def reduced_columns(tensor: Tensor, dims: Any) -> Count:
    """Elements that meet in one result when `dims` are reduced; no dims means all of them."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tensor.numel()
    return product(tensor.shape[d] for d in (dims if isinstance(dims, (list, tuple)) else (dims,)) if tensor.ndim)


def unit_dim(tensor: Tensor) -> int | None:
    """The dimension, counted from the last, along which neighbours are adjacent in memory."""
    single = True
    for i in range(tensor.ndim - 1, -1, -1):
        size, stride = tensor.shape[i], tensor.stride(i)
        if isinstance(size, int) and size == 1:
            continue
        single = False
        if isinstance(stride, int) and stride == 1:
            return i - tensor.ndim
    return 0 if single else None


def access_of(tensors: Iterable[Tensor]) -> Access:
    """Sequential when all tensors can be walked along one dimension of unit stride, otherwise strided."""
    dims: set[int] = set()
    for tensor in tensors:
        if any(isinstance(s, int) and s == 0 for s in tensor.stride()):
            continue
        dim = unit_dim(tensor)
        if dim is None:
            return Access.STRIDED
        if dim != 0:
            dims.add(dim)
    return Access.SEQUENTIAL if len(dims) <= 1 else Access.STRIDED


def broadcasts(inputs: Iterable[Tensor], output: Tensor) -> bool:
    """Whether an input is spread over more elements of the output than it has."""
    for tensor in inputs:
        if tensor.ndim < output.ndim or any(isinstance(s, int) and s == 0 for s in tensor.stride()):
            return True
        for size, out in zip(tensor.shape, output.shape, strict=False):
            if isinstance(size, int) and size == 1 and not (isinstance(out, int) and out == 1):
                return True
    return False


def is_one(count: Any) -> bool:
    """Whether a scalar argument is the plain number 1, which costs no multiplication."""
    return isinstance(count, (int, float)) and math.isclose(count, 1.0, rel_tol=0.0, abs_tol=0.0)
