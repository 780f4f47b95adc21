"""From engine outputs to completions: text and tokens, ends of every kind, and prompts that ask for several."""

from __future__ import annotations

import pytest

from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.outputs import Completion, CompletionOutput, Delta, RequestOutput, requests_for
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request, TokenLogprobs
from rooflight.serve.scheduler import Output, Scheduler
from tests.serve.scripted import ScriptedRunner, config, expected

BYTES = Tokenizer.bytes()
END = BYTES.eos_id


def told(text: str | list[int], reason: str | None = None, most: int = 1, **params: object) -> list[Delta]:
    """The news of a completion whose tokens are the bytes of `text`, until it says that it has ended."""
    ids = list(text.encode()) if isinstance(text, str) else text
    eos = frozenset({END})
    request = Request("a", [65], SamplingParams(**params), 1000, eos_ids=eos)  # type: ignore[arg-type]
    completion = Completion(0, request, BYTES)
    deltas = []
    for place in range(0, len(ids), most):
        some = ids[place : place + most]
        request.tokens += some
        last = place + most >= len(ids)
        logprobs = [TokenLogprobs(token, -0.5, 1) if request.params.logprobs is not None else None for token in some]
        request.finish_reason = reason if last else None
        deltas.append(completion.news(Output(request, some, logprobs, finish_reason=request.finish_reason)))
        assert completion.ended == (deltas[-1].finish_reason is not None)
        if completion.ended:
            break
    return deltas


def whole(deltas: list[Delta]) -> CompletionOutput:
    output = CompletionOutput(0)
    for delta in deltas:
        output.add(delta)
    return output


def test_text_and_tokens_add_up() -> None:
    text = "Grüße 😀!"
    output = whole(told(text, "length"))
    assert (output.text, output.token_ids) == (text, list(text.encode()))
    assert (output.finish_reason, output.stop_reason, output.logprobs) == ("length", None, None)


def test_the_end_of_text_is_a_token_but_no_text() -> None:
    output = whole(told([*b"Hi", END], "stop"))
    assert (output.text, output.token_ids, output.finish_reason) == ("Hi", [*b"Hi", END], "stop")
    shown = whole(told([*b"Hi", END], "stop", skip_special_tokens=False))
    assert shown.text == "Hi" + BYTES.eos_token
    # One that ends nothing, for there must be more tokens, is skipped as a special token only.
    output = whole(told([*b"H", END, *b"i"], "length", min_tokens=3))
    assert (output.text, output.finish_reason) == ("Hi", "length")


def test_a_stop_token_is_no_text_either() -> None:
    output = whole(told("Hi!", "stop", stop_token_ids=(ord("!"),)))
    assert (output.text, output.token_ids) == ("Hi", list(b"Hi!"))


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_stop_text_ends_a_completion_of_which_the_engine_knows_no_end(most: int) -> None:
    deltas = told("one, two, three", None, most, stop=("two", "three"))
    output = whole(deltas)
    assert (output.text, output.finish_reason, output.stop_reason) == ("one, ", "stop", "two")
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert bytes(output.token_ids).startswith(b"one, two")
    included = whole(told("one, two, three", None, most, stop=("two",), include_stop_str_in_output=True))
    assert included.text == "one, two"


def test_a_stop_text_in_the_last_token_wins_over_the_length() -> None:
    output = whole(told("abc", "length", stop=("c",)))
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "c")


def test_what_was_held_back_comes_with_the_end() -> None:
    deltas = told("ab<en", "length", stop=("<end>",))
    assert [delta.text for delta in deltas] == ["a", "b", "", "", "<en"]
    deltas = told([*b"ab<en", END], "stop", stop=("<end>",))
    assert "".join(delta.text for delta in deltas) == "ab<en"


