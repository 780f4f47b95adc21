"""Which dense calls the Hopper kernel is asked for, where both it and cuDNN can: by sizes alone."""

from __future__ import annotations

import pytest
import torch

from rooflight.ops.attention import choice


@pytest.mark.parametrize(
    ("keys", "head_dim", "window", "taken"),
    [
        (64, 128, 0, True),
        (16384, 128, 0, True),
        (4096, 128, 1024, False),
        (4096, 64, 0, True),
        (4095, 64, 0, False),
        (16384, 96, 0, False),
    ],
)
def test_the_hopper_kernel_is_asked_where_it_is_ahead(keys, head_dim, window, taken, monkeypatch):
    monkeypatch.setattr(choice, "_hopper_takes", lambda *_: True)
    q, k = (torch.empty((1, keys, heads, head_dim), device="meta", dtype=torch.bfloat16) for heads in (8, 2))
    assert choice.hopper_takes(q, k, k, head_dim**-0.5, True, window) is taken


def test_what_it_cannot_goes_on(monkeypatch):
    monkeypatch.setattr(choice, "_hopper_takes", lambda *_: False)
    q = torch.empty((1, 64, 8, 128), device="meta", dtype=torch.bfloat16)
    assert not choice.hopper_takes(q, q, q, 0.1)
