"""The sampling kernels under the interpreter: bit for bit the draw that whole-number weights define.

NumPy raises 2 to a power in the interpreter and here alike, so that weights agree and a draw leaves nothing to round.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rooflight.ops.sampling import greedy, sample, sample_plain

V = 1501  # no multiple of a tile, and more than one
LOG2_E = np.float32(1.4426950408889634)


def ratios(logits_V: Tensor, temperature: float) -> np.ndarray:
    x = logits_V.float().numpy()
    scale = np.float32(1) / np.maximum(np.float32(temperature), np.float32(1e-30)) * LOG2_E
    return np.exp2((x - x.max()) * scale)


def fp64_product(share: float, mass: int) -> Fraction:
    """As fp64 rounds it, exactly."""
    return Fraction(share * float(mass))


def first_above(weights: list[int], goal: int) -> int:
    upto = 0
    for rank, weight in enumerate(weights):
        upto += weight
        if upto > goal:
            return rank
    return len(weights) - 1


def exact_plain(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    out = []
    for x_V, heat, u in zip(logits_BV, temperature_B.tolist(), uniform_B.tolist(), strict=True):
        weights = [int(r * np.float32(2**40)) for r in ratios(x_V, heat)]
        drawn = first_above(weights, int(fp64_product(u, sum(weights))))
        out.append(drawn if heat > 0 else int(x_V.argmax()))
    return torch.tensor(out)


def exact_ranked(logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, *shares_B: Tensor) -> Tensor:
    out = []
    for b, (x_V, heat, top_k) in enumerate(zip(logits_BV, temperature_B.tolist(), top_k_B.tolist(), strict=True)):
        top_p, min_p, u = (x[b].item() for x in shares_B)
        order = [i for _, i in sorted((-x, i) for i, x in enumerate(x_V.tolist()))]
        ratio_V = ratios(x_V, heat)
        weights = [int(ratio_V[i] * np.float32(2**40)) for i in order]
        likely = int((ratio_V >= np.float32(min_p)).sum())
        kept = max(1, min(top_k, likely) if top_k > 0 else likely)
        total = sum(weights[:kept])
        enough = min(math.ceil(fp64_product(top_p, total)), total)
        mass = sum(weights[: first_above(weights, max(enough - 1, 0)) + 1])
        out.append(order[first_above(weights, int(fp64_product(u, mass))) if heat > 0 else 0])
    return torch.tensor(out)


def rows(seed: int, count: int = 8, columns: int = V, spread: float = 3.0, whole: bool = False) -> list[Tensor]:
    """logits, temperature, top_k, top_p, min_p, uniform; whole: logits of which many are equal, zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(count, columns, generator=g) * spread
    choices = (
        torch.tensor([1.0, 0.7, 0.0, 2.0, 0.1, 30.0], dtype=torch.float64),
        torch.tensor([0, 1, 5, 40, 400, columns - 1, columns]),
        torch.tensor([1.0, 0.9, 0.5, 0.999, 0.01, 0.0]),
        torch.tensor([0.0, 0.0, 0.02, 1.0]),
    )
    drawn = [x[torch.randint(len(x), (count,), generator=g)] for x in choices]
    uniform_B = torch.rand(count, generator=g, dtype=torch.float64)
    uniform_B[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[: min(2, count)]
    return [logits_BV.round() if whole else logits_BV, *drawn, uniform_B]


@pytest.mark.parametrize("tiles", [1, 2, 8])
@pytest.mark.parametrize("columns", [1, 5, 1024, V])
def test_greedy_is_the_first_of_the_greatest(interpret: Any, columns: int, tiles: int):
    for whole in (False, True):
        logits_BV = rows(1, 5, columns, whole=whole)[0]
        assert torch.equal(interpret("sampling.greedy", logits_BV, tiles), logits_BV.argmax(-1))


@pytest.mark.parametrize("tiles", [0, 1, 2, 4])
@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_plain_draws(interpret: Any, spread: float, tiles: int):
    logits_BV, temperature_B, *_, uniform_B = rows(3, 10, spread=spread)
    found_B = interpret("sampling.sample_plain", logits_BV, temperature_B, uniform_B, tiles)
    assert torch.equal(found_B, exact_plain(logits_BV, temperature_B, uniform_B))


@pytest.mark.parametrize("seed", range(6))
def test_ranked_draws(interpret: Any, seed: int):
    args = rows(seed)
    assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))


