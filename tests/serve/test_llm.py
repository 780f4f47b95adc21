"""`LLM` on a checkpoint with a tokenizer: transformers, and texts cut by hand, say what must come out."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rooflight.errors import InvalidValue
from rooflight.serve.llm import LLM
from rooflight.serve.params import SamplingParams, Structured
from rooflight.serve.step import Pending, Step
from tests.serve.checkpoints import CONTEXT, VOCAB, WIDTH, checkpoint, text

SETTINGS: dict[str, Any] = {"device": "cpu", "num_blocks": 160, "block_size": 8, "on": "cloud-cpu"}
PROMPTS = [text(words, seed) for seed, words in enumerate((3, 1, 12, 7, 20, 5))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    made = LLM(str(directory), **SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ahead(directory: Path) -> Iterator[LLM]:
    made = LLM(str(directory), **SETTINGS, async_scheduling="on")
    yield made
    made.close()


def tokens(llm: LLM, *asked: Any) -> list[list[int]]:
    return [output.token_ids for result in llm.generate(*asked) for output in result.outputs]


def idle(llm: LLM) -> bool:
    """Whether nothing of earlier calls is left."""
    llm.engine.scheduler.check_idle()
    return not llm.engine.has_work and not llm.engine.scheduler.pool.used


@torch.no_grad()
def test_texts_in_and_out_equal_transformers(llm: LLM, directory: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
    results = llm.generate(PROMPTS, params)
    for prompt, result, vector in zip(PROMPTS, results, llm.embed(PROMPTS), strict=True):
        ids = tokenizer(prompt).input_ids
        asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
        whole = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **asked)[0].tolist()
        output = result.outputs[0]
        assert (result.prompt, result.prompt_token_ids) == (prompt, ids)
        assert output.token_ids == whole[len(ids) :]
        assert output.text == tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
        ran = model(torch.tensor([whole]), output_hidden_states=True)
        wanted = torch.log_softmax(ran.logits[0].double(), -1)[len(ids) - 1 : -1]
        assert output.logprobs is not None
        for one, row_V in zip(output.logprobs, wanted, strict=True):
            assert one.rank == 1
            best = row_V.topk(2)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert len(vector) == WIDTH
        assert vector == pytest.approx(ran.hidden_states[-1][0, len(ids) - 1].tolist(), abs=1e-4)


def test_prompts_and_params_one_or_many(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = tokens(llm, PROMPTS, GREEDY)
    assert tokens(llm, ids, GREEDY) == expected
    assert tokens(llm, [ids[0], PROMPTS[1]], GREEDY) == expected[:2]
    assert tokens(llm, PROMPTS[2], GREEDY) == tokens(llm, ids[2], GREEDY) == expected[2:3]
    each = [SamplingParams(temperature=0.0, max_tokens=3 + index) for index in range(len(PROMPTS))]
    assert tokens(llm, PROMPTS, each) == [whole[: 3 + index] for index, whole in enumerate(expected)]
    assert llm.generate(ids[0], GREEDY)[0].prompt is None
    assert llm.generate([], GREEDY) == [] == llm.embed([])
    assert len({result.request_id for result in llm.generate(PROMPTS, GREEDY)}) == len(PROMPTS)
    assert len(tokens(llm, PROMPTS[0])[0]) == 16  # the default of max_tokens
    assert all(result.finished for result in llm.generate(PROMPTS, GREEDY))


def test_several_completions_are_those_of_seeds_that_follow(llm: LLM, ahead: LLM) -> None:
    for engine in (llm, ahead):
        many = engine.generate(PROMPTS[:2], SamplingParams(n=3, seed=5, max_tokens=20))
        for prompt, result in zip(PROMPTS, many):
            assert [output.index for output in result.outputs] == [0, 1, 2]
            alone = [tokens(engine, prompt, SamplingParams(seed=5 + index, max_tokens=20))[0] for index in range(3)]
            assert [output.token_ids for output in result.outputs] == alone
            assert len({tuple(one) for one in alone}) == 3


def test_requests_without_a_seed_have_the_engines(directory: Path, llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    first, again, other = (LLM(str(directory), **SETTINGS, seed=seed) for seed in (1, 1, 2))
    found = tokens(first, PROMPTS, params)
    assert found == tokens(again, PROMPTS, params) != tokens(other, PROMPTS, params)
    assert found != tokens(first, PROMPTS, params)  # another call, other requests
    assert tokens(llm, [PROMPTS[0]] * 2, params)[0] != tokens(llm, [PROMPTS[0]] * 2, params)[1]


def test_a_stop_text_ends_where_it_would_in_the_whole_text(llm: LLM, ahead: LLM) -> None:
    base = SamplingParams(seed=3, max_tokens=60, ignore_eos=True)
    whole = [result.outputs[0] for result in llm.generate(PROMPTS, base)]
    tried = 0
    for place, prompt in enumerate(PROMPTS):
        full = whole[place].text
        for start in (3, 17, len(full) // 2):
            stops = (full[start : start + 3], full[start + 1 : start + 2], "never there")
            if any("\ufffd" in stop or not stop for stop in stops):
                continue
            # The first to be complete, of several the longest.
            ends = [(full.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in full]
            end, _, stop = min(ends)
            for engine in (llm, ahead):
                for keep in (False, True):
                    params = SamplingParams(
                        seed=3, max_tokens=60, ignore_eos=True, stop=stops, include_stop_str_in_output=keep
                    )
                    output = engine.generate(prompt, params)[0].outputs[0]
                    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
                    assert output.text == full[: end if keep else end - len(stop)]
                    assert output.token_ids == whole[place].token_ids[: len(output.token_ids)]
                    assert len(output.token_ids) < 60
            tried += 1
    assert tried > 6
    assert idle(llm) and idle(ahead)


def test_stop_tokens_and_the_least_number_of_tokens(llm: LLM) -> None:
    free = SamplingParams(seed=4, max_tokens=40, ignore_eos=True)
    ids = tokens(llm, PROMPTS[0], free)[0]
    stop = ids[20]
    first = ids.index(stop)
    output = llm.generate(PROMPTS[0], SamplingParams(seed=4, max_tokens=40, stop_token_ids=(stop,)))[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == ids[: first + 1]
    before = llm.generate(PROMPTS[0], replace(free, max_tokens=first))[0].outputs[0]
    assert first > 0 and output.text == before.text
    bounded = SamplingParams(seed=4, max_tokens=40, stop_token_ids=(stop,), min_tokens=30)
    output = llm.generate(PROMPTS[0], bounded)[0].outputs[0]
    assert len(output.token_ids) >= 30 and stop not in output.token_ids[:30]


def test_an_end_of_text_is_told_and_not_shown(llm: LLM) -> None:
    likely = {0: 100.0}
    base = SamplingParams(temperature=0.0, max_tokens=4, logit_bias=likely)
    each = [base, replace(base, skip_special_tokens=False), replace(base, ignore_eos=True)]
    ended, shown, free = (result.outputs[0] for result in llm.generate([PROMPTS[0]] * 3, each))
    assert (ended.finish_reason, ended.stop_reason, ended.token_ids, ended.text) == ("stop", None, [0], "")
    assert (shown.finish_reason, shown.text) == ("stop", "<|endoftext|>")
    assert (free.finish_reason, free.token_ids, free.text) == ("length", [0] * 4, "")


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}, "c": {"enum": ["red", "blue"]}},
    "required": ["n", "c"],
    "additionalProperties": False,
}
GRAMMAR = 'start: "[" NUMBER ("," NUMBER)* "]"\nNUMBER: /[0-9]{1,3}/'


def is_object(found: str) -> bool:
    value = json.loads(found)
    return set(value) == {"n", "c"} and 0 <= value["n"] <= 999 and value["c"] in ("red", "blue")


CONSTRAINTS: dict[str, tuple[Structured, Callable[[str], Any]]] = {
    "schema": (Structured("json_schema", json.dumps(SCHEMA)), is_object),
    "regex": (Structured("regex", r"(?:ab|c){2,4} [0-9]{3}"), re.compile(r"(?:ab|c){2,4} [0-9]{3}").fullmatch),
    "grammar": (Structured("grammar", GRAMMAR), re.compile(r"\[\d{1,3}(,\d{1,3})*\]").fullmatch),
}


def test_structured_output_in_company(llm: LLM, ahead: LLM) -> None:
    kinds = list(CONSTRAINTS.values()) * 3
    asked = [SamplingParams(seed=seed, max_tokens=150, structured=one) for seed, (one, _) in enumerate(kinds)]
    company = [SamplingParams(seed=9, max_tokens=20)] * 3
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(asked) + 3)]
    expected = tokens(llm, prompts[-3:], company)
    for engine in (llm, ahead):
        results = engine.generate(prompts, [*asked, *company])
        whole = [result.outputs[0] for result in results[: len(asked)]]
        ended = [
            check(output.text)
            for (_, check), output in zip(kinds, whole, strict=True)
            if output.finish_reason == "stop"
        ]
        assert all(ended) and len(ended) >= 6
        assert [result.outputs[0].token_ids for result in results[-3:]] == expected


BAD: dict[str, tuple[list[Any], str]] = {
    "a token outside": ([[[1, 2], [3, VOCAB]], GREEDY], f"token {VOCAB} is outside the vocabulary of {VOCAB}"),
    "a negative token": ([[[1, 2], [-1]], GREEDY], "token -1 is outside"),
    "an empty prompt": ([[[1], []], GREEDY], "an empty prompt"),
    "an empty text": ([["a", ""], GREEDY], "an empty prompt"),
    "too long": ([[[1], [1] * CONTEXT], GREEDY], f"{CONTEXT} tokens and 16 new ones exceed the longest context"),
    "params that do not match": ([["a", "b"], [GREEDY]], "1 sampling params were given for 2 prompts"),
    "a bad value": ([["a", "b"], [GREEDY, SamplingParams(top_p=2.0)]], "top_p 2.0"),
    "a stop token outside": ([["a"], SamplingParams(stop_token_ids=(VOCAB,))], f"names token {VOCAB}"),
    "a bad regex": ([["a"] * 2, [GREEDY, SamplingParams(structured=Structured("regex", "a("))]], "the regex"),
    "a bad schema": ([["a"], SamplingParams(structured=Structured("json_schema", "{"))], "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_before_anything_runs(name: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, words = BAD[name]
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("a step was run"))
    with pytest.raises(InvalidValue, match=re.escape(words)) as caught:
        llm.generate(*asked)
    assert "\n" not in str(caught.value)
    assert idle(llm)


def test_a_bad_prompt_to_embed_leaves_nothing_behind(llm: LLM) -> None:
    llm.generate(PROMPTS, GREEDY)
    cached = llm.engine.scheduler.pool.cached
    for bad in ([], [1] * (CONTEXT + 1), [VOCAB]):
        with pytest.raises(InvalidValue):
            llm.embed([[1, 2], bad])
        assert idle(llm)
    # Nor does it cost what is there.
    assert llm.engine.scheduler.pool.cached == cached > 0
    assert len(llm.embed([1, 2])) == 1


class Interrupted:
    """A runner that is interrupted at a step: before it, in its middle, or while its result is read."""

    def __init__(self, inner: Any, step: int, where: str):
        self._inner, self._left, self._where = inner, step, where

    def launch(self, step: Step) -> Pending:
        self._left -= 1
        if self._left:
            return self._inner.launch(step)
        if self._where == "middle":
            # Half of the layers have been run.
            block = self._inner._model.layers[1]
            handle = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            try:
                return self._inner.launch(step)
            finally:
                handle.remove()
        if self._where == "result":
            self._inner.launch(step)
            return self
        raise KeyboardInterrupt

    def result(self) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("mode", "step"), [("on", 1), ("off", 2), ("on", 7)])
@pytest.mark.parametrize("where", ["before", "middle", "result"])
def test_an_interrupted_call_leaves_nothing_behind(
    mode: str, step: int, where: str, llm: LLM, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither requests nor blocks, nor a prefix cache that knows blocks which no step has written."""
    expected = tokens(llm, PROMPTS, GREEDY)
    vectors = llm.embed(PROMPTS)
    engine = LLM(str(directory), **SETTINGS, max_num_batched_tokens=40, async_scheduling=mode)
    many = [*PROMPTS, *(text(30, seed) for seed in range(50, 60))]
    for call in (lambda: engine.generate(PROMPTS, GREEDY), lambda: engine.embed(many)):
        with monkeypatch.context() as patch:
            patch.setattr(engine.engine, "runner", Interrupted(engine.engine.runner, step, where))
            with pytest.raises(KeyboardInterrupt):
                call()
        assert not engine.engine.scheduler.unfinished
        assert tokens(engine, PROMPTS, GREEDY) == expected
        for mine, clean in zip(engine.embed(PROMPTS), vectors):
            assert mine == pytest.approx(clean, abs=1e-5)
        assert idle(engine)
    engine.close()


