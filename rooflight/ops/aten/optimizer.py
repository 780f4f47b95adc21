"""Fused optimizer steps: one pass over weights, gradients and states."""

from __future__ import annotations

from rooflight.ops.aten.registry import Call, prices
from rooflight.ops.aten.shapes import elements
from rooflight.ops.cost import Cost, Count, elementwise_cost

# m += (1 − β₁)(g − m): 3. v = β₂·v + (1 − β₂)·g²: 4. √v / bias + ε: 3. w −= step·m / denominator: 3.
ADAM = 13
ADAGRAD = 6


def _step(call: Call, per_weight: Count, unread: tuple[str, ...] = ()) -> Cost:
    """Gradients are declared as written because gradient scaling divides them in place; without it they are not."""
    unwritten = () if call.get("grad_scale") is not None else tuple(call["grads"])
    skipped = {id(t) for t in unwritten}
    never_read = {id(t) for name in unread for t in call[name]}
    writes = tuple(t for t in call.writes if id(t) not in skipped)
    reads = tuple(t for t in call.reads if id(t) not in never_read)
    count = elements(call["self"])
    return elementwise_cost(per_weight * count, reads, writes, size=(count,)).named("optimizer")


def _common(call: Call) -> int:
    """Weight decay is a multiply-add (decoupled: a multiplication); maximizing negates; scaling divides."""
    decay = 0 if not call["weight_decay"] else 1 if "adamw" in call.name else 2
    return decay + bool(call["maximize"]) + (call.get("grad_scale") is not None)


@prices("aten::_fused_adam", "aten::_fused_adamw")
def adam(call: Call) -> Cost:
    """Reads w, g, m, v and writes w, m, v: 28 bytes a parameter in fp32. Source: Loshchilov and Hutter, 1711.05101."""
    return _step(call, ADAM + bool(call["amsgrad"]) + _common(call))


@prices("aten::_fused_sgd")
def sgd(call: Call) -> Cost:
    """w −= lr·g, with momentum b = μ·b + (1 − τ)·g; the first step only writes b."""
    momentum = call["momentum"] != 0
    first = bool(call["is_first_step"])
    update = 0 if not momentum or first else 3 if call["dampening"] else 2
    nesterov = 2 if momentum and call["nesterov"] else 0
    return _step(call, 2 + update + nesterov + _common(call), ("momentum_buffer_list",) if first else ())


@prices("aten::_fused_adagrad")
def adagrad(call: Call) -> Cost:
    """s += g², w −= lr·g / (√s + ε)."""
    return _step(call, ADAGRAD + _common(call))
