"""The sampler against plain Python: what it changes in logits, what it draws, and what it tells of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rooflight.ops.sampling import sample_plain
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.sampler import Row, Sampler, row_of
from rooflight.serve.sampling_logprobs import prompt_logprobs
from rooflight.serve.sampling_random import seed_of, uniforms
from rooflight.serve.step import Part

V = 61
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def logits_of(rows: int, seed: int = 0, columns: int = V) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2


def row(slot: int, index: int = 0, prompt: Sequence[int] = (1, 2), outputs: Sequence[int] = (), **params: Any) -> Row:
    mask, ends = params.pop("mask", None), params.pop("ends", frozenset())
    name = params.pop("name", f"request-{slot}")
    tokens = [*prompt, *outputs]
    return Row(slot, (name, 1), SamplingParams(**params), tokens, len(prompt), index or len(outputs), ends, mask)


def mask_of(allowed: Sequence[int], columns: int = V) -> np.ndarray:
    words = [0] * -(-columns // 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return np.array(words, np.uint32).view(np.int32)


def edited(logits: Tensor, one: Row) -> list[float]:
    """One row's logits as its parameters change them, in plain Python."""
    x, params, outputs = logits.tolist(), one.params, list(one.tokens[one.prompt :])
    if one.mask is not None:
        x = [v if one.mask.view(np.uint32)[i // 32] >> (i % 32) & 1 else -math.inf for i, v in enumerate(x)]
    if one.index < params.min_tokens:
        later = [-math.inf if i in one.ends else v for i, v in enumerate(x)]
        # A minimum of tokens gives way where nothing but an end is allowed.
        x = later if max(later) > -math.inf else x
    x = [v + params.logit_bias.get(i, 0.0) for i, v in enumerate(x)]
    for i in set(one.tokens):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i, count in Counter(outputs).items():
        x[i] -= params.frequency_penalty * count + params.presence_penalty
    return x


def drawn(x: list[float], params: SamplingParams, u: float) -> int:
    """The token at u of what temperature and filters leave of some logits, in plain Python."""
    if params.temperature == 0:
        return x.index(max(x))
    weights = [math.exp((v - max(x)) / params.temperature) for v in x]
    kept = [i for i, w in enumerate(weights) if w >= params.min_p and w > 0]
    # What filters nothing is drawn by token number, the rest from likely to unlikely.
    if 0 < params.top_k < len(x) or params.top_p < 1 or params.min_p > 0:
        kept.sort(key=lambda i: -weights[i])
        kept = kept[: params.top_k if params.top_k > 0 else None]
        mass, total, nucleus = 0.0, sum(weights[i] for i in kept), []
        for i in kept:
            if nucleus and mass >= params.top_p * total:
                break
            nucleus.append(i)
            mass += weights[i]
        kept = nucleus
    point = u * sum(weights[i] for i in kept)
    for i in kept:
        point -= weights[i]
        if point < 0:
            return i
    return kept[-1]


def expected(logits_BV: Tensor, rows: Sequence[Row], engine_seed: int = 0) -> list[int]:
    out = []
    for logits, one in zip(logits_BV.double(), rows, strict=True):
        seed = seed_of(engine_seed, one.tenancy[0]) if one.params.seed is None else one.params.seed % 2**64
        u = uniforms(np.array([seed], np.uint64), np.array([one.index]))[0]
        out.append(drawn(edited(logits, one), one.params, u))
    return out


# A little of everything, alone and together.
MANY: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1.3, "top_k": 7},
    {"top_k": 1},
    {"top_k": -1, "seed": -3},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"min_p": 0.1, "seed": 2**64 - 1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.5, "outputs": (3, 3, 9), "temperature": 0.0},
    {"repetition_penalty": 0.6, "outputs": (4,)},
    {"presence_penalty": 1.7, "outputs": (5, 6, 5, 5)},
    {"frequency_penalty": -0.9, "outputs": (5, 6, 5, 5), "top_p": 0.9},
    {"repetition_penalty": 1.2, "presence_penalty": -0.4, "frequency_penalty": 0.3, "outputs": tuple(range(40)) * 2},
    {"logit_bias": {7: 100.0}, "temperature": 0.0},
    {"logit_bias": {7: -100.0, 8: 3.0, 60: 2.5}},
    {"min_tokens": 4, "ends": frozenset({0, 11, 30}), "outputs": (1, 1)},
    {"min_tokens": 2, "ends": frozenset({0, 11, 30}), "outputs": (1, 1)},
    {"mask": mask_of([4, 31, 32, 60])},
    {"mask": mask_of([4, 31]), "min_tokens": 3, "ends": frozenset({31}), "temperature": 0.0},
    {"mask": mask_of([31]), "min_tokens": 3, "ends": frozenset({31})},
    {"mask": mask_of(range(V)), "logit_bias": {2: 4.0}, "repetition_penalty": 2.0, "outputs": (2, 9), "top_k": 3},
    {"logprobs": 3, "repetition_penalty": 1.9, "outputs": (2, 9)},
    {"logprobs": 0, "temperature": 0.0},
    {"prompt": (8, 8, 8), "repetition_penalty": 3.0},
]


