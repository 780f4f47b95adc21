"""Datasets and arrival times: seeded, in range, valid ids; files with every kind of fault."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rooflight.errors import InvalidValue
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.bench.datasets import Vocabulary, load_traffic
from rooflight.serve.bench.settings import EndpointSettings, ServeBenchSettings, TrafficSettings
from rooflight.serve.bench.traffic import Arrival, Traffic, arrival_times, spread, warmups

VOCABULARY = Vocabulary(1000, (0, 7, 999))


def traffic(seed: int = 0, **given: object) -> Traffic:
    return load_traffic(TrafficSettings(**given).check(), seed, VOCABULARY, Tokenizer.bytes())  # type: ignore[arg-type]


def test_random_prompts_are_seeded_and_hold_no_special_token() -> None:
    given = {"num_prompts": 200, "random_input_len": "100:1024", "random_output_len": "5:9"}
    found = traffic(3, **given)
    assert found == traffic(3, **given) != traffic(4, **given)
    lengths = [len(each.prompt) for each in found.arrivals]
    assert min(lengths) >= 100 and max(lengths) <= 1024 and max(lengths) - min(lengths) > 700
    assert {each.output_len for each in found.arrivals} == {5, 6, 7, 8, 9}
    tokens = {token for each in found.arrivals for token in each.prompt}
    assert tokens <= set(range(1000)) - {0, 7, 999}
    assert len(tokens) == 997
    assert [each.index for each in found.arrivals] == list(range(200))


def test_a_ratio_widens_as_vllm_does() -> None:
    found = traffic(num_prompts=3000, random_input_len="10", random_output_len="3", random_range_ratio=0.25)
    # ⌊7.5⌋ … ⌈12.5⌉ and ⌊2.25⌋ … ⌈3.75⌉
    assert {len(each.prompt) for each in found.arrivals} == set(range(7, 14))
    assert {each.output_len for each in found.arrivals} == {2, 3, 4}


def test_lengths_are_drawn_in_vllms_order() -> None:
    found = traffic(11, num_prompts=50, random_input_len="64", random_output_len="32", random_range_ratio=0.5)
    generator = np.random.default_rng(11)
    assert [len(each.prompt) for each in found.arrivals] == generator.integers(32, 97, size=50).tolist()
    assert [each.output_len for each in found.arrivals] == generator.integers(16, 49, size=50).tolist()


def test_a_common_prefix() -> None:
    found = traffic(num_prompts=20, random_input_len="8", random_prefix_len=5)
    assert len({each.prompt[:5] for each in found.arrivals}) == 1
    assert len({each.prompt[5:] for each in found.arrivals}) == 20
    assert {len(each.prompt) for each in found.arrivals} == {13}
    assert len(traffic(num_prompts=1, input_len="0", random_prefix_len=5).arrivals[0].prompt) == 5


def test_input_len_and_output_len_stand_for_the_random_ones() -> None:
    found = traffic(num_prompts=2, input_len="17", output_len="3")
    assert [(len(each.prompt), each.output_len) for each in found.arrivals] == [(17, 3)] * 2


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 5.0])
def test_arrival_times(burstiness: float) -> None:
    times = arrival_times(20000, 40.0, burstiness, 1)
    assert times[-1] == pytest.approx(20000 / 40.0)
    gaps = np.diff([0.0, *times])
    assert (gaps >= 0).all()
    # A gamma distribution of shape k has a standard deviation of mean/√k.
    assert gaps.std() * 40.0 == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    assert times == arrival_times(20000, 40.0, burstiness, 1) != arrival_times(20000, 40.0, burstiness, 2)


def test_all_at_once_without_a_rate() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0] * 3
    found = spread(traffic(num_prompts=10), 2.0, 1.0, 0)
    assert [each.at for each in found.arrivals] == arrival_times(10, 2.0, 1.0, 0)


def test_warmups_share_no_prefix_with_the_run() -> None:
    arrivals = [Arrival(0, (1, 2, 3), 4, 1.5), Arrival(1, (5, 6), 7, 2.5)]
    assert warmups(arrivals, 3) == [
        Arrival(-1, (3, 2, 1), 4), Arrival(-2, (6, 5), 7), Arrival(-3, (3, 2, 1), 4)
    ]  # fmt: skip


def test_sharegpt(tmp_path: Path) -> None:
    talks = [
        {"conversations": [{"value": "question " * 3}, {"value": "answer " * 4}]},
        {"conversations": [{"value": "no"}, {"value": "too short a question"}]},
        {"conversations": [{"value": "short answer"}, {"value": "no"}]},
        {"conversations": [{"value": "alone"}]},
        {"conversations": [{"value": "long " * 300}, {"value": "a question beyond 1024 tokens"}]},
        {"conversations": [{"value": "long " * 200}, {"value": "a whole beyond 2048 tokens " * 50}]},
        {"id": "none"},
    ]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    found = traffic(dataset_name="sharegpt", dataset_path=str(path))
    assert [(bytes(each.prompt).decode(), each.output_len) for each in found.arrivals] == [("question " * 3, 28)]
    assert "1 usable" in found.notes[0]
    fixed = traffic(dataset_name="sharegpt", dataset_path=str(path), output_len="9")
    assert sorted(each.output_len for each in fixed.arrivals) == [9, 9, 9]
    path.write_text("{}")
    with pytest.raises(InvalidValue, match="holds no list"):
        traffic(dataset_name="sharegpt", dataset_path=str(path))


def lines(tmp_path: Path, *entries: object) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in entries) + "\n\n")
    return str(path)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    name = lines(
        tmp_path,
        {"prompt": "ab", "output_len": 3},
        {"prompt_token_ids": [5, 6, 7], "max_tokens": 4},
        {"prompt": [8, 9], "output_tokens": 2},
        {"input_len": 6, "output_len": 1},
    )
    found = traffic(dataset_name=name)
    assert [each.prompt for each in found.arrivals[:3]] == [(97, 98), (5, 6, 7), (8, 9)]
    assert len(found.arrivals[3].prompt) == 6 and not {0, 7, 999} & set(found.arrivals[3].prompt)
    assert [each.output_len for each in found.arrivals] == [3, 4, 2, 1]
    assert not found.timed
    assert {each.output_len for each in traffic(dataset_name=name, output_len="7").arrivals} == {7}
    assert len(traffic(dataset_name=name, num_prompts=2).arrivals) == 2
    # Without a tokenizer the text itself goes to the endpoint.
    plain = load_traffic(TrafficSettings(dataset_name=name, num_prompts=1), 0, Vocabulary(0), None)
    assert (plain.arrivals[0].prompt, plain.arrivals[0].text) == ((), "ab")


def test_a_trace_is_replayed_in_the_order_of_its_times(tmp_path: Path) -> None:
    entry = {"input_len": 4, "output_len": 1}
    name = lines(tmp_path, {**entry, "arrival": 2.5}, {**entry, "arrival": 0.5})
    found = traffic(dataset_name=name)
    assert [(each.index, each.at) for each in found.arrivals] == [(0, 0.5), (1, 2.5)]
    assert spread(found, 10.0, 1.0, 0) is found
    name = lines(tmp_path, {**entry, "timestamp": 1700000001.5}, {**entry, "timestamp": 1700000000})
    assert [each.at for each in traffic(dataset_name=name).arrivals] == [0.0, 1.5]
    name = lines(
        tmp_path, {**entry, "timestamp": "2024-05-10T00:00:01+00:00"}, {**entry, "timestamp": "2024-05-10T00:01:01Z"}
    )
    assert [each.at for each in traffic(dataset_name=name).arrivals] == [0.0, 60.0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ({"output_len": 1}, "no prompt"),
        ({"prompt": "a"}, "output_len is None"),
        ({"prompt": "a", "output_len": 0}, "output_len is 0"),
        ({"prompt_token_ids": [1, 1000], "output_len": 1}, "token 1000"),
        ({"prompt_token_ids": [1, "a"], "output_len": 1}, "no list of token ids"),
        ({"prompt_token_ids": [], "output_len": 1}, "no list of token ids"),
        ({"prompt": "a", "output_len": 1, "arrival": -1}, "arrival -1"),
        ({"prompt": "a", "output_len": 1, "timestamp": "noon"}, "'noon'"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: object, words: str) -> None:
    name = lines(tmp_path, {"prompt": "a", "output_len": 1}, line)
    with pytest.raises(InvalidValue, match="line 2") as error:
        traffic(dataset_name=name)
    assert words in str(error.value)


def test_faulty_files(tmp_path: Path) -> None:
    mixed = lines(tmp_path, {"prompt": "a", "output_len": 1, "arrival": 1}, {"prompt": "a", "output_len": 1})
    with pytest.raises(InvalidValue, match="some lines have an arrival"):
        traffic(dataset_name=mixed)
    with pytest.raises(InvalidValue, match="holds no request"):
        traffic(dataset_name=lines(tmp_path))
    with pytest.raises(InvalidValue, match="rendom"):
        traffic(dataset_name="rendom")
    with pytest.raises(InvalidValue, match="--tokenizer"):
        load_traffic(TrafficSettings(), 0, Vocabulary(0), None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"random_input_len": "ten"}, "--random-input-len 'ten'"),
        ({"random_input_len": "0"}, "at least 1"),
        ({"random_output_len": "9:5"}, "use 5:9"),
        ({"random_input_len": "5:9", "random_range_ratio": 0.5}, "range already"),
        ({"random_range_ratio": 1.0}, "less than 1"),
        ({"num_prompts": 0}, "at least 1"),
        ({"dataset_name": "sharegpt"}, "--dataset-path"),
        ({"dataset_path": "x.json"}, "--dataset-name x.json"),
        ({"request_rate": "0"}, "--request-rate '0'"),
        ({"request_rate": "fast"}, "--request-rate 'fast'"),
        ({"burstiness": 0.0}, "more than 0"),
        ({"percentile_metrics": "ttft,tbt"}, "'tbt'"),
        ({"metric_percentiles": "99,101"}, "'101'"),
        ({"goodput": ("ttft",)}, "'ttft'"),
        ({"goodput": ("itl:3",)}, "'itl:3'"),
        ({"goodput": ("tpot:-3",)}, "'tpot:-3'"),
    ],
)
def test_bad_settings(given: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidValue) as error:
        ServeBenchSettings(**given).check()  # type: ignore[arg-type]
    assert words in str(error.value)


def test_settings_as_numbers() -> None:
    found = ServeBenchSettings(
        request_rate="2.5",
        percentile_metrics="e2el, ttft",
        metric_percentiles="99,50",
        goodput=("ttft:200", "e2el:1500"),
    ).check()
    assert (found.rate, found.metrics, found.percentiles) == (2.5, ("ttft", "e2el"), (50.0, 99.0))
    assert found.limits == {"ttft": 0.2, "e2el": 1.5}


def test_addresses() -> None:
    assert EndpointSettings().check().url == ""
    assert EndpointSettings(base_url="http://a:1/v1/").check().url == "http://a:1"
    assert EndpointSettings(port=9).check().url == "http://127.0.0.1:9"
    assert EndpointSettings(host="there").check().url == "http://there:8000"
    for bad in (EndpointSettings(base_url="a:1"), EndpointSettings(base_url="http://a", port=1)):
        with pytest.raises(InvalidValue, match="--base-url"):
            bad.check()