@pytest.mark.parametrize("options", [((256, 4, 4), 100), ((512, 4, 2), 1), ((256, 4, 1), 16384)])
@pytest.mark.parametrize("whole", [False, True])
def test_ranked_draws_from_what_was_gathered_and_from_whole_rows(
    interpret: Any, whole: bool, options: tuple[tuple[int, int, int], int]
):
    args = rows(11, whole=whole)
    found_B = interpret("sampling_ranked.sample", *args, 0, *options, (256, 4))
    assert torch.equal(found_B, exact_ranked(*args))


@pytest.mark.parametrize("gathered", [1, 1024, 32768])
def test_crowds_of_equal_logits(interpret: Any, gathered: int):
    """A wide row in few values: which of thousands of equal tokens is meant, gathered or in the row itself."""
    g = torch.Generator().manual_seed(13)
    logits_BV = (torch.randn(8, 9_001, generator=g) * 0.6).round()
    logits_BV[0], logits_BV[1] = 0.0, torch.where(logits_BV[1] == 0, -0.0, logits_BV[1])
    one_B = torch.ones(8)
    uniform_B = torch.tensor([0.9999, 0.9, 0.5, 0.1, 1 - 2**-53, 0.0, 0.7, 0.3], dtype=torch.float64)
    top_k_B, top_p_B = torch.tensor([0, 0, 0, 5_000, 0, 0, 700, 0]), torch.tensor([1.0, 0.95, 0.5, 1.0] * 2).double()
    args = [logits_BV, one_B, top_k_B, top_p_B, torch.tensor([0.0, 0.0, 0.3, 0.0] * 2), uniform_B]
    found_B = interpret("sampling_ranked.sample", *args, 0, (2048, 8, 4), gathered, (1024, 8))
    assert torch.equal(found_B, exact_ranked(*args))


@pytest.mark.parametrize("heat", [1e-6, 0.02, 0.1, 0.3])
def test_cold_rows_whose_tail_weighs_nothing(interpret: Any, heat: float):
    args = rows(5, 6)
    args[1] = torch.full((6,), heat)
    args[2] = torch.tensor([0, 3, 50, 500, 1000, V])
    assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_logits(interpret: Any, dtype: torch.dtype):
    args = rows(8)
    args[0] = args[0].to(dtype)
    assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))
    plain = (args[0], args[1], args[5])
    assert torch.equal(interpret("sampling.sample_plain", *plain), exact_plain(*plain))


@pytest.mark.parametrize("columns", [1, 2, 11, 1023, 1025])
def test_narrow_vocabularies(interpret: Any, columns: int):
    args = rows(9, columns=columns)
    assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))
    plain = (args[0], args[1], args[5])
    assert torch.equal(interpret("sampling.sample_plain", *plain), exact_plain(*plain))


def test_rows_that_lie_apart_or_are_one(interpret: Any):
    args = rows(2)
    wide = torch.randn(8, V + 50)
    wide[:, :V] = args[0]
    args[0] = wide[:, :V]
    for logits_BV in (args[0], args[0][:1].expand(8, -1), args[0].T.contiguous().T):
        args[0] = logits_BV
        assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))
        plain = (args[0], args[1], args[5])
        assert torch.equal(interpret("sampling.sample_plain", *plain), exact_plain(*plain))
        assert torch.equal(interpret("sampling.greedy", args[0]), args[0].argmax(-1))


def test_many_equal_logits_and_masked_ones(interpret: Any):
    args = rows(4, 12)
    args[0] = torch.full((12, V), -1.0)
    args[0][:, 100:200], args[0][:, 300:] = 0.0, -torch.inf
    args[0][:, 150:160] = -0.0
    args[1] = torch.ones(12)
    args[2] = torch.tensor([0, 50, 60, 150, 700, 301] * 2)
    args[3] = torch.tensor([1.0] * 6 + [0.3] * 6)
    assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))


