"""The kernels' oracle: the fp64 formulas of `tests/ops/formulas.py`, and how far from them a storage type may round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rooflight.ops import activation, embedding, layer_norm, norm, rope, rotary_qkv
from rooflight.ops.op import Op
from tests.ops import formulas as f

# A few roundings of the storage type; the interpreter cuts bf16 off where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
OPS: dict[str, Op] = {
    name: value
    for module in (activation, embedding, layer_norm, norm, rope, rotary_qkv)
    for name, value in vars(module).items()
    if isinstance(value, Op)
}


def _embedding_backward(grad: Tensor, tokens: Tensor, vocabulary: int, scale: float) -> Tensor:
    """By a product with the tokens' one-hot matrix."""
    rows = torch.arange(vocabulary, device=tokens.device)
    return scale * (tokens.flatten() == rows[:, None]).to(grad.dtype) @ grad.flatten(0, -2)


FORMULAS: dict[str, Any] = {
    "rms_norm": f.rms_norm,
    "add_rms_norm": lambda x, y, w, e, o: (f.rms_norm(x + y, w, e, o), x + y),
    "rms_norm_backward": f.rms_norm_backward,
    "layer_norm": f.layer_norm,
    "add_layer_norm": lambda x, y, w, b, e: (f.layer_norm(x + y, w, b, e), x + y),
    "layer_norm_backward": f.layer_norm_backward,
    "activation": f.activation,
    "activation_backward": lambda g, x, k: f.gradients(lambda y: f.activation(y, k), (x,), g)[0],
    "gated_activation": f.gated_activation,
    "gated_activation_backward": lambda g, x, k: f.gradients(lambda y: f.gated_activation(y, k), (x,), g)[0],
    "rotary": f.rotary,
    "rotary_qkv": f.rotary_qkv,
    "rotary_qkv_backward": f.rotary_qkv_backward,
    "embedding_backward": _embedding_backward,
}


def exact(name: str, *args: Any) -> Any:
    """The operation in fp64, on the same values."""
    return FORMULAS[name](*tree_map(lambda x: x.double() if _floats(x) else x, args))


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def takes(name: str, *args: Any) -> bool:
    """Whether the operation hands such a call to its kernel."""
    operation = OPS[name]
    assert operation.kernel is not None and operation.kernel_takes is not None
    return operation.kernel_takes(*args)


def assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Every element within the type's tolerance of itself and of the result's root mean square."""
    found, wanted = tree_leaves(actual), tree_leaves(expected)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        a, b = a.double(), b.double()
        assert not a.isnan().any()
        allowed = TOLERANCE[dtype] * (b.abs() + b.pow(2).mean().sqrt() + 1e-30)
        worst = ((a - b).abs() / allowed).max() if a.numel() else torch.zeros(())
        assert worst <= 1, f"{worst:.2f} times the tolerance"


def bits_equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True))
