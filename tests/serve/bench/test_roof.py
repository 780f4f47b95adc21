"""The roof beside a run, and the latency benchmark, on an engine whose steps and roofs are formulas."""

from __future__ import annotations

import pytest

from rooflight.errors import RooflightError
from rooflight.serve.bench.drive import drive
from rooflight.serve.bench.latency import batch, iterate, latency_rows
from rooflight.serve.bench.roof import Roof, prefill_roof, roof_of_run, roof_of_steps
from rooflight.serve.bench.settings import LatencySettings
from rooflight.serve.bench.statistics import Outcome
from rooflight.serve.bench.traffic import Arrival
from rooflight.serve.clock import VirtualClock
from rooflight.serve.engine import StepRecord
from rooflight.serve.step import Step
from tests.serve.bench.engines import HalfRoof, engine_of


def cost(step: Step) -> float:
    """A second, and a hundredth a token."""
    return 1.0 + step.tokens / 100


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_roof_of_a_run_is_that_of_its_steps(ahead: int) -> None:
    clock, records = VirtualClock(), []
    engine = engine_of(clock, cost, seqs=3, ahead=ahead, records=records)
    arrivals = [Arrival(index, (1,) * 10, 5) for index in range(9)]
    outcomes = drive(engine, clock, arrivals)
    roof = roof_of_run(records, outcomes, HalfRoof(cost), 10_000)
    # 9 prompts of 10 tokens and 9·4 decoded tokens in steps of 3 requests, whatever the engine launched beside them.
    assert sum(record.tokens for record in records) == 9 * 10 + 9 * 4
    expected = len(records) + (9 * 10 + 9 * 4) / 100
    assert roof.steps == pytest.approx(expected)
    assert roof.predicted == pytest.approx(expected)
    assert roof.run == pytest.approx(expected / 2)
    # Steps follow each other without a gap: the clock's time is theirs.
    assert clock.now() == pytest.approx(expected)


def test_roofs_of_mean_sizes() -> None:
    # Two requests side by side: prompts of 30 and 50 tokens, 11 output tokens each, a token every second.
    outcomes = [Outcome(index, prompt, 11, 0.0, 0.0, 1.0, 11.0, [1.0] * 10) for index, prompt in enumerate((30, 50))]
    roof = roof_of_run([], outcomes, HalfRoof(cost), 10_000)
    ttft = 1e-3 * 40 + 1e-6 * 40
    # Decoding, each sees 2 sequences at (30 + 5.5 and 50 + 5.5)/2 = 45.5 → 46 (to even: 46) tokens of context.
    tpot = 1e-3 * 2 + 1e-6 * 2 * 46
    assert (roof.run, roof.steps, roof.predicted) == (None, None, None)
    assert (roof.ttft, roof.tpot, roof.e2el) == pytest.approx((ttft, tpot, ttft + 10 * tpot))


def test_without_decoding_there_is_no_roof_of_a_decode_step() -> None:
    roof = roof_of_run([], [Outcome(0, 8, 1, 0.0, 0.0, 1.0, 1.0)], HalfRoof(cost), 100)
    assert roof.tpot is None and roof.ttft == roof.e2el == pytest.approx(1e-3 * 8 + 1e-6 * 8)
    assert roof_of_run([], [Outcome(0, 8, error="no")], HalfRoof(cost), 100) == Roof()
    assert roof_of_run([], [Outcome(0, 8, 1)], None, 100) == Roof()


def test_a_long_prompt_goes_in_steps_and_cached_tokens_are_not_computed() -> None:
    predictor = HalfRoof(cost)
    # 250 tokens, 50 of them cached, in steps of 120: to 170, then to 250.
    assert prefill_roof(predictor, 250, 50, 120) == pytest.approx(1e-3 * 200 + 1e-6 * (170 + 250))


def test_steps_without_a_forecast_have_no_roof() -> None:
    clock, records = VirtualClock(), []
    engine = engine_of(clock, cost, records=records)
    engine.predictor = None
    drive(engine, clock, [Arrival(0, (1,), 2)])
    assert len(records) == 2 and roof_of_steps(records) is None
    assert roof_of_steps([]) is None


@pytest.mark.parametrize("ahead", [0, 1])
def test_latency_against_its_formula(ahead: int) -> None:
    settings = LatencySettings(batch_size=4, input_len=20, output_len=6, num_iters=3, num_iters_warmup=2).check()
    clock, records = VirtualClock(), []
    engine = engine_of(clock, cost, seqs=4, budget=40, ahead=ahead, records=records)
    seen: list[int] = []
    arrivals = batch(settings, 50, seed=1)
    assert len(arrivals) == 4 and all(len(each.prompt) == 20 and max(each.prompt) < 50 for each in arrivals)
    found = iterate(engine, clock, records, settings, arrivals, lambda: seen.append(1))
    assert (len(found), len(seen)) == (3, 5)
    for each in found:
        total = sum(record.seconds for record in records)
        assert each.seconds == pytest.approx(total)
        assert each.roof == pytest.approx(total / 2)
        # Two of the four prompts fill a step of 40 tokens, or nearly so beside those that decode already.
        first = [record for record in records if record.first]
        assert each.ttft == pytest.approx(sum(record.seconds for record in records[: records.index(first[-1]) + 1]))
        assert each.ttft_roof == pytest.approx(each.ttft / 2)
        assert each.tpot == pytest.approx((each.seconds - each.ttft) / 5)
        assert each.tpot_roof == pytest.approx((each.seconds - each.ttft) / 5 / 2)
    rows = {row.key: row for row in latency_rows(found, settings)}
    assert rows["mean_latency_ms"].value == pytest.approx(1e3 * found[0].seconds)
    assert rows["output_throughput"].value == pytest.approx(24 / found[0].seconds)
    for key in ("mean_latency_ms", "mean_ttft_ms", "median_tpot_ms", "output_throughput"):
        assert rows[key].of_roof == pytest.approx(0.5)


def test_a_single_token_has_no_tpot() -> None:
    settings = LatencySettings(batch_size=2, input_len=5, output_len=1, num_iters=1, num_iters_warmup=0)
    clock, records = VirtualClock(), []
    engine = engine_of(clock, cost, records=records)
    found = iterate(engine, clock, records, settings, batch(settings, 50, 0))
    assert found[0].tpot is None and found[0].ttft == found[0].seconds == pytest.approx(1.1)
    assert not any("tpot" in row.key for row in latency_rows(found, settings))


def test_a_batch_with_a_hole_is_refused() -> None:
    settings = LatencySettings(batch_size=2, input_len=5000, output_len=1, num_iters=1, num_iters_warmup=0)
    clock = VirtualClock()
    with pytest.raises(RooflightError, match="4096"):
        iterate(engine_of(clock, cost), clock, [], settings, batch(settings, 50, 0))


def test_records_are_of_the_type_that_an_engine_gives() -> None:
    clock, records = VirtualClock(), []
    drive(engine_of(clock, cost, records=records), clock, [Arrival(0, (1,), 1)])
    assert isinstance(records[0], StepRecord)