def everything(count: int = 1) -> list[Row]:
    made = []
    for copy in range(count):
        for number, params in enumerate(MANY):
            slot = copy * len(MANY) + number
            made.append(row(slot, **{"name": f"{copy}-{number}", **params}))
    return made


@DEVICES
def test_every_parameter_against_plain_python(device: str) -> None:
    rows = everything(8)
    logits_BV = logits_of(len(rows))
    sampler = Sampler(V, device, len(rows), seed=9)
    tokens, _ = sampler.sample(logits_BV.to(device), rows).read()
    assert tokens == expected(logits_BV, rows, 9)


@DEVICES
def test_a_request_alone_gives_the_tokens_that_it_gives_in_company(device: str) -> None:
    columns = 5003
    rows = everything(3)
    for one in rows:
        if one.mask is not None:
            one.mask = np.resize(one.mask, -(-columns // 32))
    logits_BV = logits_of(len(rows), 4, columns).to(device)
    order = np.random.default_rng(0).permutation(len(rows))
    together = Sampler(columns, device, len(rows)).sample(logits_BV, rows).tokens_B
    shuffled = Sampler(columns, device, len(rows)).sample(logits_BV[order], [rows[i] for i in order]).tokens_B
    assert torch.equal(shuffled, together[order])
    for number, one in enumerate(rows):
        one.slot = 0
        alone = Sampler(columns, device, 1).sample(logits_BV[number : number + 1], [one])
        assert torch.equal(alone.tokens_B, together[number : number + 1])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu() -> None:
    rows = everything(2)
    sampler, logits_BV = Sampler(V, "cuda", len(rows)), logits_of(len(rows)).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        sampled = sampler.sample(logits_BV, rows)
        again = sampler.sample(logits_BV[:1], [row(0, name="0-0", temperature=0.0)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sampled.read()[0] == expected(logits_BV.cpu(), rows)
    assert again.read()[0] == [int(logits_BV[0].argmax())]


def test_draws_handed_out_give_the_tokens_of_a_step() -> None:
    rows = [row(0, temperature=0.0), row(1, seed=3), row(2, temperature=0.4, index=7)]
    sampler, logits_BV = Sampler(V, "cpu", 4), logits_of(3)
    draws = sampler.draws(rows)
    assert draws is not None
    tokens_B = sample_plain(logits_BV, *torch.from_numpy(draws))
    assert tokens_B.tolist() == sampler.sample(logits_BV, rows).read()[0]
    special: list[dict[str, Any]] = [{"top_k": 2}, {"logprobs": 0}, {"mask": mask_of([1])}, {"logit_bias": {1: 1.0}}]
    for params in special:
        assert sampler.draws([*rows, row(3, name=str(params), **params)]) is None


def test_logits_stay_as_they_are() -> None:
    rows = everything()
    logits_BV = logits_of(len(rows))
    before = logits_BV.clone()
    Sampler(V, "cpu", len(rows)).sample(logits_BV, rows)
    assert torch.equal(logits_BV, before)


@DEVICES
def test_penalties_follow_an_output_over_steps_slots_and_preemptions(device: str) -> None:
    rng = np.random.default_rng(1)
    sampler = Sampler(V, device, 12)
    params: dict[str, Any] = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.2}
    rows: list[Row] = []
    for step in range(40):
        # Two more requests at the start of every fourth step, up to twelve; then each in turn is replaced or preempted.
        if step % 4 == 0 and len(rows) < 12:
            rows += [row(slot, name=f"{step}-{slot}", **params) for slot in range(len(rows), len(rows) + 2)]
        else:
            victim = rows[int(rng.integers(len(rows)))]
            if step % 3 == 0:
                victim.tenancy, victim.tokens, victim.index = (f"new-{step}", 1), [int(rng.integers(V))], 0
                victim.prompt = 1
            elif step % 3 == 1:
                victim.tenancy = (victim.tenancy[0], victim.tenancy[1] + 1)
            else:
                other = rows[int(rng.integers(len(rows)))]
                for one, slot in ((victim, other.slot), (other, victim.slot)):
                    one.slot, one.tenancy = slot, (one.tenancy[0], one.tenancy[1] + 1)
        taken = [one for one in rows if rng.random() < 0.8]
        if not taken:
            continue
        logits_BV = logits_of(len(taken), step)
        tokens, _ = sampler.sample(logits_BV.to(device), taken).read()
        assert tokens == expected(logits_BV, taken)
        for one, token in zip(taken, tokens, strict=True):
            one.tokens, one.index = [*one.tokens, token], one.index + 1


def test_tables_of_penalties_are_given_on() -> None:
    sampler = Sampler(V, "cpu", 24)
    for first in (0, 8, 16):
        for penalty in (1.0, 0.0):
            slots = range(first, first + 8)
            made = [row(slot, name=f"{slot}-{penalty}", presence_penalty=penalty) for slot in slots]
            sampler.sample(logits_of(8), made)
    assert sampler._edits.penalties.counts_SV.shape == (8, V)


def test_penalties_refuse_to_run_ahead() -> None:
    ahead = row(0, index=3, outputs=(4, 5), presence_penalty=1.0)
    with pytest.raises(ValueError, match="its 3 output tokens and 2 are known"):
        Sampler(V, "cpu", 1).sample(logits_of(1), [ahead])


def test_rows_must_be_those_of_the_logits() -> None:
    with pytest.raises(ValueError, match="for 1 rows × 61 tokens"):
        Sampler(V, "cpu", 2).sample(logits_of(2), [row(0)])


def test_a_step_without_rows_samples_nothing() -> None:
    assert Sampler(V, "cpu", 2).sample(logits_of(0), []).read() == ([], [])


def test_a_slot_takes_on_its_new_request() -> None:
    sampler, logits_BV = Sampler(V, "cpu", 1), logits_of(1)
    settings: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 3, "seed": 1}, {"seed": 2, "min_p": 0.5}]
    for name, params in zip("abc", settings, strict=True):
        one = row(0, name=name, **params)
        assert sampler.sample(logits_BV, [one]).read()[0] == expected(logits_BV, [one])


def chi_square(counts: list[int], parts: list[float]) -> float:
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, parts, strict=True))


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.7}, {"temperature": 2.0, "min_p": 0.2}], ids=str
)
def test_draws_have_the_distribution(params: dict[str, Any]) -> None:
    columns, draws, rows = 12, 8000, 40
    logits_V = logits_of(1, 3, columns)[0]
    weights = (logits_V / params.get("temperature", 1.0)).double().exp()
    weights[weights < params.get("min_p", 0.0) * weights.max()] = 0.0
    order = weights.argsort(descending=True)
    if "top_k" in params:
        weights[order[params["top_k"] :]] = 0.0
    if "top_p" in params:
        before = weights[order].cumsum(0) - weights[order]
        weights[order[before >= params["top_p"] * weights.sum()]] = 0.0
    parts = (weights / weights.sum()).tolist()
    counts: Counter[int] = Counter()
    sampler = Sampler(columns, "cpu", rows)
    for index in range(draws // rows):
        made = [row(slot, index=index, seed=slot if slot % 2 else None, **params) for slot in range(rows)]
        counts.update(sampler.sample(logits_V.expand(rows, -1), made).read()[0])
    live = [i for i, p in enumerate(parts) if p > 0]
    assert set(counts) <= set(live)
    # Mean n − 1 and deviation √(2(n − 1)); fixed seeds, so this holds or does not.
    degrees = len(live) - 1
    assert chi_square([counts[i] for i in live], [parts[i] for i in live]) < degrees + 4 * math.sqrt(2 * degrees)


def test_uniforms_fill_the_unit_interval_and_know_only_seed_and_index() -> None:
    seeds, indices = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300))
    u = uniforms(seeds.ravel(), indices.ravel())
    assert u.min() >= 0.0 and u.max() < 1.0
    assert len(np.unique(u)) == u.size
    counts = np.histogram(u, 64, (0, 1))[0]
    assert chi_square(counts.tolist(), [1 / 64] * 64) < 63 + 4 * math.sqrt(126)
    grid = u.reshape(300, 300)
    # Neighbours in either direction, and along the diagonal, have nothing to do with one another.
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, 1:], grid[:-1, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015
    assert uniforms(np.array([7], np.uint64), np.array([5]))[0] == grid[5, 7]


def test_uniforms_are_splitmix64() -> None:
    """Against the generator with Python's whole numbers."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    step = 0x9E3779B97F4A7C15
    for seed in (0, 1, 2**64 - 1, 123456789):
        for index in (0, 1, 100_000):
            wanted = (mix((mix((seed + step) % 2**64) + (index + 1) * step) % 2**64) >> 11) / 2**53
            assert uniforms(np.array([seed], np.uint64), np.array([index]))[0] == wanted


def test_requests_without_a_seed_differ_by_engine_seed_and_id() -> None:
    seeds = {seed_of(engine, name) for engine in (0, 1) for name in ("a", "b", "1a")}
    assert len(seeds) == 6 and all(0 <= seed < 2**64 for seed in seeds)


@DEVICES
def test_logprobs_tell_of_raw_logits(device: str) -> None:
    rows = [
        row(0, logprobs=2, temperature=0.0, logit_bias={9: 100.0}),
        row(1, temperature=0.0),
        row(2, logprobs=0),
        row(3, logprobs=5, mask=mask_of([3])),
    ]
    logits_BV = logits_of(4)
    tokens, told = Sampler(V, device, 4).sample(logits_BV.to(device), rows).read()
    assert tokens[0] == 9 and tokens[3] == 3 and told[1] is None
    for logits, token, record, top in zip(logits_BV.double(), tokens, told, (2, None, 0, 5), strict=True):
        if top is None:
            continue
        assert record is not None
        check_record(record, logits, token, top)


def check_record(record: Any, logits: Tensor, token: int, top: int) -> None:
    x = logits.tolist()
    normalizer = math.log(sum(math.exp(v) for v in x))
    ranked = sorted(range(len(x)), key=lambda i: -x[i])
    assert record.token == token
    assert record.rank == ranked.index(token) + 1
    assert record.logprob == pytest.approx(x[token] - normalizer, abs=1e-5)
    assert [t for t, _ in record.top] == ranked[:top]
    assert [v for _, v in record.top] == pytest.approx([x[t] - normalizer for t in ranked[:top]], abs=1e-5)


@DEVICES
def test_prompt_logprobs_in_pieces(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rooflight.serve.sampling_logprobs._LOGITS_AT_ONCE", 4 * V)
    logits_TV, targets = logits_of(11), [int(t) for t in torch.arange(11) * 5 % V]
    records = prompt_logprobs(logits_TV.to(device), torch.tensor(targets, device=device), 3).read()
    for logits, target, record in zip(logits_TV.double(), targets, records, strict=True):
        check_record(record, logits, target, 3)


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    (record,) = prompt_logprobs(logits_of(1, columns=4), torch.tensor([2]), 20).read()
    assert len(record.top) == 4


def test_rows_of_parts_count_outputs_by_place() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(40,))
    request = Request("r", [1, 2, 3], params, 10, eos_ids=frozenset({0}))
    request.slot, request.admissions = 4, 2
    first = row_of(Part(request, 0, 3, samples=True))
    assert (first.slot, first.tenancy, first.index, first.prompt) == (4, ("r", 2), 0, 3)
    assert first.ends == {0, 40}
    request.tokens.append(7)
    # One step ahead: the second output token is in flight, the third is sampled.
    request.in_flight = 2
    assert row_of(Part(request, 4, 1, samples=True, placeholder=True)).index == 2
