"""The program of any torch module: its forward on example arguments, in training also backward and optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rooflight.errors import InvalidValue
from rooflight.workload.optimizers import make_optimizer, members, optimizer_states
from rooflight.workload.outputs import differentiable
from rooflight.workload.program import Program, Setting
from rooflight.workload.record import BACKWARD, OPTIMIZER, Recorder
from rooflight.workload.training import in_phase


def any_module(module: nn.Module, args: tuple[Any, ...] | dict[str, Any], setting: Setting) -> Program:
    """Forward of any module on its example arguments, in evaluation mode as inference is.

    With phase train the module stays in the mode that its factory left it in, and backward and optimizer follow: of the
    loss where the output has one, else of the sum of all its floating-point outputs.
    """
    if setting.phase == "decode":
        raise InvalidValue(
            "phase decode needs a decoder with a KV cache; for a module of your own use prefill or train"
        )
    train = setting.phase == "train"
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(setting.optimizer, members(module)) if train and trained else None
    states = optimizer_states(optimizer)
    if not train:
        module.eval()

    def call() -> Any:
        return module(**args) if isinstance(args, dict) else module(*args)

    def step(recorder: Recorder | None = None) -> Any:
        if not train:
            with torch.no_grad():
                return call()
        out = call()
        ends = differentiable(out)
        if not ends:
            raise InvalidValue(
                f"phase train: none of the tensors in the module's output ({type(out).__name__}) carries a gradient; "
                "return one that does, or use --phase prefill"
            )
        with in_phase(recorder, BACKWARD):
            seeds = [torch.ones_like(end) for end in ends]
        torch.autograd.backward(ends, seeds)
        if recorder is not None:
            recorder.label([p.grad for p in trained], "gradients")
        if optimizer is not None:
            with in_phase(recorder, OPTIMIZER):
                optimizer.step()
        for p in trained:
            p.grad = None
        return out

    standing = {
        "weights": [(list(module.parameters()), 1)],
        "optimizer": [(states, 1)],
        "inputs": [([args, list(module.buffers())], 1)],
    }
    return Program(module, step, standing, example=args)
