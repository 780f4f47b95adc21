"""The engine against transformers, token by token and logprob by logprob, for every family and in every mode."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rooflight.serve.llm import LLM
from rooflight.serve.outputs import requests_for
from rooflight.serve.params import SamplingParams
from tests.models.families import CASES, VOCAB, checkpoint

NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, logprobs=3)
FAMILIES = list(CASES)
# A few stand for all where a mode takes long: plain, windows with softcap, latent attention, experts with sinks.
SOME = ["llama3", "gemma2", "deepseek_v3", "gpt_oss"]


def prompts(count: int, longest: int = 60, seed: int = 1) -> list[list[int]]:
    """Prompts of many lengths; every third begins like the one before it, so that the prefix cache has work."""
    draw = random.Random(seed)
    found: list[list[int]] = []
    for index in range(count):
        own = [draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))]
        shared = found[-1][: draw.randint(1, len(found[-1]))] if index % 3 == 2 else []
        found.append((shared + own)[:longest])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@cache
def made(name: str, folder: Path) -> tuple[Any, str]:
    model, path = checkpoint(name, folder / name)
    return model, str(path)


@torch.no_grad()
def alone(model: Any, prompt: list[int], new: int = NEW) -> tuple[list[int], list[float]]:
    """transformers' greedy continuation, the whole sequence anew for each token, and each token's logprob."""
    tokens, logprobs = list(prompt), []
    for _ in range(new):
        last = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), -1)
        tokens.append(int(last.argmax()))
        logprobs.append(float(last[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


def engine(path: str, **settings: Any) -> LLM:
    """An engine of small blocks and steps, so that little traffic fills and cuts them."""
    base: dict[str, Any] = {
        "dtype": "fp32", "device": "cpu", "block_size": 8, "num_blocks": 200, "max_num_seqs": 64,
        "max_num_batched_tokens": 256, "max_model_len": 100,
    }  # fmt: skip
    return LLM(path, **{**base, **settings})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_crowd_of_64_equals_transformers(name: str, folder: Path) -> None:
    model, path = made(name, folder)
    llm = engine(path)
    asked = prompts(64)
    results = llm.generate(asked, GREEDY)
    for place in (0, 1, 2, 17, 40, 63):
        tokens, logprobs = alone(model, asked[place])
        output = results[place].outputs[0]
        assert output.token_ids == tokens
        assert output.logprobs is not None
        assert [one.logprob for one in output.logprobs] == pytest.approx(logprobs, abs=1e-4)
        assert all(one.rank == 1 and one.top[0][0] == one.token and len(one.top) == 3 for one in output.logprobs)


MODES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1},
    "without prefix cache": {"enable_prefix_caching": False},
    "chunks of 5 tokens": {"max_num_batched_tokens": 5},
    "no chunks": {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
    "preempted": {"num_blocks": 24, "enable_prefix_caching": False},
    "preempted, prefix cache": {"num_blocks": 24},
    "one step ahead": {"async_scheduling": "on"},
    "one step ahead, preempted": {"async_scheduling": "on", "num_blocks": 24},
    "blocks of 32 tokens": {"block_size": 32, "num_blocks": 80},
}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", SOME)
def test_every_mode_gives_the_same_tokens(name: str, mode: str, folder: Path) -> None:
    model, path = made(name, folder)
    asked = prompts(24, seed=5)
    preempted: list[int] = []
    llm = engine(path, **MODES[mode])
    llm.engine.on_step = lambda record: preempted.append(record.preempted)
    results = llm.generate(asked, GREEDY)
    # A second time: what the first left in the cache is taken up.
    again = llm.generate(asked, GREEDY)
    if "preempted" in mode:
        assert sum(preempted)
    if llm.settings.enable_prefix_caching:
        assert sum(result.num_cached_tokens for result in again)
    assert [result.outputs[0].token_ids for result in again] == [result.outputs[0].token_ids for result in results]
    for place in (0, 5, 23):
        assert results[place].outputs[0].token_ids == alone(model, asked[place])[0]


@pytest.mark.parametrize("ahead", ["on", "off"])
def test_cancelled_neighbours_change_nothing(folder: Path, ahead: str) -> None:
    model, path = made("llama3", folder)
    llm = engine(path, async_scheduling=ahead, num_blocks=60)
    asked = prompts(24, seed=9)
    requests = [requests_for(f"r{index}", prompt, GREEDY, 100, frozenset())[0] for index, prompt in enumerate(asked)]
    for request in requests:
        llm.engine.add(request)
    draw = random.Random(3)
    victims = set(range(0, 24, 3))
    left = sorted(victims)
    while llm.engine.has_work:
        llm.engine.step()
        if left and draw.random() < 0.7:
            llm.engine.cancel(f"r{left.pop()}")
    for index, request in enumerate(requests):
        if index not in victims:
            assert request.tokens[len(request.prompt) :] == alone(model, asked[index])[0]
    llm.engine.scheduler.check_idle()


@torch.no_grad()
def test_prompt_logprobs_and_embeddings(folder: Path) -> None:
    model, path = made("llama3", folder)
    asked = prompts(6, seed=11)
    llm = engine(path, max_num_batched_tokens=16)
    results = llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2))
    vectors = llm.embed(asked)
    for prompt, result, vector in zip(asked, results, vectors, strict=True):
        ran = model(torch.tensor([prompt]), output_hidden_states=True)
        wanted = torch.log_softmax(ran.logits[0].double(), -1)
        assert result.prompt_logprobs is not None
        assert len(result.prompt_logprobs) == len(prompt) and result.prompt_logprobs[0] is None
        for place in range(1, len(prompt)):
            one = result.prompt_logprobs[place]
            assert one is not None and one.token == prompt[place]
            row = wanted[place - 1]
            assert one.logprob == pytest.approx(float(row[prompt[place]]), abs=1e-4)
            assert one.rank == int((row > row[prompt[place]]).sum()) + 1
            assert one.top[0][0] == int(row.argmax()) and len(one.top) == 2
        assert vector == pytest.approx(ran.hidden_states[-1][0, -1].tolist(), abs=1e-4)


def test_a_seed_gives_the_same_tokens_in_any_company(folder: Path) -> None:
    _, path = made("llama3", folder)
    llm = engine(path)
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_tokens=20, seed=7)
    asked = prompts(20, seed=2)
    lonely = llm.generate([asked[4]], params)[0].outputs[0].token_ids
    crowd = llm.generate(asked, [params if place == 4 else SamplingParams(max_tokens=20) for place in range(20)])
    assert crowd[4].outputs[0].token_ids == lonely
    assert len(set(lonely)) > 3
    assert llm.generate([asked[4]], SamplingParams(max_tokens=20, seed=8))[0].outputs[0].token_ids != lonely