def test_no_stop_text_ends_what_must_be_longer() -> None:
    for least, left in ((0, "a"), (1, "a"), (2, "a.b"), (4, "a.b.c"), (6, "a.b.c.d")):
        output = whole(told("a.b.c.d", "length", stop=(".",), min_tokens=least))
        # A stop text counts from the token after the least number, as the end of text does.
        assert output.text == left, least


def test_news_of_an_earlier_token_say_nothing_of_a_later_end() -> None:
    request = Request("a", [65], SamplingParams(stop_token_ids=(66,)), 9)
    completion = Completion(0, request, BYTES)
    # The engine's thread is further than the reader: it has ended the request already.
    request.tokens += [67, 66]
    request.finish_reason, request.stop_reason = "stop", 66
    first = completion.news(Output(request, [67], [None]))
    assert (first.text, first.finish_reason, first.stop_reason) == ("C", None, None)
    last = completion.news(Output(request, [66], [None], finish_reason="stop"))
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", 66)


def test_logprobs_where_they_were_asked_for() -> None:
    output = whole(told("abc", "length", logprobs=0))
    assert [one.token for one in output.logprobs or []] == list(b"abc")
    assert whole(told("abc", "length")).logprobs is None


def test_each_of_several_completions_is_a_request_with_a_seed_of_its_own() -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=5)
    made = requests_for("r", [1, 2, 3], params, 64, frozenset({9}), priority=2)
    assert [request.id for request in made] == ["r-0", "r-1", "r-2"]
    assert [request.params.seed for request in made] == [7, 8, 9]
    for request in made:
        assert (request.max_tokens, request.priority, request.ends) == (5, 2, {9})
        request.tokens.append(4)
    assert all(request.tokens == [1, 2, 3, 4] for request in made)
    (only,) = requests_for("r", [1, 2, 3], SamplingParams(max_tokens=None), 64, frozenset())
    assert (only.id, only.max_tokens, only.params.seed) == ("r", 61, None)
    assert [one.params.seed for one in requests_for("r", [1], SamplingParams(n=2), 64, frozenset())] == [None, None]


def test_several_completions_of_a_prompt_through_the_scheduler() -> None:
    sizes = config(max_num_batched_tokens=8)
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    prompt = list(range(10))
    params = SamplingParams(n=3, max_tokens=6, prompt_logprobs=0, logprobs=0)
    made = requests_for("r", prompt, params, 64, frozenset())
    result = RequestOutput("r", None, prompt, [CompletionOutput(index) for index in range(3)])
    completions = {}
    for index, request in enumerate(made):
        completions[request.id] = Completion(index, request, BYTES)
        scheduler.add(request, 0.0)
    while (step := scheduler.schedule(0.0)) is not None:
        assert not result.finished
        for output in scheduler.settle(step, runner.launch(step).result(), 0.0):
            result.add(completions[output.request.id].news(output))
    assert result.finished
    for output in result.outputs:
        assert output.token_ids == expected(made[0])[0] and output.finish_reason == "length"
        assert output.text == BYTES.decode(output.token_ids)
        assert [one.token for one in output.logprobs or []] == output.token_ids
    first, *others = result.prompt_logprobs or []
    assert first is None and [one.token for one in others if one is not None] == prompt[1:]
    assert result.num_cached_tokens == 0


def test_cached_tokens_are_those_of_the_prompt() -> None:
    sizes = config()
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    counts = []
    for name in ("a", "b"):
        (request,) = requests_for(name, list(range(10)), SamplingParams(max_tokens=2), 64, frozenset())
        completion = Completion(0, request, None)
        result = RequestOutput(name, None, list(range(10)), [CompletionOutput(0)])
        scheduler.add(request, 0.0)
        while (step := scheduler.schedule(0.0)) is not None:
            for output in scheduler.settle(step, runner.launch(step).result(), 0.0):
                result.add(completion.news(output))
        counts.append(result.num_cached_tokens)
        assert result.outputs[0].text == "" and len(result.outputs[0].token_ids) == 2
    assert counts == [0, 8]
