"""`Metrics` against a brute-force count of the same run, read back by Prometheus' own parsers."""

from __future__ import annotations

import sys
import threading
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

from rooflight.serve.clock import VirtualClock
from rooflight.serve.engine import Engine
from rooflight.serve.metrics import Metrics, Occupancy
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.scheduler import Scheduler, SchedulerConfig
from rooflight.serve.series import one_two_five
from rooflight.serve.step import Result, Step
from tests.serve.records import end, give_token, play, request, step_record

OWN = {"model_name": "tiny", "engine": "0"}
REQUEST_HISTOGRAMS = "prompt_tokens generation_tokens params_max_tokens queue_time_seconds prefill_time_seconds"
REQUEST_HISTOGRAMS += " decode_time_seconds inference_time_seconds time_per_output_token_seconds params_n"


def samples(metrics: Metrics) -> list:
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return [sample for family in parse_text(body.decode()) for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [sample.value for sample in samples(metrics) if sample.name == name and sample.labels == {**OWN, **labels}]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return found[0]


def check_histogram(metrics: Metrics, name: str, expected: list[float]) -> None:
    every = samples(metrics)
    buckets = {sample.labels["le"]: sample.value for sample in every if sample.name == f"{name}_bucket"}
    assert buckets, name
    for edge, count in buckets.items():
        assert count == sum(entry <= float(edge) for entry in expected), f"{name} le={edge}"
    assert value(metrics, f"{name}_count") == len(expected)
    assert value(metrics, f"{name}_sum") == pytest.approx(sum(expected))


def gaps_of(told) -> list[float]:
    return [after - before for times in told.token_times.values() for before, after in pairwise(times)]


@pytest.fixture(scope="module")
def run():
    metrics = Metrics("tiny", CollectorRegistry(), max_model_len=2000)
    return metrics, play(metrics.observe, seed=3)


def test_the_script_has_every_case(run):
    _, told = run
    assert {reason for reason, _ in told.ends.values()} == {"stop", "length", "abort"}
    assert any(
        len(times) == 1 and told.ends.get(name, ("",))[0] == "length" for name, times in told.token_times.items()
    )
    assert any(not times and name in told.ends for name, times in told.token_times.items())
    assert max(gaps_of(told)) > 1.4, "some request was left out of a step"
    assert any(record.forecast is None for record in told.records)


def test_counters_add_up(run):
    metrics, told = run
    records, by_name = told.records, {one.id: one for one in told.requests}
    expected = {
        "vllm:num_preemptions_total": sum(record.preempted for record in records),
        "vllm:generation_tokens_total": sum(len(times) for times in told.token_times.values()),
        "vllm:prompt_tokens_total": sum(len(by_name[name].prompt) for name, times in told.token_times.items() if times),
        "vllm:prefix_cache_queries_total": sum(record.queried_tokens for record in records),
        "vllm:prefix_cache_hits_total": sum(record.cached_tokens for record in records),
        "rooflight:prefill_tokens_total": sum(record.prefill_tokens for record in records),
        "rooflight:step_measured_seconds_total": sum(record.seconds for record in records if record.forecast),
        "rooflight:step_predicted_seconds_total": sum(r.forecast.seconds for r in records if r.forecast),
        "rooflight:step_roof_seconds_total": sum(r.forecast.roof_seconds for r in records if r.forecast),
    }
    for name, total in expected.items():
        assert value(metrics, name) == pytest.approx(total), name
    for reason in ("stop", "length", "abort", "error"):
        count = sum(why == reason for why, _ in told.ends.values())
        assert value(metrics, "vllm:request_success_total", finished_reason=reason) == count


def test_step_and_token_histograms(run):
    metrics, told = run
    check_histogram(metrics, "vllm:iteration_tokens_total", [record.tokens for record in told.records])
    check_histogram(metrics, "rooflight:step_seconds", [record.seconds for record in told.records])
    waits = [times[0] - one.times.arrival for one in told.requests if (times := told.token_times[one.id])]
    check_histogram(metrics, "vllm:time_to_first_token_seconds", waits)
    for name in ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"):
        check_histogram(metrics, name, gaps_of(told))


def test_request_histograms_leave_broken_off_requests_out(run):
    metrics, told = run
    expected: dict[str, list[float]] = {name: [] for name in REQUEST_HISTOGRAMS.split()}
    whole = []
    for one in told.requests:
        reason, ended = told.ends.get(one.id, ("", 0.0))
        if reason not in ("stop", "length"):
            continue
        times, scheduled = told.token_times[one.id], one.times.scheduled or 0.0
        expected["prompt_tokens"].append(len(one.prompt))
        expected["generation_tokens"].append(len(times))
        expected["params_max_tokens"].append(one.max_tokens)
        expected["params_n"].append(1)
        expected["queue_time_seconds"].append(scheduled - one.times.arrival)
        expected["prefill_time_seconds"].append(times[0] - scheduled)
        expected["decode_time_seconds"].append(times[-1] - times[0])
        expected["inference_time_seconds"].append(times[-1] - scheduled)
        if len(times) > 1:
            expected["time_per_output_token_seconds"].append((times[-1] - times[0]) / (len(times) - 1))
        whole.append(ended - one.times.arrival)
    for name, values in expected.items():
        check_histogram(metrics, f"vllm:request_{name}", values)
    check_histogram(metrics, "vllm:e2e_request_latency_seconds", whole)


def test_gauges_are_of_the_last_step_without_a_source(run):
    metrics, told = run
    last = told.records[-1]
    assert value(metrics, "vllm:num_requests_running") == last.running
    assert value(metrics, "vllm:num_requests_waiting") == last.waiting
    for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
        assert value(metrics, name) == pytest.approx(last.used_blocks / 100)


def test_gauges_ask_their_source():
    stands = [Occupancy(3, 2, 5, 20)]
    metrics = Metrics("tiny", CollectorRegistry(), occupancy=lambda: stands[0])
    metrics.observe(step_record(1, 0.0, 1.0, running=9, waiting=9, used_blocks=9, total_blocks=9))
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    stands[0] = Occupancy()
    assert value(metrics, "vllm:num_requests_running") == 0
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0


def test_every_name_stands_before_the_first_step():
    metrics = Metrics("tiny", CollectorRegistry(), cache_config={"block_size": 16, "cache_dtype": "auto"})
    every = samples(metrics)
    names = {sample.name for sample in every}
    for name in ("request_prompt_tokens_bucket", "num_preemptions_total", "e2e_request_latency_seconds_count"):
        assert f"vllm:{name}" in names
    config = next(sample for sample in every if sample.name == "vllm:cache_config_info")
    assert (config.labels, config.value) == ({"block_size": "16", "cache_dtype": "auto", "engine": "0"}, 1)
    assert all(sample.value == 0 for sample in every if sample is not config)


def test_an_embedding_counts_its_prompt_and_no_token():
    metrics = Metrics("tiny", CollectorRegistry())
    one = request("e", 40, embed=True)
    one.times.scheduled = 0.5
    end(one, "stop", 2.0)
    metrics.observe(step_record(1, 0.5, 2.0, tokens=40, prefill_tokens=40, finished=(one,)))
    assert value(metrics, "vllm:prompt_tokens_total") == 40
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 0
    check_histogram(metrics, "vllm:e2e_request_latency_seconds", [2.0])
    check_histogram(metrics, "vllm:request_decode_time_seconds", [])


def test_open_metrics_when_asked_for():
    metrics = Metrics("tiny")
    play(metrics.observe, steps=50)
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name for family in parse_open(body.decode())}
    assert {"vllm:generation_tokens", "vllm:iteration_tokens_total", "process_resident_memory_bytes"} <= families


