"""Factories of torch modules of many kinds, for the tests of `explain module:factory`.

Legend: B examples  T tokens  I inputs  V vocabulary
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

imported = torch.randn


@dataclasses.dataclass
class Nest:
    """An output of a kind that torch does not open by itself."""

    value: Tensor | None
    rest: Any


class Outputs(nn.Module):
    """A linear whose output is wrapped as it is told."""

    def __init__(self, wrap: Any):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.wrap = wrap

    def forward(self, x_BI: Tensor) -> Any:
        return self.wrap(self.inner(x_BI))


class Residual(nn.Module):
    """A block that adds its input to what its layers make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return x_BTI + self.down(torch.relu(self.up(self.norm(x_BTI))))


class Language(nn.Module):
    """A model in a wrapper with a tied head, as libraries build them."""

    def __init__(self, layers: int = 3):
        super().__init__()
        self.model = nn.ModuleDict(
            {"embed": nn.Embedding(50, 16), "layers": nn.ModuleList(Residual() for _ in range(layers))}
        )
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.model["embed"].weight  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTI = self.model["embed"](ids_BT)
        for layer in self.model["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            x_BTI = layer(x_BTI)
        return self.head(x_BTI)


class Named(nn.Module):
    """A module that wants a named argument and gives a loss beside a large output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x_BI: Tensor, *, scale: float) -> dict[str, Any]:
        return {"loss": self.inner(x_BI).sum() * scale, "extra": self.unused(x_BI)}


class Values(nn.Module):
    """A forward that asks whether a sum is positive."""

    def forward(self, x_BI: Tensor) -> Tensor:
        return x_BI * 2 if x_BI.sum() > 0 else x_BI


def language() -> Any:
    return Language(), torch.randint(0, 50, (2, 5))


def named() -> Any:
    return Named(), {"x_BI": torch.randn(4, 8), "scale": 2.0}


def dataclass_output() -> Any:
    return Outputs(lambda y_BI: (None, [Nest(None, {"y": y_BI})])), (torch.randn(4, 8),)


def no_output() -> Any:
    return Outputs(lambda y_BI: None), (torch.randn(4, 8),)


def dropout() -> Any:
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), [torch.randn(4, 8)]


def pipeline() -> Any:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 10)), (torch.randn(2, 3, 32, 32),)


def many() -> Any:
    layers = nn.Sequential()
    for index in range(40):
        layers.add_module(f"block{index}", nn.Linear(8, 8))
    return layers, (torch.randn(4, 8),)


def on_a_gpu() -> Any:
    return nn.Linear(8, 8).cuda(), (torch.randn(4, 8, device="cuda"), torch.ones(1).to("cuda:0"))[:1]


def compiled() -> Any:
    return torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), (torch.randn(4, 8),)


def half() -> Any:
    return nn.Linear(8, 8).bfloat16(), (torch.randn(4, 8, dtype=torch.bfloat16),)


def lazy() -> Any:
    return nn.LazyLinear(8), (torch.randn(4, 8),)


def values() -> Any:
    return Values(), (torch.randn(4, 8),)


def wrong_shape() -> Any:
    return nn.Linear(8, 8), (torch.randn(4, 9),)


def fails() -> Any:
    raise ValueError("no such checkpoint")


def needs_values() -> Any:
    width = int(torch.tensor([6, 2]).sum().item())
    return nn.Linear(width, 8), (torch.randn(4, width),)


def only_a_module() -> Any:
    return nn.Linear(8, 8)


def enormous() -> Any:
    """70 · 10⁹ parameters, 130 GiB in bf16."""
    layers = [nn.Linear(29576, 29576, bias=False, dtype=torch.bfloat16) for _ in range(80)]
    return nn.Sequential(*layers), (torch.randn(8, 29576, dtype=torch.bfloat16),)
