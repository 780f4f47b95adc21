"""What the GPU tests of linear layers share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, the workspace's too."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def filled(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kw: filled(new_empty(self, *args, **kw)))
    monkeypatch.setattr(torch, "empty", lambda *args, **kw: filled(empty(*args, **kw)))
