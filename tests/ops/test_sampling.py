"""Sampling: its limits, the distribution that it draws from, and that rows do not know of one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rooflight.ops.sampling import greedy, sample, sample_plain

from . import formulas

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def draw(
    logits_V: Tensor, uniform_B: Tensor, temperature: float = 1.0, k: int = 0, p: float = 1.0, m: float = 0.0
) -> Tensor:
    rows = uniform_B.shape[0]
    each = [torch.full((rows,), value) for value in (temperature, k, p, m)]
    return sample(logits_V.expand(rows, -1), *each, uniform_B)


LOGITS_V = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def test_evenly_spaced_uniforms_reproduce_the_probabilities() -> None:
    uniform_B = (torch.arange(20000) + 0.5) / 20000
    for temperature in (0.5, 1.0, 3.0):
        found = torch.bincount(draw(LOGITS_V, uniform_B, temperature), minlength=5) / 20000
        torch.testing.assert_close(found, (LOGITS_V / temperature).softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"k": 2}, {1, 3}),
        ({"k": 1}, {1}),
        ({"p": 0.0}, {1}),
        ({"m": 1.0}, {1}),
        ({"m": 0.2}, {1, 3, 0}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_the_most_likely(filters: dict[str, float], kept: set[int]) -> None:
    uniform_B = (torch.arange(2000) + 0.5) / 2000
    assert set(draw(LOGITS_V, uniform_B, **filters).tolist()) == kept  # pyright: ignore[reportArgumentType]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform_B = (torch.arange(2000) + 0.5) / 2000
    assert set(draw(probabilities.log(), uniform_B, p=0.75).tolist()) == {0, 1}
    assert set(draw(probabilities.log(), uniform_B, p=0.85).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_ends_of_the_unit_interval_stay_among_the_kept(uniform: float) -> None:
    tokens_B = draw(LOGITS_V, torch.full((1,), uniform), k=3)
    assert tokens_B.item() == (1 if uniform == 0.0 else 0)


def test_temperature_zero_is_greedy() -> None:
    logits_BV = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    zero, uniform_B = torch.zeros(50), torch.rand(50, generator=torch.Generator().manual_seed(1))
    tokens_B = sample(logits_BV, zero, zero.long(), torch.ones(50), zero, uniform_B)
    assert torch.equal(tokens_B, greedy(logits_BV))


def test_masked_logits_are_never_drawn() -> None:
    logits_V = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0])
    assert set(draw(logits_V, torch.linspace(0, 1, 101)[:-1]).tolist()) == {1, 3}


# More tokens than a CPU tries first, no multiple of a chunk, and odd, so that rows begin at any alignment.
WIDE = 5003
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def wide(seed: int, rows: int = 24, spread: float = 3.0) -> list[Tensor]:
    """Rows of every kind over a wide vocabulary: logits, temperature, top_k, top_p, min_p, uniform."""
    g = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(rows, WIDE, generator=g) * spread
    choices = (
        torch.tensor([1.0, 0.0, 0.7, 2.0, 0.1, 30.0]),
        torch.tensor([0, 1, 5, 40, 1000, 1500, 4999, WIDE]),
        torch.tensor([1.0, 0.9, 0.5, 0.999, 0.01]),
        torch.tensor([0.0, 0.0, 0.02, 1.0]),
    )
    drawn = [x[torch.randint(len(x), (rows,), generator=g)] for x in choices]
    return [logits_BV, *drawn, torch.rand(rows, generator=g, dtype=torch.float64)]


@DEVICES
@pytest.mark.parametrize("seed", range(6))
def test_wide_rows_against_the_formula(seed: int, device: str) -> None:
    args = wide(seed)
    found = sample(*(x.to(device) for x in args)).cpu()
    assert torch.equal(found, formulas.sample(args[0].double(), *args[1:]))


@DEVICES
@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_wide_plain_rows_against_the_formula(spread: float, device: str) -> None:
    logits_BV, temperature_B, *_, uniform_B = wide(3, spread=spread)
    heat_B1 = torch.where(temperature_B > 0, temperature_B, 1.0).double().unsqueeze(-1)
    upto_BV = (logits_BV.double() / heat_B1).softmax(-1).cumsum(-1)
    drawn_B = torch.searchsorted(upto_BV, uniform_B.unsqueeze(-1)).squeeze(-1)
    expected_B = torch.where(temperature_B > 0, drawn_B, logits_BV.argmax(-1))
    found_B = sample_plain(logits_BV.to(device), temperature_B.to(device), uniform_B.to(device))
    assert torch.equal(found_B.cpu(), expected_B)


@DEVICES
def test_a_row_alone_gives_the_token_that_it_gives_in_company(device: str) -> None:
    # Draws a hair apart land on either side of a rounding, if sums had any.
    args = [x.to(device) for x in wide(11, rows=64)]
    together, plain = sample(*args), sample_plain(args[0], args[1], args[5])
    for row in range(64):
        alone = [x[row : row + 1] for x in args]
        assert torch.equal(sample(*alone), together[row : row + 1])
        assert torch.equal(sample_plain(alone[0], alone[1], alone[5]), plain[row : row + 1])


@DEVICES
@pytest.mark.parametrize("rows", [1, 3, 24, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_few_are_the_beginning_of_the_sorted_whole(device: str, rows: int, dtype: torch.dtype) -> None:
    # Whole logits of a narrow range, of which any top_k cuts through many that are equal; zeros of both signs.
    logits_BV, temperature_B, _, top_p_B, min_p_B, uniform_B = (x.to(device) for x in wide(5, rows, 2.0))
    logits_BV = logits_BV.round().to(dtype)
    for most in (1, 7, 64, 1000):
        top_k_B = torch.randint(1, most + 1, (rows,), generator=torch.Generator().manual_seed(most)).to(device)
        args = (logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)
        assert torch.equal(sample(*args, most), sample(*args))


@DEVICES
def test_a_cut_among_equal_logits_keeps_the_lowest_numbers(device: str) -> None:
    uniform_B = ((torch.arange(500) + 0.5) / 500).to(device)
    logits_BV = torch.zeros(WIDE, device=device).index_fill_(0, torch.tensor([3, 50], device=device), -1.0)
    each = [torch.full((500,), value, device=device) for value in (1.0, 5, 1.0, 0.0)]
    for most in (0, 5, 9):
        assert set(sample(logits_BV.expand(500, -1), *each, uniform_B, most).tolist()) == {0, 1, 2, 4, 5}


@DEVICES
def test_top_p_is_of_what_top_k_leaves_however_many(device: str) -> None:
    # Nearly flat, so that a fifth of all would be 1000 tokens, and a fifth of the likeliest 1500 is 300.
    logits_BV = (torch.arange(WIDE, device=device) * -1e-6).expand(2, -1)
    args = (torch.tensor(x, device=device) for x in ([1.0, 1.0], [1500, 0], [0.2, 0.2], [0.0, 0.0], [0.9999, 0.9999]))
    limited, free = sample(logits_BV, *args).tolist()
    assert 295 <= limited <= 300 and 995 <= free <= 1001


@DEVICES
@pytest.mark.parametrize("seed", range(4))
def test_the_largest_draw_falls_on_the_last_token_that_can_be(device: str, seed: int) -> None:
    # Sums of this many weights need more bits than fp64 has.
    logits_BV = torch.randn(8, 40_000, generator=torch.Generator().manual_seed(seed)) / 10
    last_B = torch.randint(20_000, 39_000, (8,), generator=torch.Generator().manual_seed(seed))
    logits_BV[torch.arange(40_000) > last_B.unsqueeze(-1)] = -torch.inf
    uniform_B = torch.full((8,), 1 - 2**-53, dtype=torch.float64)
    found_B = sample_plain(logits_BV.to(device), torch.ones(8, device=device), uniform_B.to(device))
    assert torch.equal(found_B.cpu(), last_B)


@DEVICES
def test_plain_draws_stay_among_tokens_that_can_be(device: str) -> None:
    logits_V = torch.full((WIDE,), -torch.inf)
    logits_V[[1030, 2000, 4100]] = torch.tensor([0.0, 0.0, -5.0])
    for uniform, expected in ((0.0, 1030), (0.498, 1030), (0.5, 2000), (1 - 2**-53, 4100)):
        uniform_B = torch.full((1,), uniform, dtype=torch.float64, device=device)
        assert sample_plain(logits_V[None].to(device), torch.ones(1, device=device), uniform_B).item() == expected


@DEVICES
@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [3, WIDE])
def test_logits_without_a_distribution_still_give_a_token(device: str, value: float, columns: int) -> None:
    logits_BV = torch.full((2, columns), value, device=device)
    logits_BV[1] = 0.0
    one, uniform_B = torch.ones(2, device=device), torch.full((2,), 0.999, device=device)
    for tokens_B in (
        sample_plain(logits_BV, one, uniform_B),
        sample(logits_BV, one, (0 * one).long(), 0.5 * one, 0 * one, uniform_B),
        sample(logits_BV, one, one.long(), one, 0 * one, uniform_B, 1),
    ):
        assert ((tokens_B >= 0) & (tokens_B < columns)).all()
    assert sample_plain(logits_BV, one, uniform_B)[1] == int(0.999 * columns)


def test_small_temperatures_do_not_overflow() -> None:
    # At 1e-3 the second token's part is 1 in 1 + e¹⁰, 4.54e-5.
    logits_BV = torch.tensor([[80.0, 79.99, -80.0]]).expand(4, -1)
    cold_B, uniform_B = torch.tensor([1e-6, 1e-30, 1e-3, 1e-3]), torch.tensor([0.9999, 0.9999, 0.9999, 0.99999])
    assert sample_plain(logits_BV, cold_B, uniform_B).tolist() == [0, 0, 0, 1]
    top_k_B = torch.tensor([0, 2, 2, 0])
    assert sample(logits_BV, cold_B, top_k_B, torch.ones(4), torch.zeros(4), uniform_B).tolist() == [0, 0, 0, 1]


def test_pieces_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    args = wide(2)
    whole = sample(*args), sample_plain(args[0], args[1], args[5])
    monkeypatch.setattr("rooflight.ops.sampling._AT_ONCE", 5 * WIDE)
    assert torch.equal(sample(*args), whole[0])
    assert torch.equal(sample_plain(args[0], args[1], args[5]), whole[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_give_what_they_give_in_fp32(dtype: torch.dtype) -> None:
    args = wide(8)
    half = args[0].to(dtype)
    assert torch.equal(sample(half, *args[1:]), sample(half.float(), *args[1:]))
    assert torch.equal(sample_plain(half, args[1], args[5]), sample_plain(half.float(), args[1], args[5]))
