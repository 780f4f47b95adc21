"""Training steps to compare, ours and the peers', each behind one function of tokens and targets.

Legend: P batches of the pool  B sequences  T tokens a sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor

from rooflight.models.config import ModelConfig
from rooflight.models.recompute import Recompute
from rooflight.workload.optimizers import UPDATES
from rooflight.workload.program import DTYPES, Setting, build_model, decoder
from rooflight.workload.training import Recipe

Step = Callable[[Tensor, Tensor], Tensor]
"""tokens_BT, targets_BT → the loss: forward, backward, optimizer, gradients let go."""

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


@dataclass(frozen=True, slots=True)
class Job:
    """What all contenders train: the same decoder on the same batches; recompute is none or full.

    clip: the largest norm of the gradients, for all alike; 0 has the peers leave norm and clipping out.
    """

    config: ModelConfig
    batch: int
    context: int
    dtype: str = "bf16"
    recompute: str = "none"
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def setting_of(job: Job, optimizer: str) -> Setting:
    """Our step as `rooflight train` takes it, the gradients' norm and its clipping included."""
    recipe = Recipe(cast("Recompute", job.recompute), clip=job.clip, update=UPDATES[optimizer])
    return Setting("train", job.batch, job.context, job.dtype, recipe=recipe)


def ours(job: Job, device: str, optimizer: str) -> Step:
    """Rooflight's own step; optimizer: adamw-bf16, adamw, adamw-master … as in `rooflight explain`."""
    model = build_model(job.config, job.dtype, device).initialize()
    program = decoder(job.config, setting_of(job, optimizer), device, fold=False, model=model)
    tokens_T, targets_T, _ = program.standing["inputs"][0][0]

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        tokens_T.copy_(tokens_BT.flatten())
        targets_T.copy_(targets_BT.flatten())
        return program.step(None)

    return step


def torch_step(loss_of: Step, parameters: Iterator[torch.nn.Parameter], clip: float) -> Step:
    """A peer's step: loss, backward, clipping and torch's fused AdamW, whose states have the weights' dtype."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, fused=True, **HYPER)

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss = loss_of(tokens_BT, targets_BT)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def batches(job: Job, device: str, pool: int = 8, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens_BT, targets_BT) from a pool of random batches, the same for every contender of a job."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pool, job.batch, job.context + 1)
    drawn = torch.randint(0, job.config.vocab_size, shape, generator=generator).to(device)
    tokens_PBT, targets_PBT = drawn[..., :-1].contiguous(), drawn[..., 1:].contiguous()
    return cycle(zip(tokens_PBT, targets_PBT, strict=True))
