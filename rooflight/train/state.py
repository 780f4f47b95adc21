"""What a checkpoint of a run keeps: every tensor by name, and the rest as plain data; and putting it back.

The order of the data, the learning rate and the rounding are functions of the step; torch's own random state, which no
step draws from today, is kept by the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rooflight.workload.optimizers import named_states
from rooflight.workload.training import Trainee


def tensors(trainee: Trainee) -> dict[str, Tensor]:
    """Weights, kept buffers and optimizer states by name; views of what the run itself updates."""
    found = {f"model.{name}": p.detach() for name, p in trainee.model.named_parameters()}
    # state_dict knows which buffers are kept; rotary frequencies are computed anew.
    kept = trainee.model.state_dict(keep_vars=True)
    found |= {f"model.{name}": buffer for name, buffer in trainee.model.named_buffers() if name in kept}
    for name, state, key in named_states(trainee.model, trainee.optimizer):
        if isinstance(state[key], Tensor):
            found[name] = state[key]
    return found


def counts(trainee: Trainee) -> dict[str, Any]:
    """The optimizer's plain numbers by name: how many steps each parameter has taken."""
    found = {}
    for name, state, key in named_states(trainee.model, trainee.optimizer):
        if not isinstance(state[key], Tensor):
            found[name] = state[key]
    return found


def restore_counts(trainee: Trainee, saved: Mapping[str, Any]) -> None:
    """Put the plain numbers back; the tensors were filled in place."""
    for name, state, key in named_states(trainee.model, trainee.optimizer):
        if not isinstance(state[key], Tensor):
            state[key] = saved[name]


def rounding_seed(seed: int, step: int) -> int:
    """The seed of one step's stochastic rounding: another for each step, the same on a resume; never 0."""
    return 1 + (seed * 1_000_003 + step) % (2**31 - 2)


def finite(value: Tensor | None) -> bool:
    """Whether a scalar is finite, waiting for the device; True for none."""
    return value is None or bool(torch.isfinite(value))
