"""Triton is imported when a kernel first runs, and not before."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rooflight.ops import norm
from rooflight.ops.op import lazy


def test_importing_the_operations_does_not_import_triton():
    program = """
import sys
import rooflight.models.transformer
from rooflight.ops.norm import rms_norm
kernels = [name for name in sys.modules if name.startswith("rooflight.ops.kernels.")]
assert "triton" not in sys.modules and not kernels, kernels
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_lazy_finds_its_function():
    assert lazy("math", "hypot")(3.0, 4.0) == 5.0
    with pytest.raises(AttributeError):
        lazy("math", "no_such_function")()


def test_a_call_on_a_gpu_goes_to_the_kernel_or_to_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(norm.rms_norm, "kernel", lambda *args: "kernel")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU tensor's device
    x, weight = torch.ones(2, 4), torch.ones(4)
    assert norm.rms_norm._on_gpu(x, weight, 1e-5) == "kernel"
    assert torch.equal(norm.rms_norm._on_gpu(x.double(), weight.double(), 0.0), x.double())
