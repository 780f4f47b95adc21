"""The predictor against a walk of the very step with its real sizes, timed operation by operation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate
from random import Random
from typing import Any

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.hardware.store import load
from rooflight.models.config import ModelConfig
from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.models.presets import preset
from rooflight.ops import batch
from rooflight.ops.op import all_ops
from rooflight.ops.sampling import greedy as choose_greedy
from rooflight.ops.sampling import sample, sample_plain
from rooflight.serve.params import SamplingParams
from rooflight.serve.predict import FEW, GREEDY, PLAIN, SORTED, Lanes, StepPredictor, drawn_together, way_of
from rooflight.serve.request import Request
from rooflight.serve.sampler import Sampler, row_of
from rooflight.serve.step import Part, Step
from rooflight.serve.torch_runner import TorchRunner
from rooflight.workload import walk
from rooflight.workload.program import Program, build_model
from rooflight.workload.record import Recorder
from rooflight.workload.roofline import Timed, time_walk
from tests.workload.machines import CPU, EAGER, GPU, GRAPH, changed
from tests.workload.setups import FAMILIES, llama

H200 = load("h200")
CLOUD = load("cloud-cpu")
BLOCK = 16


def walked(
    config: ModelConfig, counts: list[int], contexts: list[int], samples: int, way: str, dtype: str, kv: torch.dtype
) -> walk.Walk:
    """Every layer of the step, none folded, on fake tensors of its real sizes."""

    def build() -> Program:
        model = build_model(config, dtype, "cpu").requires_grad_(False)
        tables = [-(-context // BLOCK) for context in contexts]
        cache = KVCache.allocate(config, sum(tables), BLOCK, kv, "cpu")
        positions = [p for n, c in zip(counts, contexts, strict=True) for p in range(c - n, c)]
        paged = Paged(
            cache,
            torch.zeros((len(counts), max(tables)), dtype=torch.int32),
            torch.tensor(contexts, dtype=torch.int32),
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            torch.zeros(len(positions), dtype=torch.int64),
            max(counts),
        )
        ends_R = torch.tensor(list(accumulate(counts))[:samples], dtype=torch.int64) - 1
        tokens_T, positions_T = torch.zeros(len(positions), dtype=torch.int64), torch.tensor(positions)
        # Made before the step, for what the host prepares is no operation of it.
        one_R, none_R = torch.ones(samples, dtype=torch.float64), torch.zeros(samples, dtype=torch.int64)

        def step(_: Any = None) -> Any:
            with batch.use(batch.Batch.of(counts, contexts)), torch.no_grad():
                hidden_TD = model.hidden(tokens_T, positions_T, Layout(None, paged))
                if not samples:
                    return hidden_TD
                logits_RV = model.head(hidden_TD.index_select(0, ends_R))
                if way == GREEDY:
                    return choose_greedy(logits_RV)
                if way == PLAIN:
                    return sample_plain(logits_RV, one_R, one_R)
                return sample(logits_RV, one_R, none_R, one_R, one_R, one_R, 1024 if way == FEW else 0)

        return Program(model, step)

    return walk.dry(build)


def steps(seed: int, longest: int, number: int) -> list[tuple[list[int], list[int], int]]:
    """Counts, contexts and sampled rows: decodes, one token, whole prompts, chunks in the middle, and all mixed."""
    random = Random(seed)
    found: list[tuple[list[int], list[int], int]] = [([1], [random.randint(2, longest)], 1), ([1], [1], 1)]
    found.append(([random.randint(2, longest)], [longest], 0))
    for _ in range(number):
        decodes = [(1, random.randint(1, longest)) for _ in range(random.choice((0, 1, 3, 17)))]
        others = [(random.randint(2, longest // 2), 0) for _ in range(random.choice((0, 1, 2)))]
        others = [(n, n + random.choice((0, random.randint(0, longest - n)))) for n, _ in others]
        parts = (decodes + others) or [(1, 5), (1, 5)]
        found.append(([n for n, _ in parts], [c for _, c in parts], random.randint(0, len(parts))))
    return found


def check(
    config: ModelConfig,
    machine: Any,
    seed: int,
    *,
    dtype: str = "bf16",
    kv_dtype: str = "bf16",
    longest: int = 700,
    more: int = 2,
) -> None:
    predictor = StepPredictor(config, machine, dtype, kv_dtype, BLOCK, graph_up_to=8)
    kv = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}[kv_dtype]
    for index, (counts, contexts, samples) in enumerate(steps(seed, longest, more)):
        way = (GREEDY, PLAIN, FEW, SORTED)[index % 4]
        graph = max(counts) == 1 and samples == len(counts) <= 8 and machine.kind == "gpu"
        # A graph of a whole step draws plainly, whatever it is asked for.
        way = PLAIN if graph else way
        timed = time_walk(walked(config, counts, contexts, samples, way, dtype, kv), machine, graph=graph)
        found = predictor.forecast_sizes(counts, contexts, samples, draws={GREEDY if graph else way: samples})
        told = (counts, contexts, samples, way)
        assert found.seconds == pytest.approx(timed.expected_seconds, rel=1e-9), told
        assert found.roof_seconds == pytest.approx(timed.roof_seconds, rel=1e-9), told
        assert found.bound == bound_of(timed), told


def bound_of(timed: Timed) -> str:
    sums: dict[str, float] = {}
    for step in timed.walk.steps:
        item = timed.priced[step.record]
        sums[item.bound] = sums.get(item.bound, 0.0) + item.roof_seconds
    return max(sums, key=lambda name: sums[name])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_priced_as_a_walk_of_the_step_prices_it(name: str) -> None:
    check(FAMILIES[name], H200, seed=len(name), more=1)


@pytest.mark.parametrize("name", ["llama3", "mixtral"])
def test_a_cpu_is_priced_as_a_walk_of_the_step_prices_it(name: str) -> None:
    check(FAMILIES[name], CLOUD, seed=2, dtype="fp32", kv_dtype="fp32", longest=90, more=3)


# Real sizes, a few layers of each: GQA, windows with softcaps, experts with sinks, many experts, latent attention.
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v2-lite"])
def test_models_of_real_sizes_are_priced_as_a_walk_of_the_step_prices_them(name: str) -> None:
    config = preset(name)
    check(replace(config, layers=config.layers[:4]), H200, seed=7, longest=9000, more=1)


def test_a_cache_of_another_type_than_the_weights_has_a_price_of_its_own() -> None:
    check(FAMILIES["llama3"], H200, seed=3, kv_dtype="fp8")


def test_lanes_without_samples_are_those_of_the_walk() -> None:
    """Where the host is the bound, where the device is, and where they take turns."""
    config = llama(layers=7)
    for eager in (0.0, 2e-6, 1e-3):
        check(config, changed(GPU, launch_eager_seconds=eager), seed=11)
    check(config, CPU, seed=12)


def test_a_chain_of_lanes_is_the_run_one_by_one() -> None:
    random = Random(5)
    for _ in range(50):
        host = device = 0.0
        whole = Lanes(0.0, 0.0, float("-inf"))
        for _ in range(6):
            launch, kernel, count = random.random(), random.random(), random.randint(1, 5)
            for _ in range(count):
                host += launch
                device = max(device, host) + kernel
            whole = whole.then(Lanes(launch, kernel, launch + kernel).times(count))
        assert max(whole.device, whole.late) == pytest.approx(device)


def request(temperature: float, **params: Any) -> Request:
    return Request("r", [1] * 40, SamplingParams(temperature=temperature, **params), 4)


def test_a_step_is_priced_by_its_parts() -> None:
    predictor = StepPredictor(llama(vocab_size=5000), GPU, "bf16", "bf16", BLOCK)
    drawn = Step(1, (Part(request(0.0), 40, 1, True), Part(request(0.7), 8, 30, True), Part(request(0.0), 0, 9, False)))
    # The greedy row is drawn with the other one.
    assert predictor.forecast(drawn) == predictor.forecast_sizes([1, 30, 9], [41, 38, 9], 2, draws={PLAIN: 2})
    # One that does not sample in this step has no say in how tokens are chosen.
    greedy = Step(2, (Part(request(0.0), 40, 1, True), Part(request(0.7), 0, 9, False)))
    assert predictor.forecast(greedy) == predictor.forecast_sizes([1, 9], [41, 9], 1)


WAYS = {
    "greedy": {"temperature": 0.0, "top_k": 5},
    "plain": {"temperature": 0.7},
    "all": {"temperature": 0.7, "top_k": -1},
    "few": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "most": {"temperature": 1.0, "top_k": 1024},
    "many": {"temperature": 1.0, "top_k": 1025},
    "beyond": {"temperature": 1.0, "top_k": 3000},
    "nucleus": {"temperature": 1.0, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
}


@pytest.mark.parametrize("names", [[name] for name in WAYS] + [["greedy", "few", "plain"], ["nucleus", "greedy"]])
def test_rows_are_priced_in_the_ways_in_which_the_sampler_draws_them(names: list[str]) -> None:
    """What the sampler really runs, recorded on a CPU, against what is priced: the draws of a step and their rows."""
    vocabulary = 3000
    requests = []
    for slot, name in enumerate(names):
        requests.append(Request(name, [1, 2], SamplingParams(**WAYS[name]), 4))
        requests[-1].slot = slot
    step = Step(1, tuple(Part(one, 0, 2, True) for one in requests))
    sampler = Sampler(vocabulary, "cpu", len(names))
    with Recorder() as recorder:
        sampler.sample(torch.randn(len(names), vocabulary), [row_of(part) for part in step.parts])
    drawing = {"greedy", "sample_plain", "sample"}
    ran = sorted((r.cost.curve, int(r.cost.size[0])) for r in recorder.trace().records if r.name in drawing)

    curves = {GREEDY: "greedy", PLAIN: "sample_plain", FEW: "sample.selected", SORTED: "sample"}
    draws = Counter(way_of(one.params, vocabulary) for one in requests)
    assert sorted((curves[way], rows) for way, rows in drawn_together(draws)) == ran


def test_graphs_are_for_decode_steps_of_few_sequences_on_a_gpu() -> None:
    """Launches are then a tenth: small operations, each waiting for its launch, take that much less."""
    eager = StepPredictor(llama(), GPU, "bf16", "bf16", BLOCK)
    graphs = StepPredictor(llama(), GPU, "bf16", "bf16", BLOCK, graph_up_to=4)
    four, five = ([1] * 4, [9] * 4, 4), ([1] * 5, [9] * 5, 5)
    assert graphs.forecast_sizes(*four).seconds < 0.2 * eager.forecast_sizes(*four).seconds
    for sizes in (five, ([1, 2], [9, 9], 2), ([1, 1], [9, 9], 1)):
        assert graphs.forecast_sizes(*sizes) == eager.forecast_sizes(*sizes)
    cpu = StepPredictor(llama(), CPU, "bf16", "bf16", BLOCK, graph_up_to=4, graph_tokens_up_to=64)
    for sizes in (four, five):
        expected = StepPredictor(llama(), CPU, "bf16", "bf16", BLOCK).forecast_sizes(*sizes)
        assert cpu.forecast_sizes(*sizes) == expected


def test_a_graph_that_draws_plainly_is_followed_by_what_else_is_asked() -> None:
    """Sorting 4 rows of 64 tokens: a floor of 1 µs and next to nothing on the device, 10 µs to launch at the most."""
    graphs = StepPredictor(llama(), GPU, "bf16", "bf16", BLOCK, graph_up_to=4)
    sizes = ([1] * 4, [9] * 4, 4)
    plain = graphs.forecast_sizes(*sizes)
    assert graphs.forecast_sizes(*sizes, draws={PLAIN: 1, GREEDY: 3}) == plain
    for draws in ({SORTED: 4}, {SORTED: 1, PLAIN: 0, GREEDY: 3}, {FEW: 4}):
        more = graphs.forecast_sizes(*sizes, draws=draws).seconds - plain.seconds
        assert GRAPH < more < EAGER + 1.1 * GRAPH


def test_the_layers_of_other_steps_are_graphs_up_to_a_number_of_tokens() -> None:
    config = llama()
    eager = StepPredictor(config, GPU, "bf16", "bf16", BLOCK)
    graphs = StepPredictor(config, GPU, "bf16", "bf16", BLOCK, graph_tokens_up_to=32)
    # Without rows the layers are all of the step.
    counts, contexts = [1, 30], [40, 30]
    found = walked(config, counts, contexts, 0, GREEDY, "bf16", torch.bfloat16)
    expected = time_walk(found, GPU, graph=True).expected_seconds
    assert graphs.forecast_sizes(counts, contexts, 0).seconds == pytest.approx(expected, rel=1e-9)
    # Rows, head and choice are launched one by one after it: three launches and as many floors, if nothing hides them.
    whole = graphs.forecast_sizes(counts, contexts, 2).seconds
    assert 3 * GRAPH < whole - expected < 3 * (EAGER + GRAPH) * 1.1
    assert whole < eager.forecast_sizes(counts, contexts, 2).seconds
    assert graphs.forecast_sizes([1, 32], [40, 32], 2) == eager.forecast_sizes([1, 32], [40, 32], 2)


def test_a_decode_step_of_an_8b_reads_its_weights_and_its_cache() -> None:
    """By hand: 8.03e9 parameters less the embedding's 128,256·4,096, and 131,072 bytes of cache a token."""
    predictor = StepPredictor(preset("llama-3.1-8b"), H200, "bf16", "bf16", BLOCK, graph_up_to=64)
    weights = 2 * (8_030_261_248 - 128_256 * 4096)
    for sequences, context in ((1, 1), (1, 100_000), (32, 2000)):
        cache = sequences * context * 2 * 32 * 8 * 128 * 2
        least = (weights + cache) / H200.memory_bandwidth.value
        found = predictor.forecast_sizes([1] * sequences, [context] * sequences, sequences)
        # Activations, logits and the tables are the rest.
        assert least < found.roof_seconds < 1.02 * least
        assert found.bound == "memory"
        assert found.seconds > found.roof_seconds


