"""/v1/completions by the official client: text, ids, lists, echo, log-probabilities, streams."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError

from tests.serve.api.conftest import Running, Starter
from tests.serve.api.fake_engine import SAYS, FakeEngine, logprob

RAW = SAYS.encode()


def test_a_text_gets_sixteen_tokens_and_its_usage(plain: Running) -> None:
    answer = plain.client().completions.create(model="fake", prompt="Hi", temperature=0)
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == SAYS[:16]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.model, answer.object) == ("fake", "text_completion")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 16, 18)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        ([97, 98, 99], [[97, 98, 99]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([[1, 2], [3], [4]], [[1, 2], [3], [4]]),
    ],
)
def test_each_kind_of_prompt_reaches_the_engine(plain: Running, prompt: Any, ids: list[list[int]]) -> None:
    plain.engine.seen.clear()
    answer = plain.client().completions.create(model="fake", prompt=prompt, max_tokens=3)
    assert sorted(seen[0] for seen in plain.engine.seen) == sorted(ids)
    assert [choice.index for choice in answer.choices] == list(range(len(ids)))
    assert {choice.text for choice in answer.choices} == {SAYS[:3]}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert answer.usage.completion_tokens == 3 * len(ids)


def test_choices_are_numbered_by_prompt_and_then_by_completion(start: Starter) -> None:
    server = start(FakeEngine(says=lambda ids, index: f"{bytes(ids).decode()}{index}"))
    answer = server.client().completions.create(model="fake", prompt=["a", "b"], n=3)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "a0"), (1, "a1"), (2, "a2"), (3, "b0"), (4, "b1"), (5, "b2"),
    ]  # fmt: skip
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    streamed = ["" for _ in range(6)]
    for chunk in server.client().completions.create(model="fake", prompt=["a", "b"], n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_every_field_reaches_the_sampler(plain: Running) -> None:
    plain.engine.seen.clear()
    plain.client().completions.create(
        model="fake", prompt="x", max_tokens=7, temperature=0.5, top_p=0.9, seed=11, stop=["zz", "yy"],
        presence_penalty=0.25, frequency_penalty=-0.5, logit_bias={"5": 2, "6": -1}, logprobs=3, user="me", n=2,
        extra_body={
            "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True, "min_tokens": 2, "priority": 9,
            "stop_token_ids": [3, 4], "include_stop_str_in_output": True, "skip_special_tokens": False,
            "prompt_logprobs": 1, "guided_regex": "a+", "best_of": 2,
        },
    )  # fmt: skip
    ((ids, params, name, priority),) = plain.engine.seen
    assert (ids, priority, name[:5]) == ([120], 9, "cmpl-")
    assert (params.n, params.max_tokens, params.min_tokens, params.seed) == (2, 7, 2, 11)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 4, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.25, -0.5, 1.5)
    assert (params.stop, params.stop_token_ids) == (("zz", "yy"), (3, 4))
    assert params.logit_bias == {5: 2.0, 6: -1.0}
    assert (params.logprobs, params.prompt_logprobs) == (3, 1)
    assert (params.ignore_eos, params.include_stop_str_in_output, params.skip_special_tokens) == (True, True, False)
    assert params.structured is not None
    assert (params.structured.kind, params.structured.text) == ("regex", "a+")


def test_the_models_defaults_hold_where_a_request_is_silent(start: Starter) -> None:
    server = start(FakeEngine(defaults={"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}))
    server.client().completions.create(model="fake", prompt="x", max_tokens=1)
    server.client().completions.create(model="fake", prompt="x", max_tokens=1, temperature=0, top_p=0.5)
    first, second = (seen[1] for seen in server.engine.seen)
    assert (first.temperature, first.top_k, first.top_p, first.repetition_penalty) == (0.6, 20, 0.95, 1.1)
    assert (second.temperature, second.top_k, second.top_p) == (0.0, 20, 0.5)


def test_a_stop_text_ends_the_output(plain: Running) -> None:
    answer = plain.client().completions.create(model="fake", prompt="x", max_tokens=50, stop="fox")
    assert answer.choices[0].text == "The quick brown "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra == {"stop_reason": "fox"}


def test_a_stream_is_the_whole_in_pieces_and_ends_with_usage(plain: Running) -> None:
    stream = plain.client().completions.create(
        model="fake", prompt=[1, 2, 3], max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == SAYS[:20]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 19 + ["length"]
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 20)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_in_every_chunk_counts_up_as_guidellm_reads_it(plain: Running) -> None:
    stream = plain.client().completions.create(
        model="fake", prompt="abc", max_tokens=5, stream=True, stop=None,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        extra_body={"ignore_eos": True, "max_completion_tokens": 5},
    )  # fmt: skip
    usages = [chunk.usage for chunk in stream]
    assert [usage.completion_tokens for usage in usages if usage] == [1, 2, 3, 4, 5, 5]


def test_what_vllm_bench_serve_sends(plain: Running) -> None:
    stream = plain.client().completions.create(
        model="fake", prompt=[5] * 12, temperature=0.0, max_tokens=9, logprobs=None, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True, "repetition_penalty": 1.0},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_a_prompt_as_lm_eval_asks(plain: Running, max_tokens: int, stream: bool) -> None:
    context, continuation = list(b"Paris is"), list(b" big")
    prompts = [context + continuation, [80, 97]]
    asked: dict[str, Any] = {
        "model": "fake", "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "seed": 1234,
        "echo": True,
    }  # fmt: skip
    if stream:
        found: dict[int, dict[str, Any]] = {}
        for chunk in plain.client().completions.create(**asked, stream=True):
            choice = chunk.choices[0]
            record = found.setdefault(choice.index, {"text": "", "tokens": [], "scores": [], "top": [], "offset": []})
            record["text"] += choice.text
            assert choice.logprobs is not None
            record["tokens"] += choice.logprobs.tokens
            record["scores"] += choice.logprobs.token_logprobs
            record["top"] += choice.logprobs.top_logprobs
            record["offset"] += choice.logprobs.text_offset
    else:
        answer = plain.client().completions.create(**asked)
        found = {
            choice.index: {
                "text": choice.text, "tokens": choice.logprobs.tokens, "scores": choice.logprobs.token_logprobs,
                "top": choice.logprobs.top_logprobs, "offset": choice.logprobs.text_offset,
            }
            for choice in answer.choices
            if choice.logprobs is not None
        }  # fmt: skip
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * max_tokens
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
    for index, ids in enumerate(prompts):
        sampled = list(RAW[:max_tokens])
        record = found[index]
        assert record["text"] == bytes(ids + sampled).decode()
        assert record["tokens"] == [chr(token) for token in ids + sampled]
        assert record["scores"] == [None, *(logprob(token) for token in ids[1:] + sampled)]
        assert record["top"] == [None, *({chr(token): logprob(token)} for token in ids[1:] + sampled)]
        assert record["offset"] == list(range(len(ids) + max_tokens))
    # lm-eval's own arithmetic over the answer.
    scores = found[0]["scores"][len(context) : len(context) + len(continuation)]
    assert math.isclose(sum(scores), sum(map(logprob, continuation)))


def test_echo_without_logprobs_and_with_many_completions(plain: Running) -> None:
    answer = plain.client().completions.create(model="fake", prompt="ab", max_tokens=3, echo=True, n=2)
    assert [choice.text for choice in answer.choices] == ["abThe"] * 2
    texts = ["", ""]
    scores: list[list[Any]] = [[], []]
    for chunk in plain.client().completions.create(
        model="fake", prompt="ab", max_tokens=3, echo=True, n=2, logprobs=0, stream=True
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        assert choice.logprobs is not None
        scores[choice.index] += choice.logprobs.token_logprobs or []
    assert texts == ["abThe"] * 2
    assert scores == [[None, *map(logprob, b"bThe")]] * 2


def test_tokens_of_half_characters_have_their_places(start: Starter) -> None:
    server = start(FakeEngine(says="é✓a"))
    answer = server.client().completions.create(model="fake", prompt="x", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "é✓a"
    assert logprobs is not None
    assert logprobs.tokens == ["�"] * 5 + ["a"]
    assert logprobs.text_offset == [0, 0, 1, 1, 1, 2]


def test_token_ids_and_prompt_logprobs_come_when_asked_for(plain: Running) -> None:
    answer = plain.client().completions.create(
        model="fake", prompt=[7, 8, 9], max_tokens=4, extra_body={"return_token_ids": True, "prompt_logprobs": 2}
    )
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert extra["token_ids"] == list(RAW[:4])
    assert extra["prompt_token_ids"] == [7, 8, 9]
    assert extra["prompt_logprobs"][0] is None
    assert extra["prompt_logprobs"][1] == {
        "8": {"logprob": logprob(8), "rank": 1, "decoded_token": "\x08"},
        "9": {"logprob": -5.0, "rank": 2, "decoded_token": "\t"},
    }


def test_cached_tokens_are_told(start: Starter) -> None:
    server = start(FakeEngine(cached=2))
    answer = server.client().completions.create(model="fake", prompt=[[1, 2, 3], [4, 5, 6]], max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_the_longest_prompt_sets_the_default_length(plain: Running) -> None:
    answer = plain.client().completions.create(model="fake", prompt=[1] * 508)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": [[1], []]}, "prompt", "at least one token"),
        ({"prompt": [1, "a"]}, "prompt", "list of token ids"),
        ({"prompt": [256]}, "prompt", "use 0 to 255"),
        ({"prompt": [-1]}, "prompt", "use 0 to 255"),
        ({"prompt": [10**30]}, "prompt", "use 0 to 255"),
        ({"prompt": [1] * 512}, "prompt", "context is 512"),
        ({"prompt": "x" * 200_000}, "prompt", "200000 characters"),
        ({"max_tokens": 512}, "max_tokens", "context is 512"),
        ({"max_tokens": -1}, "max_tokens", "0 or more"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 65}, "n", "allows 64"),
        ({"prompt": ["x"] * 257}, "prompt", "allows 256"),
        ({"temperature": -1}, "temperature", "0 (greedy) or more"),
        ({"top_p": 1.5}, "top_p", "at most 1"),
        ({"top_k": -2}, "top_k", "at least 1"),
        ({"logprobs": 21}, "logprobs", "allows 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "0 to 20"),
        ({"stop": ["a"] * 17}, "stop", "allows 16"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": 5}, "stop", "list of texts"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "use 0 to 255"),
        ({"logit_bias": {"9": 101}}, "logit_bias", "100"),
        ({"suffix": "end"}, "suffix", "suffix"),
        ({"best_of": 3}, "best_of", "best_of 3"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"seed": 2**70}, "seed", "64-bit"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens", "exceeds max_tokens"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "only one"),
        ({"guided_choice": []}, "guided_choice", "empty"),
        ({"guided_grammar": "x" * 70_000}, "guided_grammar", "64 KiB"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "streamed"),
    ],
)
def test_a_bad_field_is_one_line_that_names_it(plain: Running, fields: dict[str, Any], param: str, words: str) -> None:
    body = {"model": "fake", "prompt": "x", **fields}
    with pytest.raises(BadRequestError) as caught:
        plain.client().post("/completions", body=body, cast_to=object)
    error = caught.value
    assert error.param == param, error.message
    assert error.type == "invalid_request_error"
    assert isinstance(error.body, dict)
    assert words in error.body["message"]
    assert "\n" not in error.body["message"]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"guided_json": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"guided_json": '{"a": 1}'}, "json_schema", '{"a": 1}'),
        ({"guided_choice": ["a.b", "c|d\n"]}, "regex", r"(?:a\.b)|(?:c\|d" + "\n)"),
        ({"guided_grammar": "start: /a/"}, "grammar", "start: /a/"),
        ({"structured_outputs": {"regex": "x+"}}, "regex", "x+"),
        ({"structured_outputs": {"json": {"const": "é"}}}, "json_schema", '{"const": "é"}'),
        ({"structured_outputs": {"choice": ["a"]}}, "regex", "(?:a)"),
        ({"structured_outputs": {"grammar": "start: A"}}, "grammar", "start: A"),
        ({"structured_outputs": {"json_object": True}}, "json", ""),
        ({"response_format": {"type": "json_object"}}, "json", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}},
            "json_schema",
            '{"type": "array"}',
        ),
    ],
)
def test_structured_output_by_each_of_its_names(plain: Running, fields: dict[str, Any], kind: str, text: str) -> None:
    plain.engine.seen.clear()
    plain.client().completions.create(model="fake", prompt="x", max_tokens=1, extra_body=fields)
    structured = plain.engine.seen[0][1].structured
    assert structured is not None
    assert (structured.kind, structured.text) == (kind, text)


def test_without_a_tokenizer_ids_are_served_and_text_is_refused(start: Starter) -> None:
    server = start(FakeEngine(tokenizer=None))
    answer = server.client().completions.create(
        model="fake", prompt=[1, 2], max_tokens=3, logprobs=1, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].text == ""
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == [f"token_id:{token}" for token in RAW[:3]]
    with pytest.raises(BadRequestError, match="without a tokenizer"):
        server.client().completions.create(model="fake", prompt="text")


def test_the_async_client_streams_many_at_once(plain: Running) -> None:
    import asyncio

    async def work() -> list[str]:
        async with AsyncOpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0) as client:

            async def one(length: int) -> str:
                text = ""
                async for chunk in await client.completions.create(
                    model="fake", prompt="x", max_tokens=length, stream=True
                ):
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*(one(length) for length in range(1, 40)))

    assert asyncio.run(work()) == [SAYS[:length] for length in range(1, 40)]


def test_null_is_silence(plain: Running) -> None:
    names = (
        "n stream stream_options stop seed temperature top_p presence_penalty frequency_penalty logit_bias user "
        "response_format top_k min_p repetition_penalty ignore_eos min_tokens stop_token_ids prompt_logprobs "
        "include_stop_str_in_output skip_special_tokens max_tokens echo logprobs best_of suffix guided_json "
        "structured_outputs priority model return_token_ids unknown_field"
    )
    body = {"prompt": "x", **dict.fromkeys(names.split())}
    answer = plain.client().post("/completions", body=body, cast_to=object)
    assert json.loads(json.dumps(answer))["choices"][0]["text"] == SAYS[:16]
