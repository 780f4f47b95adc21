"""Whether a step fits and what would: every offer is walked again by other means, and no milder one was passed over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rooflight.errors import InvalidValue
from rooflight.models.count import parameter_counts
from rooflight.train import fit
from rooflight.train.accounting import Prediction, predict
from rooflight.train.fit import fit_sentence, flags_of, refuse_if_too_large, spread_over, would_fit
from rooflight.train.settings import TrainSettings
from rooflight.train.whole_step import second_micro_batch, whole_step
from tests.workload.machines import GPU, changed
from tests.workload.setups import llama

GIB = 2**30
CONFIG = llama(4, width=64, vocab_size=128)


def settings(**given: Any) -> TrainSettings:
    return replace(TrainSettings(batch_size=8, context=256, dtype="bf16", steps=1), **given).check()


def predicted(at: TrainSettings) -> Prediction:
    return predict(CONFIG, at, GPU)


def changed_by(flags: str, at: TrainSettings) -> TrainSettings:
    """The settings with flags as a user would type them."""
    words, found = flags.split(), {}
    while words:
        name = words.pop(0).removeprefix("--")
        if name.startswith("no-"):
            found[name.removeprefix("no-").replace("-", "_")] = False
        else:
            value = words.pop(0)
            found[name.replace("-", "_")] = int(value) if value.isdigit() else value
    return replace(at, **found).check()


@pytest.mark.parametrize("micro", [0, 4, 2, 1])
def test_every_micro_batch_is_counted(micro: int) -> None:
    at = settings(micro_batch_size=micro)
    found = predicted(at)
    assert found.timed is not None and found.seconds is not None
    whole = whole_step(found.timed, at.micro_batches)
    names = [whole.walk.trace.records[step.record].name for step in whole.walk.steps]
    assert names.count("embedding") == at.micro_batches
    assert names.count("attention") == at.micro_batches * len(CONFIG.layers)
    assert names.count("adamw") == [r.name for r in found.walked.trace.records].count("adamw")
    assert whole.expected_seconds == pytest.approx(found.seconds, rel=0.01)
    assert len(whole.seconds) == len(whole.bounds) == len(whole.walk.steps)


def test_a_single_micro_batch_has_no_second() -> None:
    assert second_micro_batch(predicted(settings()).walked) is None


@pytest.mark.parametrize("share", [0.97, 0.7, 0.5])
def test_what_is_offered_fits_and_takes_what_is_said(share: float) -> None:
    at = settings()
    found = predicted(at)
    capacity = share * found.peak_bytes
    offers = would_fit(CONFIG, at, found, capacity)
    assert offers
    assert len(offers) <= fit.MOST_SHOWN
    for offer in offers:
        with_it = changed_by(offer.flags, at)
        again = predict(CONFIG, with_it, GPU)
        assert again.peak_bytes == offer.peak_bytes <= capacity
        assert again.seconds is not None and offer.seconds is not None
        assert offer.seconds == pytest.approx(again.seconds, rel=0.01)
        assert offer.tokens_per_second == pytest.approx(with_it.batch_size * with_it.context / offer.seconds)
    rates = [offer.tokens_per_second or 0.0 for offer in offers]
    assert rates == sorted(rates, reverse=True)


def test_the_largest_micro_batch_that_fits_is_offered() -> None:
    at = settings(recompute="full", master_weights=False, optimizer_dtype="bf16")
    found = predicted(at)
    peaks = {m: predict(CONFIG, replace(at, micro_batch_size=m), GPU).peak_bytes for m in (4, 2, 1)}
    for size, peak in peaks.items():
        if peak < found.peak_bytes:
            offers = would_fit(CONFIG, at, found, peak)
            largest = max(m for m, other in peaks.items() if other <= peak)
            assert f"--micro-batch-size {largest}" in [offer.flags for offer in offers], size


def test_nothing_is_offered_that_changes_more_for_no_gain() -> None:
    at = settings()
    found = predicted(at)
    offers = would_fit(CONFIG, at, found, 0.6 * found.peak_bytes)
    flags = [set(offer.flags.split("--")) - {""} for offer in offers]
    for index, one in enumerate(flags):
        for other in flags[:index]:
            assert not {word.strip() for word in other} < {word.strip() for word in one}


def test_without_a_machine_the_offers_have_no_times() -> None:
    at = settings()
    found = predict(CONFIG, at, None, 1.0)
    offers = would_fit(CONFIG, at, found, 0.7 * found.peak_bytes)
    assert offers
    assert all(offer.seconds is None and offer.tokens_per_second is None for offer in offers)
    sentence, _ = fit_sentence(CONFIG, at, found, 0.7 * found.peak_bytes, "this device")
    assert "a step)" not in sentence


def test_stochastic_rounding_goes_with_adamw_only() -> None:
    for optimizer, flags in (("adamw", "--no-master-weights --rounding stochastic"), ("muon", "--no-master-weights")):
        at = settings(optimizer=optimizer, recompute="full", micro_batch_size=1)
        found = predicted(at)
        offers = would_fit(CONFIG, at, found, 0.98 * found.peak_bytes)
        assert flags in [offer.flags for offer in offers]
        for offer in offers:
            changed_by(offer.flags, at)


def test_when_nothing_fits_the_state_is_counted() -> None:
    at = settings()
    found = predicted(at)
    n = parameter_counts(CONFIG)["total"]
    spread = spread_over(CONFIG, at, 1.5 * GIB)
    assert spread.state_bytes == 16 * n  # 2 weight, 2 gradient, 12 master, mean and square
    capacity = spread.activation_bytes + spread.state_bytes / 2.5
    assert spread_over(CONFIG, at, capacity).ranks == 3
    assert spread_over(CONFIG, at, spread.activation_bytes).ranks is None
    small = 4 * n  # not even weights and bf16 moments
    sentence, offers = fit_sentence(CONFIG, at, found, small, "this device")
    assert offers == []
    assert "weights, gradients and optimizer alone take" in sentence or "shorten --context" in sentence


def test_the_sentence_names_what_it_needs_and_what_there_is() -> None:
    at = settings()
    found = predicted(at)
    sentence, offers = fit_sentence(CONFIG, at, found, found.peak_bytes, "this device")
    assert sentence.startswith("fits: needs ")
    assert offers == []
    sentence, offers = fit_sentence(CONFIG, at, found, 0.7 * found.peak_bytes, "the box")
    assert sentence.startswith("does not fit: needs ")
    assert found.memory.peak_label in sentence
    assert "the box has" in sentence
    assert all(offer.flags in sentence for offer in offers)
    assert "\n" not in sentence


def test_a_run_that_does_not_fit_is_refused() -> None:
    at = settings()
    found = predicted(at)
    refuse_if_too_large(CONFIG, at, found, found.peak_bytes)
    with pytest.raises(InvalidValue, match="does not fit.*would fit with --"):
        refuse_if_too_large(CONFIG, at, found, found.peak_bytes - 1)


def test_flags_are_written_as_they_are_typed() -> None:
    assert flags_of({"recompute": "selective", "activation_gib": 0.0}) == "--recompute selective"
    assert flags_of({"master_weights": False, "rounding": "nearest"}) == "--no-master-weights"
    assert flags_of({"micro_batch_size": 2, "context": 128}) == "--micro-batch-size 2 --context 128"


def test_the_capacity_is_that_of_the_machine() -> None:
    at = settings()
    small = changed(GPU, memory_bytes=1.0)
    assert not predict(CONFIG, at, small).memory.fits