def test_a_prefill_of_an_8b_is_bound_by_its_products() -> None:
    """By hand: 2 FLOPs a parameter of the layers and a token, 4·H·E a visible pair and layer."""
    predictor = StepPredictor(preset("llama-3.1-8b"), H200, "bf16", "bf16", BLOCK)
    layers = 8_030_261_248 - 2 * 128_256 * 4096
    flops = 2 * layers * 8192 + 4 * 32 * 128 * 32 * (8192 * 8193 // 2)
    least = flops / H200.peak("bf16")[0]
    found = predictor.forecast_sizes([8192], [8192], 1)
    assert found.bound == "compute"
    # Norms, rotary positions and activations, which the memory bounds, are the rest.
    assert least < found.roof_seconds < 1.1 * least


def test_what_cannot_be_priced_is_refused() -> None:
    with pytest.raises(InvalidValue, match="dtype 'int3' is unknown"):
        StepPredictor(llama(), GPU, "int3", "bf16", BLOCK)
    predictor = StepPredictor(llama(), GPU, "bf16", "bf16", BLOCK)
    with pytest.raises(InvalidValue, match="2 counts and 1 contexts"):
        predictor.forecast_sizes([1, 1], [4], 1)
    with pytest.raises(InvalidValue, match="0 counts"):
        predictor.forecast_sizes([], [], 0)


def test_what_the_torch_runner_runs_is_what_is_priced() -> None:
    """A mixed step on a CPU under a recorder: our own operations, in order, with the sizes that they are priced by."""
    config = FAMILIES["gemma2"]
    model = build_model(config, "fp32", "cpu").initialize()
    cache = KVCache.allocate(config, 12, BLOCK, torch.float32, "cpu")
    for tensor in (*cache.keys, *cache.values):
        assert tensor is not None
        tensor.zero_()
    runner = TorchRunner(model, cache, None, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
    parts = []
    for slot, (start, count, samples) in enumerate([(20, 1, True), (3, 1, True), (16, 9, True), (0, 30, False)]):
        one = Request(f"r{slot}", list(range(1, 41)), SamplingParams(temperature=0.0), 4)
        one.slot, one.admissions, one.blocks = slot, 1, [3 * slot, 3 * slot + 1]
        one.tokens = one.tokens[: start + count] if samples else one.tokens
        parts.append(Part(one, start, count, samples))
    step = Step(1, tuple(parts))
    with batch.use(step.facts()), Recorder(model) as recorder:
        runner.launch(step).result()
    own = {op.name for op in all_ops()}
    ran = [(r.name, tuple(int(n) for n in r.cost.size)) for r in recorder.trace().records if r.name in own]
    counts, contexts = [part.count for part in parts], [part.context for part in parts]
    priced = walked(config, counts, contexts, 3, GREEDY, "fp32", torch.float32)
    expected = [(r.name, tuple(int(n) for n in r.cost.size)) for r in priced.trace.records if r.name in own]
    assert ran == expected