def test_odd_model_names_are_escaped():
    metrics = Metrics('a "quoted"\\name\n', CollectorRegistry())
    assert {sample.labels["model_name"] for sample in samples(metrics)} == {'a "quoted"\\name\n'}


def test_a_reading_never_sees_half_a_step():
    metrics, one = Metrics("tiny", CollectorRegistry()), request("a", 4, max_tokens=10**6)
    give_token(one, 0.0)
    metrics.observe(step_record(0, 0.0, 0.0, generated=1, first=(one,)))
    done = threading.Event()

    def steps() -> None:
        for number in range(1, 4000):
            give_token(one, float(number))
            metrics.observe(step_record(number, number - 1.0, float(number), generated=1))
        done.set()

    thread = threading.Thread(target=steps)
    thread.start()
    readings = 0
    while not done.is_set() or not readings:
        found = {sample.name: sample.value for sample in samples(metrics)}
        generated, gaps = found["vllm:generation_tokens_total"], found["vllm:inter_token_latency_seconds_count"]
        assert (generated, gaps) == (gaps + 1, found["vllm:inter_token_latency_seconds_sum"])
        readings += 1
    thread.join()
    assert value(metrics, "vllm:generation_tokens_total") == 4000


def test_what_has_ended_is_let_go():
    metrics, one = Metrics("tiny", CollectorRegistry()), request("a", 4)
    held = sys.getrefcount(one)
    give_token(one, 1.0)
    metrics.observe(step_record(1, 0.0, 1.0, first=(one,)))
    assert sys.getrefcount(one) > held
    end(one, "abort", 2.0)
    metrics.observe(step_record(2, 1.0, 2.0, finished=(one,)))
    assert sys.getrefcount(one) == held


def test_buckets_of_lengths():
    assert one_two_five(1) == [1]
    assert one_two_five(100) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five(4999) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]


class OneSecondRunner:
    """Takes a second a step and answers token 5."""

    def __init__(self, clock: VirtualClock):
        self.clock = clock

    def launch(self, step: Step):
        return _Taken(self.clock, step)

    def close(self) -> None:
        pass


class _Taken:
    def __init__(self, clock: VirtualClock, step: Step):
        self.clock, self.step = clock, step

    def result(self) -> Result:
        self.clock.move_to(self.clock.now() + 1.0)
        return Result([5] * self.step.samples, seconds=1.0)


@pytest.mark.parametrize("blocks", [64, 9])
def test_a_real_engine_with_and_without_preemptions(blocks: int):
    clock, metrics = VirtualClock(), Metrics("tiny", CollectorRegistry())
    config = SchedulerConfig(8, 64, 128, 4, blocks, enable_prefix_caching=False)
    engine = Engine(Scheduler(config), OneSecondRunner(clock), clock, on_step=metrics.observe)
    requests = [Request(str(index), [index + 2] * 6, SamplingParams(), 10 + index) for index in range(4)]
    for one in requests:
        engine.add(one)
    while engine.has_work:
        engine.step()
    preemptions = value(metrics, "vllm:num_preemptions_total")
    assert preemptions == sum(one.preemptions for one in requests)
    assert (preemptions > 0) == (blocks == 9)
    assert value(metrics, "vllm:generation_tokens_total") == 10 + 11 + 12 + 13
    assert value(metrics, "vllm:prompt_tokens_total") == 24
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 4
    # A request's gaps add up to the time from its first token to its last, whatever happened between.
    spans = [(one.times.last_token or 0.0) - (one.times.first_token or 0.0) for one in requests]
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == pytest.approx(sum(spans))
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 9 + 10 + 11 + 12
    assert value(metrics, "vllm:num_requests_running") == 0
    assert value(metrics, "rooflight:step_seconds_sum") == pytest.approx(clock.now())
