"""The engine on a GPU against itself on a CPU: graphs, one step ahead, chunks and preemption change no token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from rooflight.serve.llm import LLM
from rooflight.serve.params import SamplingParams

pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {
    "dtype": "fp32", "load_format": "dummy", "num_blocks": 400, "max_num_seqs": 24, "max_num_batched_tokens": 160,
    "max_model_len": 200,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "one after the other": {"async_scheduling": "off"},
    "preempted": {"num_blocks": 40, "enable_prefix_caching": False},
    "small steps": {"max_num_batched_tokens": 33},
}


@pytest.fixture(autouse=True)
def exact() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def asked() -> tuple[list[list[int]], list[SamplingParams]]:
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(draw.randint(1, 120))] for _ in range(40)]
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=30, logprobs=2),
        SamplingParams(temperature=0.9, max_tokens=30, seed=5),
        SamplingParams(temperature=0.9, top_p=0.8, top_k=30, max_tokens=20, seed=6),
        SamplingParams(temperature=0.7, repetition_penalty=1.3, max_tokens=25, seed=7, min_tokens=5),
        SamplingParams(temperature=0.0, max_tokens=12),
    ]
    return prompts, [kinds[index % len(kinds)] for index in range(len(prompts))]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    prompts, params = asked()
    results = LLM("tiny", device="cpu", **SIZES).generate(prompts, params)
    return [result.outputs[0].token_ids for result in results]


@pytest.mark.parametrize("mode", list(MODES))
def test_a_gpu_gives_a_cpus_tokens(mode: str, wanted: list[list[int]]) -> None:
    prompts, params = asked()
    # Weights drawn on a GPU are others: the CPU's are carried over.
    source = LLM("tiny", device="cpu", **SIZES).engine.runner._model  # type: ignore[attr-defined]
    llm = LLM("tiny", device="cuda", **{**SIZES, **MODES[mode]})
    model = llm.engine.runner._model  # type: ignore[attr-defined]
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), source.parameters(), strict=True):
            ours.copy_(theirs)
    for _ in range(2):
        results = llm.generate(prompts, params)
        same = [result.outputs[0].token_ids == tokens for result, tokens in zip(results, wanted, strict=True)]
        # fp32 sums in another order may turn a near tie; all others are equal.
        assert sum(same) >= len(same) - 2
    llm.engine.scheduler.check_idle()
