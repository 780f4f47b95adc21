"""Matrix products as a CPU runs them: oneDNN in place of MKL where that is the faster of the two.

On AMD's processors MKL takes its AVX2 code, which leaves half of an AVX-512 unit idle. Measured on one core of a Zen 5
at 2.6 GHz, fp32, GFLOP/s of MKL and oneDNN: 90 and 235 (512×512×512), 95 and 219 (512×8192×512), 97 and 207
(128×2304×768). The choice hangs on the processor and the shapes alone, and oneDNN gives the same bits in every process
and for any number of threads (tests/ops/test_cpu_matmul.py), so that a resumed run repeats the one it resumes.
Legend: T rows (any leading dimensions)  N output width  K input width
"""

from __future__ import annotations

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


def product(a_TK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a·b + bias on any device, in any order of memory; 2·T·N·K FLOPs."""
    if _takes_onednn(a_TK, b_KN):
        return onednn_product(a_TK, b_KN, bias_N)
    return torch.nn.functional.linear(a_TK, b_KN.t(), bias_N)