def test_draws_and_shares_at_the_very_edges_of_weights(interpret: Any):
    """Eight tokens of one weight, in a tile, in the next, in the next chunk: an edge belongs to the token after it."""
    likely = torch.tensor([0, 1, 511, 1020, 1040, 1100, 2060, 2061])
    logits_V = torch.full((2100,), -torch.inf).index_fill_(0, likely, 0.0)
    edge_B = torch.arange(8, dtype=torch.float64) / 8
    before_B = torch.nextafter(edge_B[1:], edge_B[:-1])
    uniform_B = torch.cat((edge_B, before_B))
    wanted_B = torch.cat((likely, likely[:-1]))
    logits_BV, one_B = logits_V.expand(15, -1), torch.ones(15)
    for tiles in (1, 2, 4):
        assert torch.equal(interpret("sampling.sample_plain", logits_BV, one_B, uniform_B, tiles), wanted_B)
    rest = (one_B, 0 * one_B)
    assert torch.equal(
        interpret("sampling_ranked.sample", logits_BV, one_B, 0 * likely.repeat(2)[:15], *rest, uniform_B), wanted_B
    )
    # A share of a hair more than n tokens takes one more.
    share_B = torch.cat((edge_B[1:], torch.nextafter(edge_B[1:], edge_B[1:] + 1)))
    args = [logits_BV[:14], one_B[:14], 0 * likely.repeat(2)[:14], share_B, 0 * one_B[:14], 0 * share_B + 1 - 2**-53]
    found_B = interpret("sampling_ranked.sample", *args)
    assert torch.equal(found_B, torch.cat((likely[:7], likely[1:])))
    assert torch.equal(found_B, exact_ranked(*args))


@pytest.mark.parametrize("depth", [1, 5, 10, 11, 20, 29])
def test_what_is_left_out_never_weighs_more_than_it_may(interpret: Any, depth: int):
    """One token, and a crowd as heavy as tokens of their count can be, in which top_p or the draw ends."""
    logits_BV = torch.full((6, V), -depth * (1 + 1e-6))
    logits_BV[:, 7] = 0.0
    one_B = torch.ones(6)
    crowd = (V - 1) / 2**depth
    share = (1 + crowd / 2) / (1 + crowd)
    top_p_B, uniform_B = torch.tensor([share, 1.0] * 3).double(), torch.tensor([0.9999, share] * 3).double()
    args = [logits_BV, one_B * 1.4426950408889634, 0 * one_B.long(), top_p_B, 0 * one_B, uniform_B]
    assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [3, V])
def test_logits_without_a_distribution_still_give_a_token(interpret: Any, value: float, columns: int):
    logits_BV = torch.full((3, columns), value)
    logits_BV[1], logits_BV[2, 1:] = 0.0, 0.0
    one, uniform_B = torch.ones(3), torch.full((3,), 0.999)
    for tokens_B in (
        interpret("sampling.greedy", logits_BV),
        interpret("sampling.sample_plain", logits_BV, one, uniform_B),
        interpret("sampling_ranked.sample", logits_BV, one, (0 * one).long(), 0.5 * one, 0 * one, uniform_B),
        interpret("sampling_ranked.sample", logits_BV, one, one.long(), one, 0 * one, uniform_B),
    ):
        assert ((tokens_B >= 0) & (tokens_B < columns)).all()


def test_what_the_kernels_take():
    def takes(op: Any, logits_BV: Tensor) -> bool:
        return op.kernel_takes(logits_BV, *[None] * 5, 20)

    for op in (greedy, sample_plain, sample):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert takes(op, torch.empty(2, 100, dtype=dtype, device="meta"))
        assert not takes(op, torch.empty(2, 100, dtype=torch.float64, device="meta"))
        assert not takes(op, torch.empty(0, 100, device="meta"))
        assert not takes(op, torch.empty(1, 2**21, device="meta"))
    # Nor is a row without top_k sorted.
    assert sample.kernel_takes is not None and sample.kernel_takes(torch.empty(2, 100, device="meta"), *[None] * 5, 0)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bands_of_a_wide_row(interpret: Any, dtype: torch.dtype, spread: float):
    """The draw and the cut lie apart, and neither begins with the likeliest: what is above them is summed up."""
    g = torch.Generator().manual_seed(7)
    logits_BV = (torch.randn(6, 40_000, generator=g) * spread).to(dtype)
    one_B, top_p_B = torch.ones(6), torch.tensor([0.95, 0.9, 0.5, 1.0, 0.999, 0.95]).double()
    uniform_B = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7, 0.9999]).double()
    args = [logits_BV, one_B, 0 * one_B.long(), top_p_B, torch.tensor([0.0, 0.0, 0.0, 0.1, 0.01, 0.0]), uniform_B]
    assert torch.equal(interpret("sampling_ranked.sample", *args), exact_ranked(*args))
