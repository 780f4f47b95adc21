"""Tensors of every kind that a checkpoint meets, and how two of them are compared."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(5, 3, generator=generator),
        "layers.0.half": torch.randn(7, generator=generator).bfloat16(),
        "fp8": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
        "double": torch.randn(2, 2, generator=generator).double(),
        "counter": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(0.1 + seed),
        "empty": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "turned": torch.randn(4, 6, generator=generator).t(),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
    }


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 1, requires_grad=tensor.requires_grad) for name, tensor in like.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert raw(a[name]) == raw(b[name]), name


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
