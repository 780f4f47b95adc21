"""Matrix products as a CPU runs them: oneDNN in place of MKL where that is the faster of the two.

On AMD's processors MKL takes its AVX2 code, which leaves half of an AVX-512 unit idle. Measured on one core of a Zen 5
at 2.6 GHz, fp32, GFLOP/s of MKL and oneDNN: 90 and 235 (512×512×512), 95 and 219 (512×8192×512), 97 and 207
(128×2304×768). The choice hangs on the processor and the shapes alone, and oneDNN gives the same bits in every process
and for any number of threads (tests/ops/test_cpu_matmul.py), so that a resumed run repeats the one it resumes.

Weights that many small products share can be packed: oneDNN otherwise reorders a weight in each call, which at one row
costs as much as the product itself. Measured on two such cores, bf16, ms of linear and of the packed product for a
weight of 32,000×768 (49 MB): 1.9 and 1.0 (one row), 2.5 and 1.5 (16 rows), 9.3 and 7.2 (128 rows).
Legend: T rows (any leading dimensions)  N output width  K input width
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rooflight.hardware.host import cpu_name

# Multiplications below which oneDNN's 10 µs a call outweigh its speed: 128×128×128 runs at the same rate in both.
_WORTH_ONEDNN = 2**21


@cache
def _mkl_leaves_half() -> bool:
    """Whether this processor has AVX-512, which MKL does not use on it, and torch has oneDNN's linear layer."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and "AMD" in cpu_name() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _takes_onednn(a_TK: Tensor, b_KN: Tensor) -> bool:
    plain = a_TK.device.type == "cpu" and a_TK.dtype == b_KN.dtype == torch.float32
    # oneDNN's operator has no derivative.
    wanted = torch.is_grad_enabled() and (a_TK.requires_grad or b_KN.requires_grad)
    large = plain and a_TK.numel() * b_KN.shape[1] >= _WORTH_ONEDNN
    return large and not wanted and _mkl_leaves_half() and bool(torch.backends.mkldnn.enabled)


def onednn_product(a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a·b + bias by oneDNN, fp32 on a CPU, in any order of memory."""
    return torch.ops.mkldnn._linear_pointwise(a_TK, b_KN.t(), bias_N, "none", [], "")


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight's copy in oneDNN's own order, and what must still be so for it to stand for the weight."""

    weight: weakref.ref[Tensor]
    version: int
    copy_NK: Tensor


# By the address of the weight's memory: an operator sees a view of the weight, not the tensor that was packed.
_packed: dict[int, _Packed] = {}


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this type, and products of packed ones are the faster ones here."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and _mkl_leaves_half()


def pack(weight_NK: Tensor) -> int:
    """Keep a copy of a weight in oneDNN's order, for products without a derivative; returns the copy's bytes, or 0.

    The copy lives as long as the weight and takes as much memory. It is set aside when the weight has changed, and made
    anew by the next call; a change through `weight.data` is not seen. 0: not a matrix, or of no use on this machine.
    """
    plain = weight_NK.device.type == "cpu" and weight_NK.dim() == 2 and weight_NK.is_contiguous()
    # Without a version there is no telling whether a weight has changed.
    if not plain or weight_NK.is_inference() or not packs(weight_NK.dtype) or not weight_NK.numel():
        return 0
    address = weight_NK.data_ptr()
    if _copy_of(weight_NK.t()) is None:
        copy_NK = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach())
        entry = _Packed(weakref.ref(weight_NK, lambda gone: _forget(address, gone)), weight_NK._version, copy_NK)
        _packed[address] = entry
    return weight_NK.numel() * weight_NK.element_size()


def _forget(address: int, gone: weakref.ref[Tensor]) -> None:
    """Drop a copy whose weight is no more; its address may already be another's."""
    entry = _packed.get(address)
    if entry is not None and entry.weight is gone:
        del _packed[address]


def _copy_of(b_KN: Tensor) -> Tensor | None:
    """The packed copy of a weight that is given transposed, if there is one and it is still true."""
    entry = _packed.get(b_KN.data_ptr())
    weight_NK = None if entry is None else entry.weight()
    if entry is None or weight_NK is None or b_KN.stride() != (1, weight_NK.shape[1]):
        return None
    same = b_KN.shape[1] == weight_NK.shape[0] and b_KN.dtype == weight_NK.dtype
    # The weight itself may have moved to other memory, and this address gone to another tensor.
    moved = weight_NK.data_ptr() != b_KN.data_ptr()
    return entry.copy_NK if same and not moved and weight_NK._version == entry.version else None


def _packed_copy(a_TK: Tensor, b_KN: Tensor) -> Tensor | None:
    """The copy that this product takes in the weight's place."""
    if not _packed or b_KN.device.type != "cpu" or a_TK.dtype != b_KN.dtype or not torch.backends.mkldnn.enabled:
        return None
    wanted = torch.is_grad_enabled() and (a_TK.requires_grad or b_KN.requires_grad)
    return None if wanted or not a_TK.numel() else _copy_of(b_KN)


def product(a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a·b + bias on any device, in any order of memory; 2·T·N·K FLOPs."""
    copy_NK = _packed_copy(a_TK, b_KN)
    if copy_NK is not None:
        return torch.ops.mkldnn._linear_pointwise(a_TK, copy_NK, bias_N, "none", [], "")
    if _takes_onednn(a_TK, b_KN):
        return onednn_product(a_TK, b_KN, bias_N)
    return torch.nn.functional.linear(a_TK, b_KN.t(), bias_N)
