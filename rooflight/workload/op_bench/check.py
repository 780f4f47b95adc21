"""Running a pass of a candidate, and holding what it gives against the reference by FlashAttention's protocol.

The error against a reference in a wider type may be twice torch's own in the same type, and the rounding of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rooflight.workload.op_bench.case import Args, Draw, Operation, Peer
from rooflight.workload.op_bench.result import BACKWARD, FORWARD, Verdict

# Rounding of the result alone, for where torch's own error happens to be none.
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 5e-6}
TIMES_TORCHS = 2.0
# However far off torch itself is, more than this is wrong.
MOST = 0.1
# The share of rows that may choose another token, for a draw may fall on the last bit between two of them; and how many
# rows are drawn at least to tell.
ROWS_OFF, ROWS_DRAWN = 0.05, 128

Pass = Callable[[], tuple[list[Tensor], Args]]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _gradients_in(outs: Sequence[Tensor], draw: Draw) -> list[Tensor]:
    """Incoming gradients: one for a loss, else random ones."""
    return [(torch.ones_like(out) if not out.dim() else draw(*out.shape).to(out.dtype)) for out in outs]


def pass_of(peer: Peer, args: Args, wrt: tuple[int, ...], which: str, draw: Draw) -> Pass:
    """One call of a candidate that gives (outputs, gradients); for a backward the forward has run when this returns.

    The caller enables gradients for a pass that has any. draw: incoming gradients.
    """
    args = peer.prepare(*args)
    if which == FORWARD:
        return lambda: (_tensors(peer.call(*args)), ())
    places = wrt if peer.wrt is None else peer.wrt
    inputs = [args[place].detach().requires_grad_() for place in places]
    given = list(args)
    for place, leaf in zip(places, inputs):
        given[place] = leaf

    def forward() -> list[Tensor]:
        return [out for out in _tensors(peer.call(*given)) if out.requires_grad]

    if which == BACKWARD:
        outs = forward()
        grads = _gradients_in(outs, draw)
        return lambda: ([], torch.autograd.grad(outs, inputs, grads, retain_graph=True))

    def both() -> tuple[list[Tensor], Args]:
        # A loss: nothing to draw, and the same seed if there were.
        made = forward()
        return made, torch.autograd.grad(made, inputs, _gradients_in(made, draw))

    return both


def results(peer: Peer, args: Args, wrt: tuple[int, ...], which: str, draw: Draw) -> list[Tensor]:
    """What one call of a candidate gives: its outputs, and its gradients in the operation's form."""
    outs, grads = pass_of(peer, args, wrt, which, draw)()
    return [tensor.detach() for tensor in (*outs, *(peer.gradients(*grads) if grads else ()))]


def widened(args: Args, dtype: torch.dtype) -> Args:
    """The arguments with floating tensors in a wider type."""
    return tree_map_only(
        Tensor, lambda x: x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else x, args
    )


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the reference's largest number; infinite where a shape or an integer is wrong."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found.to(wanted.dtype), wanted) else float("inf")
    off = (found.to(wanted.dtype) - wanted).abs().max()
    error = float(off / wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny))
    return error if error == error else float("inf")


def _rounding(made: Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may do, to a result of inputs in `dtype`."""
    floor = FLOOR.get(made.dtype, 0.0)
    # A mean over many rounded numbers: torch's own error may be none by luck, and is no measure then.
    return floor if made.dim() else max(floor, FLOOR.get(dtype, 0.0) / 10)


def _rows_off(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).double().mean()) if found.shape == wanted.shape else float("inf")


def poison(like: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Leave NaN in the memory that a result of these shapes gets next, so that what is not written shows."""
    spoilt = [torch.full_like(x, float("nan"), dtype=dtype) for x in like if x.is_floating_point()]
    del spoilt


class Check:
    """Fresh inputs, what comes of them in a wider type, and torch's own error with them."""

    def __init__(self, operation: Operation, sizes: Args, which: str, draw: Callable[[], Draw]) -> None:
        if operation.tokens:
            sizes = (max(sizes[0], ROWS_DRAWN), *sizes[1:])
        self._operation, self._sizes, self._which, self._draw = operation, sizes, which, draw
        dtype = draw().dtype
        wide = operation.wide or (torch.float32 if dtype.itemsize < 4 else torch.float64)
        plain = Peer("plain", operation.plain or operation.ours)
        reference = Peer("reference", operation.reference or plain.call)
        self._wanted = self._run(reference, wide)
        own = [0.0] * len(self._wanted)
        if not operation.tokens:
            own = [_error(*pair) for pair in zip(self._run(plain), self._wanted, strict=True)]
        # Torch's error where torch is wrong altogether allows nothing.
        self._own = [error if error < MOST else 0.0 for error in own]

    def _run(self, peer: Peer, wide: torch.dtype | None = None) -> list[Tensor]:
        """The inputs are drawn anew for each: some candidates write into them."""
        draw = self._draw()
        args = self._operation.make(draw, *self._sizes)
        if wide is not None:
            args = widened(args, wide)
        with torch.set_grad_enabled(self._which != FORWARD):
            return results(peer, args, self._operation.wrt, self._which, draw)

    def verdict(self, peer: Peer) -> Verdict:
        """How far off a candidate is, by the output that is the furthest off."""
        dtype = self._draw().dtype
        poison(self._wanted, dtype)
        found = self._run(peer)
        if len(found) != len(self._wanted):
            return Verdict(float("inf"), 0.0)
        if self._operation.tokens:
            return Verdict(max(map(_rows_off, found, self._wanted)), ROWS_OFF)
        verdicts = [
            Verdict(_error(made, wanted), min(TIMES_TORCHS * own + _rounding(made, dtype), MOST))
            for made, wanted, own in zip(found, self._wanted, self._own)
        ]
        return max(verdicts, key=lambda verdict: (not verdict.right, verdict.error / max(verdict.allowed, 1e-30)))
