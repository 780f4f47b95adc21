"""The sampling kernels on a GPU, through their Ops: token for token the references; and replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.ops import kernels
from rooflight.ops.op import Op
from rooflight.ops.sampling import greedy, sample, sample_plain

pytestmark = pytest.mark.gpu
V = 151_936
REFERENCES = {op: op.reference for op in (greedy, sample_plain, sample)}


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A call that falls back to a reference fails; the rows' counters are zeros afterwards."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran, not the kernel")

    for op in REFERENCES:
        monkeypatch.setattr(op, "reference", refuse)
    yield
    assert all(not counters.any() for counters in kernels._counters.values())


def drawn(count: int, columns: int, dtype: torch.dtype, spread: float, seed: int = 0, whole: bool = False) -> Any:
    """logits, temperature, top_k, top_p, min_p, uniform of rows of every kind."""
    g = torch.Generator("cuda").manual_seed(seed)
    logits_BV = torch.randn(count, columns, generator=g, device="cuda").mul_(spread)
    logits_BV = (logits_BV.round_() if whole else logits_BV).to(dtype)
    choices = (
        torch.tensor([1.0, 0.7, 0.0, 2.0, 0.1, 30.0], dtype=torch.float64),
        torch.tensor([0, 1, 5, 50, 1000, columns // 2, columns - 1]),
        torch.tensor([1.0, 0.95, 0.5, 0.999, 0.01, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 0.0, 0.05, 1e-6, 1.0], dtype=torch.float64),
    )
    cpu = torch.Generator().manual_seed(seed)
    chosen = [x[torch.randint(len(x), (count,), generator=cpu)].cuda() for x in choices]
    uniform_B = torch.rand(count, generator=cpu, dtype=torch.float64)
    uniform_B[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[: min(2, count)]
    return [logits_BV, *chosen, uniform_B.cuda()]


def check(op: Op, *args: Any) -> Tensor:
    found_B, wanted_B = op(*args), REFERENCES[op](*args)
    wrong = (found_B != wanted_B).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong[:8]}: {found_B[wrong[:8]].tolist()}, reference {wanted_B[wrong[:8]].tolist()}"
    return found_B


def check_all(args: list[Tensor]) -> None:
    check(greedy, args[0])
    check(sample_plain, args[0], args[1], args[5])
    check(sample, *args)


def test_weights_of_kernel_and_reference_are_the_same_bits():
    """Draws at every edge of the cumulative weights, where a single unit of a single weight would show."""
    logits_V = torch.cat((torch.zeros(1), -torch.rand(4095, generator=torch.Generator().manual_seed(0)) * 27)).cuda()
    ratio_V = (logits_V * torch.tensor(1.4426950408889634, device="cuda")).exp2()
    upto_V = (ratio_V * 2.0**40).to(torch.int64).cumsum(0)
    # u · total is the edge, or next to it: a total below 2⁵³ is exact in fp64.
    uniform_B = (upto_V[:-1].double() / upto_V[-1]).clamp(max=1 - 2**-53)
    uniform_B = torch.cat((uniform_B, torch.nextafter(uniform_B, uniform_B * 0)))
    rows = len(uniform_B)
    one, none = torch.ones(rows, device="cuda"), torch.zeros(rows, device="cuda")
    logits_BV = logits_V.expand(rows, -1)
    check(sample_plain, logits_BV, one, uniform_B)
    check(sample, logits_BV, one, none.long(), one, none, uniform_B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0, 6.0])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_models_vocabulary(rows: int, spread: float, dtype: torch.dtype):
    for seed in range(3 if rows == 64 else 6):
        check_all(drawn(rows, V, dtype, spread, seed))


# Few sizes, for each is compiled by itself.
@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        *((1, torch.float32), (11, torch.bfloat16), (1025, torch.float16), (5003, torch.float32)),
        *((50_257, torch.bfloat16), (262_144, torch.bfloat16)),
    ],
)
def test_other_vocabularies(columns: int, dtype: torch.dtype):
    for seed, whole in enumerate((False, True, False, True)):
        check_all(drawn(48, columns, dtype, 3.0, seed, whole))


def test_a_full_batch():
    check_all(drawn(512, V, torch.bfloat16, 3.0))
    check_all(drawn(256, V, torch.float32, 3.0, whole=True))


def test_the_settings_that_people_use():
    """One setting for all rows, peaked and flat logits."""
    for spread in (0.5, 2.0, 5.0):
        logits_BV, *_, uniform_B = drawn(128, V, torch.bfloat16, spread)
        for heat, top_k, top_p, min_p in (
            (0.7, 0, 0.8, 0.0),
            (1.0, 50, 1.0, 0.0),
            (0.6, 20, 0.95, 0.0),
            (1.5, 0, 1.0, 0.05),
            (1.0, 0, 0.95, 0.0),
            (0.7, 0, 0.9, 0.02),
        ):
            each = [torch.full((128,), x, device="cuda") for x in (heat, top_k, top_p, min_p)]
            check(sample, logits_BV, *each, uniform_B)
            if top_k:
                check(sample, logits_BV, *each, uniform_B, top_k)


def settings(rows: int, *each: tuple[float, int, float, float]) -> list[Tensor]:
    """temperature, top_k, top_p, min_p: rows in turn of each setting."""
    columns = zip(*(each[row % len(each)] for row in range(rows)), strict=True)
    return [torch.tensor(column, device="cuda") for column in columns]


MIXED = ((1.0, 0, 0.95, 0.0), (0.8, 0, 1.0, 0.05), (1.0, 50, 0.9, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0))


@pytest.mark.parametrize("each", [MIXED[:1], MIXED[1:2], MIXED], ids=["top_p", "min_p", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_that_are_neither_sorted_nor_selected(each: Any, dtype: torch.dtype):
    for rows in (1, 8, 33):
        for seed, spread in enumerate((0.5, 2.0, 5.0)):
            logits_BV, *_, uniform_B = drawn(rows, V, dtype, spread, seed)
            check(sample, logits_BV, *settings(rows, *each), uniform_B)


@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
def test_crowds_of_equal_logits(spread: float):
    """Bands of more tokens than are gathered, and of nearly as many."""
    logits_BV, *_, uniform_B = drawn(30, V, torch.float32, spread, whole=True)
    for crowded_BV in (logits_BV, logits_BV.bfloat16(), torch.randn_like(logits_BV).mul_(spread).bfloat16()):
        check(sample, crowded_BV, *settings(30, *MIXED), uniform_B)


def test_rows_that_lie_apart_or_are_one():
    args = drawn(16, 5003, torch.bfloat16, 3.0)
    wide = torch.randn(16, 6000, device="cuda", dtype=torch.bfloat16)
    wide[:, 7:5010] = args[0]
    for logits_BV in (wide[:, 7:5010], args[0][:1].expand(16, -1), args[0].T.contiguous().T):
        check_all([logits_BV, *args[1:]])


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [3, V])
def test_logits_without_a_distribution_still_give_a_token(value: float, columns: int):
    logits_BV = torch.full((3, columns), value, device="cuda")
    logits_BV[1], logits_BV[2, 1:] = 0.0, 0.0
    one, uniform_B = torch.ones(3, device="cuda"), torch.full((3,), 0.999, device="cuda")
    for tokens_B in (
        greedy(logits_BV),
        sample_plain(logits_BV, one, uniform_B),
        sample(logits_BV, one, (0 * one).long(), 0.5 * one, 0 * one, uniform_B),
        sample(logits_BV, one, one.long(), one, 0 * one, uniform_B, 1),
    ):
        assert ((tokens_B >= 0) & (tokens_B < columns)).all()


def test_repeats_are_the_same_tokens():
    args = drawn(40, V, torch.bfloat16, 2.0)
    first = greedy(args[0]), sample_plain(args[0], args[1], args[5]), sample(*args)
    for _ in range(30):
        again = greedy(args[0]), sample_plain(args[0], args[1], args[5]), sample(*args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("each", [MIXED[:1], MIXED[1:2], MIXED], ids=["top_p", "min_p", "mixed"])
def test_a_graph_of_one_setting_draws_from_other_logits(each: Any):
    logits_BV, *_, uniform_B = drawn(8, V, torch.bfloat16, 3.0)
    args = [logits_BV, *settings(8, *each), uniform_B]
    check(sample, *args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_B = sample(*args)
    for seed in range(1, 6):
        new_BV, *_, new_B = drawn(8, V, torch.bfloat16, 0.7 * seed, seed)
        logits_BV.copy_(new_BV)
        uniform_B.copy_(new_B)
        graph.replay()
        assert torch.equal(found_B, REFERENCES[sample](*args))


@pytest.mark.parametrize("rows", [1, 32])
def test_a_graph_draws_from_other_logits_than_it_was_captured_with(rows: int):
    args = drawn(rows, V, torch.bfloat16, 3.0)
    check_all(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = greedy(args[0]), sample_plain(args[0], args[1], args[5]), sample(*args)
    for seed in range(1, 6):
        for old, new in zip(args, drawn(rows, V, torch.bfloat16, 0.5 * seed, seed), strict=True):
            old.copy_(new)
        graph.replay()
        wanted = (
            REFERENCES[greedy](args[0]),
            REFERENCES[sample_plain](args[0], args[1], args[5]),
            REFERENCES[sample](*args),
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
