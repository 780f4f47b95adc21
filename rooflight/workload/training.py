"""A training step: forwards and backwards, the gradients' norm, the optimizer; run wet to train, dry to price.

Legend: T tokens of a micro-batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rooflight.models.layout import Layout
from rooflight.models.recompute import Recompute
from rooflight.models.transformer import Transformer
from rooflight.ops import batch as batches
from rooflight.ops.optimizer import clip_scale, grad_norm
from rooflight.workload.optimizers import Member, Update, members
from rooflight.workload.record import OPTIMIZER, Recorder


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward reads: tokens, what follows each, positions, and how they lie."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    layout: Layout
    facts: batches.Batch


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a step is taken, beyond the model and its optimizer.

    document_length: rows are packed with documents of this length (what is left ends the row); 0: a row is one.
    micro_batches: forwards and backwards a step. update: the optimizer, where it is not named otherwise.
    clip: the largest norm that gradients may keep, 0 for any; None leaves even the norm uncomputed.
    fp32_gradients: gradients of micro-batches add up in fp32 whatever the weights are.
    """

    recompute: Recompute = "none"
    clip: float | None = None
    fp32_gradients: bool = False
    micro_batches: int = 1
    update: Update | None = None
    document_length: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step leaves to be read: the mean loss, the gradients' norm before clipping, and their factor.

    factor: what the optimizer multiplied gradients by; not finite where it did nothing, for loss or norm are not.
    """

    loss: Tensor
    norm: Tensor | None
    factor: Tensor | None


@dataclass(slots=True)
class Trainee:
    """A decoder that is trained: its parameters, their optimizer, and the fp32 gradients where the recipe wants them.

    stand_ins: in a folded model, parameters for the layers left out, so that the optimizer moves what it moves for all.
    """

    model: Transformer
    recipe: Recipe
    optimizer: Any = None
    stand_ins: list[Member] = field(default_factory=list)
    accumulators: dict[Tensor, Tensor] = field(default_factory=dict)
    _first: bool = True

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn, those of the model itself."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def parameters(self) -> list[Member]:
        """All that the optimizer moves."""
        return [*members(self.model), *self.stand_ins]

    def accumulate_in_fp32(self) -> None:
        """Make fp32 gradients that each micro-batch adds to as its backward goes along."""
        for p in self.trained:
            self.accumulators[p] = torch.zeros_like(p, dtype=torch.float32)
            p.register_post_accumulate_grad_hook(self._add)
        for member in self.stand_ins:
            p = member.parameter
            self.accumulators[p] = torch.zeros_like(p, dtype=torch.float32)
            p.grad = None

    @torch.no_grad()
    def _add(self, p: Tensor) -> None:
        if p.grad is not None:
            if self._first:
                self.accumulators[p].copy_(p.grad)
            else:
                self.accumulators[p].add_(p.grad)
            p.grad = None

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        targets: int = 0,
        seed: int = 0,
        recorder: Recorder | None = None,
        before_update: Callable[[Tensor | None], bool] | None = None,
    ) -> Outcome:
        """One step over its micro-batches.

        targets: the tokens of the whole step that have a target, which the loss is the mean over; 0: the only
            micro-batch's own. seed: for stochastic rounding, 0 rounds to nearest. before_update: called with the
            factor before the optimizer; the update is left out when it says no.
        """
        loss = self.gradients(micro_batches, targets)
        grads = [self.gradient(member.parameter) for member in self.parameters()]
        present = [grad for grad in grads if grad is not None]
        if recorder is not None:
            recorder.label(present, "gradients")
        norm = factor = None
        with in_phase(recorder, OPTIMIZER):
            if self.recipe.clip is not None:
                norm = grad_norm(present)
                # Zero times a loss that is not finite is not a number: the factor then is none either.
                factor = clip_scale(norm + 0.0 * loss, self.recipe.clip)
            if (before_update is None or before_update(factor)) and self.optimizer is not None:
                self._update(factor, seed)
        # Gradients are made afresh in each step, as after zero_grad.
        for p in self.trained:
            p.grad = None
        return Outcome(loss, norm, factor)

    def gradients(self, micro_batches: Sequence[MicroBatch], targets: int = 0) -> Tensor:
        """Forward and backward of every micro-batch; the loss over all of them."""
        loss: Tensor | None = None
        self._first = True
        for micro in micro_batches:
            with batches.use(micro.facts):
                part = self.model(
                    micro.tokens_T,
                    micro.positions_T,
                    micro.layout,
                    micro.targets_T,
                    recompute=self.recipe.recompute,
                    target_count=targets,
                )
                part.backward()
            part = part.detach()
            loss = part if loss is None else loss + part
            self._first = False
        return loss if loss is not None else torch.zeros(())

    def gradient(self, p: Tensor) -> Tensor | None:
        """A parameter's gradient of this step, wherever it was added up."""
        return self.accumulators.get(p, p.grad)

    def _update(self, factor: Tensor | None, seed: int) -> None:
        if isinstance(self.optimizer, torch.optim.SGD):
            self.optimizer.step()
            return
        self.optimizer.step(scale=factor, seed=seed, grads=self.accumulators or None)


@contextmanager
def in_phase(recorder: Recorder | None, name: str) -> Iterator[None]:
    """Mark what happens inside as belonging to a phase."""
    if recorder is None:
        yield
        return
    with recorder.phase(name):
        yield


def stand_ins(model: Transformer, counts: Sequence[int], hidden_apart: bool) -> list[Member]:
    """Parameters for the layers that folding left out, one for all that repeat the same one.

    hidden_apart: each repeated hidden matrix by itself, for an optimizer that works on whole matrices.
    """
    made: list[Member] = []
    for layer, count in zip(model.layers, counts, strict=True):
        for p in layer.parameters():
            if p.requires_grad and count > 1:
                alone = hidden_apart and p.dim() == 2
                shapes = [p.shape] * (count - 1) if alone else [(count - 1, *p.shape)]
                for shape in shapes:
                    copy = nn.Parameter(p.new_empty(shape))
                    # Their gradients are counted where the layers' records repeat; here they fill the optimizer's list.
                    copy.grad = torch.empty_like(copy)
                    made.append(Member(copy, p.dim() >= 2, alone))
    return made
