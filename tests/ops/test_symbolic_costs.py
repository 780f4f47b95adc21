"""Costs with symbolic sizes: the expression, with the sizes put in, is the concrete cost."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_map

from rooflight.ops import batch
from rooflight.ops.cost import Cost

from .case import Case
from .cases import CASES, OPS
from .test_costs import priced


class Sizes:
    """One positive symbol for every distinct size."""

    def __init__(self) -> None:
        self.environment = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        self.mode = FakeTensorMode(shape_env=self.environment)
        self.symbols: dict[int, Any] = {}

    def of(self, size: int) -> Any:
        if size < 2:
            return size
        if size not in self.symbols:
            source = ConstantSource(f"n{size}")
            symbol = self.environment.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC, positive=True)
            self.symbols[size] = self.environment.create_symintnode(symbol, hint=size, source=source)
        return self.symbols[size]

    def fake(self, x: Any) -> Any:
        return torch.empty([self.of(n) for n in x.shape], dtype=x.dtype) if isinstance(x, Tensor) else x


def _counts(cost: Cost) -> dict[str, Any]:
    named = {f"flops {name}": count for name, count in cost.flops.items()}
    traffic = cost.total_bytes if cost.traffic is None else cost.traffic
    return {
        **named,
        "read": cost.bytes_read,
        "written": cost.bytes_written,
        "traffic": traffic,
        "link": cost.link_bytes,
        "workspace": cost.workspace,
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_symbolic_cost_is_the_concrete_cost(case: Case, request: pytest.FixtureRequest) -> None:
    if case.collective:
        request.getfixturevalue("fake_ranks")
    concrete, args, _ = priced(case, torch.bfloat16)
    sizes = Sizes()
    with sizes.mode:
        fakes = tree_map(sizes.fake, args)
        out = OPS[case.name](*fakes)
        with batch.use(case.batch) if case.batch else nullcontext():
            symbolic = OPS[case.name].price(out, *fakes)
    found = _counts(symbolic)
    # Anything but an expression would mean that the price had settled on this row's sizes, if it has any.
    assert not sizes.symbols or any(
        isinstance(count, torch.SymInt) and count.node.expr.free_symbols for count in found.values()
    )
    assert {name: int(count) for name, count in found.items()} == _counts(concrete)
