"""The AdamW optimizer over the operations `adamw`, `grad_norm`, `clip_scale` and `scale_`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops.adamw import adamw
from rooflight.ops.clipping import clip_scale, grad_norm, scale_

__all__ = ["STATE_DTYPES", "AdamW", "adamw", "clip_scale", "grad_norm", "scale_"]

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALL_STRIDE = 4096  # more calls than a step makes: one for each group and step count


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds: the update is elementwise, so shards update alone."""
    # By its method, for importing DTensor takes half a second that most programs need not spend.
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update through one `adamw` operation, with the states' storage type to choose.

    state_dtype: "fp32" or "bf16", the type of both moments. masters: keep an fp32 copy of every parameter that is not
    fp32, update that and round it into the parameter. States are made on the first step, or by `allocate`. Raises
    InvalidValue on hyper-parameters out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str = "fp32",
        masters: bool = False,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise InvalidValue(f"state_dtype {state_dtype!r} is unknown; use one of {', '.join(STATE_DTYPES)}")
        for name, value in (("beta1", betas[0]), ("beta2", betas[1])):
            if not 0.0 <= value < 1.0:
                raise InvalidValue(f"{name} {value} is outside [0, 1); use a value such as 0.9")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise InvalidValue(f"{name} {value} is negative; use 0 or more")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype, self.masters = STATE_DTYPES[state_dtype], masters
        self._counted: list[dict[str, Any]] = []  # states whose step count the last step raised

    def allocate(self) -> None:
        """Make every parameter's states now, so that a step after this one allocates nothing."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=self.state_dtype)
            if self.masters and param.dtype != torch.float32:
                state["master"] = param.detach().to(torch.float32)
        return state

    def _gradients(self, params: list[Tensor], grads: Mapping[Tensor, Tensor] | None) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have a gradient, each with it; raises InvalidValue on one of another shape."""
        pairs = []
        for param in params:
            grad = param.grad if grads is None else grads.get(param)
            if grad is None:
                continue
            if grad.shape != param.shape:
                raise InvalidValue(
                    f"a gradient of shape {tuple(grad.shape)} is given for a parameter of shape {tuple(param.shape)}; "
                    "give one of the parameter's own shape"
                )
            pairs.append((param, grad))
        return pairs

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        scale: Tensor | None = None,
        seed: int = 0,
        grads: Mapping[Tensor, Tensor] | None = None,
    ) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returned.

        scale: fp32 scalar on the device that multiplies every gradient, as `clip_scale` gives it; where it is not
        finite, nothing changes but the step counts, which `rewind` takes back. seed: 0 rounds to nearest; any other
        number rounds bf16 and fp16 weights (without masters) and second moments stochastically, and another number
        for each step makes the rounding errors independent. grads: gradients of another place or type than
        `param.grad`, such as fp32 sums over micro-batches; parameters that it does not name stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._counted = []
        number = 0
        for group in self.param_groups:
            # Parameters of one call share their step count and whether they have a master.
            calls: dict[tuple[int, bool], list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
            for param, grad in self._gradients(group["params"], grads):
                state = self._state_of(param)
                state["step"] += 1
                self._counted.append(state)
                calls.setdefault((state["step"], "master" in state), []).append((param, grad, state))
            for (step, has_master), members in calls.items():
                adamw(
                    [_local(param) for param, _, _ in members],
                    [_local(grad) for _, grad, _ in members],
                    [_local(state["exp_avg"]) for _, _, state in members],
                    [_local(state["exp_avg_sq"]) for _, _, state in members],
                    [_local(state["master"]) for _, _, state in members] if has_master else [],
                    None if scale is None else _local(scale),
                    step,
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    # Tensors of different calls must not share their random bits.
                    (seed * CALL_STRIDE + number) % 2**62 + 1 if seed else 0,
                )
                number += 1
        return loss

    def rewind(self) -> None:
        """Take the last step's counts back, so that a step whose scale was not finite does not count.

        The weights and the moments need no rewinding then: that step has not changed them. Called between that step
        and the next; a second call does nothing.
        """
        for state in self._counted:
            state["step"] -= 1
        self._counted = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer, but states keep their own type, where torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        self._counted = []
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True)
