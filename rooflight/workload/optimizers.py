"""The optimizers that a training step can use: AdamW in its precisions, Muon beside AdamW, SGD, or none.

All but SGD share one call, `step(scale=, seed=, grads=)`: gradients come times `scale`, and a scale that is not finite
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rooflight.errors import InvalidValue
from rooflight.ops.optimizer import AdamW


@dataclass(frozen=True, slots=True)
class Update:
    """An optimizer with its hyper-parameters and the types of what it keeps.

    masters: an fp32 copy of each parameter that is not fp32 itself. momentum: Muon's.
    """

    name: str = "adamw"
    state_dtype: str = "fp32"
    masters: bool = False
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95


# What `rooflight explain --optimizer` can name.
UPDATES = {
    "adamw": Update(),
    "adamw-bf16": Update(state_dtype="bf16"),
    "adamw-master": Update(masters=True),
    "muon": Update("muon"),
    "sgd": Update("sgd"),
}
OPTIMIZERS = (*UPDATES, "none")


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter as the optimizer sees it.

    matrix: a matrix, which decays; a norm's weight or a bias does not. hidden: a matrix between embedding and head.
    """

    parameter: nn.Parameter
    matrix: bool
    hidden: bool


def members(module: nn.Module) -> list[Member]:
    """The trained parameters of a module; hidden matrices are those of its layers with two dimensions."""
    found = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            found.append(Member(p, p.dim() >= 2, p.dim() == 2 and name.startswith("layers.")))
    return found


def make_optimizer(name: str, parameters: Iterable[Member]) -> Any:
    """The optimizer of a name from OPTIMIZERS; raises InvalidValue for another."""
    if name == "none":
        return None
    if name not in UPDATES:
        raise InvalidValue(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    return build(UPDATES[name], parameters)


def build(update: Update, parameters: Iterable[Member]) -> Any:
    """The optimizer over these parameters; weight decay is for matrices alone."""
    parameters = list(parameters)
    if update.name == "sgd":
        return torch.optim.SGD([member.parameter for member in parameters], lr=update.lr, foreach=True)
    if update.name == "muon":
        return Muon(update, parameters)
    return _adamw(update, parameters)


def _adamw(update: Update, parameters: list[Member]) -> AdamW:
    groups = [
        {"params": [m.parameter for m in parameters if m.matrix == matrix], "weight_decay": decay}
        for matrix, decay in ((True, update.weight_decay), (False, 0.0))
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=update.lr,
        betas=update.betas,
        eps=update.eps,
        state_dtype=update.state_dtype,
        masters=update.masters,
    )


class Muon:
    """torch's Muon (Jordan et al. 2024; RMS matched to AdamW's, 2502.16982) for hidden matrices, AdamW for the rest.

    A fused projection (QKV, gate and up) is orthogonalised as the one matrix that it is stored as. The caller must not
    step on a scale that is not finite, for Muon cannot hold still on the device: `guards_itself` is False.
    """

    guards_itself = False

    def __init__(self, update: Update, parameters: list[Member]):
        self.masters = update.masters
        self.hidden = [member.parameter for member in parameters if member.hidden]
        self.adamw = _adamw(replace(update, name="adamw"), [member for member in parameters if not member.hidden])
        self.stored = [self._stored(p) for p in self.hidden]
        self.muon = torch.optim.Muon(
            [{"params": self.stored}],
            lr=update.lr,
            weight_decay=update.weight_decay,
            momentum=update.momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    def _stored(self, p: nn.Parameter) -> nn.Parameter:
        copied = self.masters and p.dtype != torch.float32
        return nn.Parameter(p.detach().to(torch.float32)) if copied else p

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, so that a schedule sets one learning rate for all."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """Each parameter's state, master included, as AdamW's `state`."""
        found = dict(self.adamw.state)
        for p, stored in zip(self.hidden, self.stored, strict=True):
            master = {} if stored is p else {"master": stored.detach()}
            found[p] = {**self.muon.state.get(stored, {}), **master}
        return found

    def allocate(self) -> None:
        """Make every state now."""
        self.adamw.allocate()
        for stored in self.stored:
            self.muon.state[stored].setdefault("momentum_buffer", torch.zeros_like(stored))

    def rewind(self) -> None:
        """Take the last step's count back."""
        self.adamw.rewind()

    def step(self, *, scale: Tensor | None = None, seed: int = 0, grads: Mapping[Tensor, Tensor] | None = None) -> None:
        """One update with gradients times `scale`."""
        with torch.no_grad():
            for p, stored in zip(self.hidden, self.stored, strict=True):
                grad = grads[p] if grads is not None else p.grad
                if grad is not None:
                    scaled = grad if scale is None else grad * scale
                    stored.grad = scaled.to(stored.dtype)
        self.muon.step()
        with torch.no_grad():
            for p, stored in zip(self.hidden, self.stored, strict=True):
                if stored is not p:
                    p.copy_(stored)
                    stored.grad = None
        self.adamw.step(scale=scale, seed=seed, grads=grads)


def optimizer_states(optimizer: Any) -> list[Any]:
    """The optimizer's state tensors, made now: a run is a step like any other, not the first."""
    if optimizer is None:
        return []
    if isinstance(optimizer, AdamW | Muon):
        optimizer.allocate()
    return [list(state.values()) for state in optimizer.state.values()]


def named_states(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, state, key) of every entry of every parameter's state, named for the parameter that it belongs to."""
    names = {p: name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        for key in state:
            yield f"optimizer.{names[p]}.{key}", state, key


def learning_rate(optimizer: Any, lr: float) -> None:
    """Set one learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


__all__ = [
    "OPTIMIZERS",
    "UPDATES",
    "Member",
    "Muon",
    "Update",
    "build",
    "learning_rate",
    "make_optimizer",
    "members",
    "named_states",
    "optimizer_states",
]
