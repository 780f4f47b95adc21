"""AdamW as one operation over all tensors of a step, the gradient norm, and the optimizer class that calls them.

m ← m + (1−β₁)(g − m); v ← β₂v + (1−β₂)g²; p ← p(1 − lr·λ) − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
(Loshchilov & Hutter 2019, 1711.05101), arithmetic in fp32 whatever the storage type is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.ops.cost import Cost, Count, Movement, Primitive, elementwise_cost
from rooflight.ops.op import Op

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    for i, param in enumerate(params):
        stored = (masters[i] if masters else param, exp_avgs[i], exp_avg_sqs[i])
        # Of a tensor that already is fp32, float() is the tensor itself and is updated in place.
        value, mean, square = (tensor.float() for tensor in stored)
        grad = grads[i].float()
        value.mul_(1 - lr * weight_decay)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        value.addcdiv_(mean, (square.sqrt() / root).add_(eps), value=-step_size)
        for tensor, updated in zip(stored, (value, mean, square), strict=True):
            if tensor is not updated:
                tensor.copy_(updated)
        if masters:
            param.copy_(value)


def _adamw_shape(*_: Any) -> None:
    return None


def _elements(tensors: list[Tensor]) -> Count:
    total: Count = 0
    for tensor in tensors:
        total = total + tensor.numel()
    return total


def _adamw_cost(
    out: None,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Cost:
    # Decay; m: subtract, scale, add; v: scale, square, scale, add; root, divide, add ε; scale m, divide, add: 14.
    # In fp32 p, g, m, v are read and p, m, v written: 28 bytes a parameter. With masters, p is only written.
    elements = _elements(params)
    moments = (*exp_avgs, *exp_avg_sqs)
    return elementwise_cost(
        14 * elements,
        (*(masters or params), *grads, *moments),
        (*params, *masters, *moments),
        size=(elements,),
    )


def _fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    count = torch.full((), float(step), dtype=torch.float32, device=params[0].device)
    torch.ops.aten._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _fused_takes(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    *_: Any,
) -> bool:
    """torch's fused AdamW has no masters and wants one storage type throughout."""
    types = {tensor.dtype for tensor in chain(params, grads, exp_avgs, exp_avg_sqs)}
    return bool(params) and not masters and len(types) == 1


adamw = Op(
    "adamw",
    _adamw,
    cost=_adamw_cost,
    shape=_adamw_shape,
    kernel=_fused_adamw,
    kernel_takes=_fused_takes,
    mutates=("params", "exp_avgs", "exp_avg_sqs", "masters"),
)


def _grad_norm(grads: list[Tensor]) -> Tensor:
    return torch.stack([grad.float().square().sum() for grad in grads]).sum().sqrt()


def _grad_norm_shape(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


def _grad_norm_cost(out: Tensor, grads: list[Tensor]) -> Cost:
    # Square and add for an element, one root.
    elements = _elements(grads)
    return elementwise_cost(
        2 * elements + 1,
        grads,
        (out,),
        size=(elements,),
        primitive=Primitive.REDUCTION,
        movement=(Movement.REDUCTION,),
    )


grad_norm = Op("grad_norm", _grad_norm, cost=_grad_norm_cost, shape=_grad_norm_shape)


def _scale(grads: list[Tensor], factor: Tensor) -> None:
    for grad in grads:
        grad.mul_(factor.to(grad.dtype))


def _scale_shape(grads: list[Tensor], factor: Tensor) -> None:
    return None


def _scale_cost(out: None, grads: list[Tensor], factor: Tensor) -> Cost:
    elements = _elements(grads)
    return elementwise_cost(elements, (*grads, factor), grads, size=(elements,), movement=(Movement.BROADCAST,))


scale_ = Op("scale_", _scale, cost=_scale_cost, shape=_scale_shape, mutates=("grads",))


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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Parameters of one call share their step count and whether they have a master.
            calls: dict[tuple[int, bool], list[tuple[Tensor, dict[str, Any]]]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    state = self._state_of(param)
                    state["step"] += 1
                    calls.setdefault((state["step"], "master" in state), []).append((param, state))
            for (step, has_master), members in calls.items():
                adamw(
                    [_local(param) for param, _ in members],
                    [_local(param.grad) for param, _ in members if param.grad is not None],
                    [_local(state["exp_avg"]) for _, state in members],
                    [_local(state["exp_avg_sq"]) for _, state in members],
                    [_local(state["master"]) for _, state in members] if has_master else [],
                    step,
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer, but states keep their own type, where torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True)