def test_the_prefix_cache_changes_no_token(llm: LLM) -> None:
    long = text(40, 77)
    first, second = (llm.generate(long, GREEDY)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.outputs[0].token_ids) == (0, first.outputs[0].token_ids)
    # All whole blocks but that of the last token, which is always computed.
    assert second.num_cached_tokens == (len(first.prompt_token_ids) - 1) // 8 * 8 > 0


def test_max_tokens_none_goes_on_to_the_longest_context(llm: LLM) -> None:
    output = llm.generate([5] * 20, SamplingParams(max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (CONTEXT - 20, "length")


def test_a_model_without_a_tokenizer_takes_ids(directory: Path) -> None:
    made = LLM(str(directory / "config.json"), **SETTINGS, load_format="dummy")
    assert made.tokenizer is None
    output = made.generate([1, 2], GREEDY)[0].outputs[0]
    assert (len(output.token_ids), output.text) == (16, "")
    for asked in ("text", [[1], "text"]):
        with pytest.raises(InvalidValue, match="no tokenizer; give prompts as token ids"):
            made.generate(asked, GREEDY)
    with pytest.raises(InvalidValue, match="needs a tokenizer, and the model has none"):
        made.generate([1], SamplingParams(structured=Structured("json")))
    # A tokenizer of another place.
    other = LLM(str(directory / "config.json"), **SETTINGS, load_format="dummy", tokenizer=str(directory))
    assert len(tokens(other, "text", GREEDY)[0]) == 16


def test_closing_frees_the_model(directory: Path) -> None:
    made = LLM(str(directory), **SETTINGS)
    made.generate(PROMPTS[0], GREEDY)
    model: Any = made.engine.runner._model  # type: ignore[attr-defined]
    weight = weakref.ref(model.embedding.weight)
    del model
    made.close()
    made.close()
    assert weight() is None


def test_steps_are_told(directory: Path) -> None:
    told: list[str] = []
    records = []
    made = LLM(str(directory), **SETTINGS, say=told.append, on_step=records.append)
    assert told[0].startswith("memory plan for model, fp32") and told[-1].startswith("loading weights")
    result = made.generate(PROMPTS[0], GREEDY)[0]
    assert sum(record.generated for record in records) == len(result.outputs[0].token_ids)
    assert sum(record.prefill_tokens for record in records) == len(result.prompt_token_ids)
    assert all(record.forecast is not None and record.forecast.seconds > 0 for record in records)
