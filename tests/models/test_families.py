"""Every family against transformers on small random checkpoints: logits, greedy tokens, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rooflight.models.config import LayerKind, ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.models.generate import generate
from rooflight.models.layout import Layout
from rooflight.models.transformer import Transformer
from rooflight.models.weights import load, load_pretrained, save
from tests.models.families import CASES, PROMPTS, VOCAB, checkpoint

NEW_TOKENS = 16


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, Transformer, Path]]:
    """transformers' model of a case, ours from its checkpoint, and the checkpoint; made once a case."""
    made: dict[str, tuple[PreTrainedModel, Transformer, Path]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Transformer, Path]:
        if name not in made:
            model, folder = checkpoint(name, tmp_path_factory.mktemp(name))
            made[name] = (model, load_pretrained(folder, dtype=torch.float32), folder)
        return made[name]

    return get


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def our_logits(model: Transformer, tokens_BQ: Tensor, attention: str = "flash") -> Tensor:
    sequences, queries = tokens_BQ.shape
    layout = Layout(dense=(sequences, queries), attention=attention)
    return model(tokens_BQ.flatten(), torch.arange(queries).repeat(sequences), layout).view(sequences, queries, -1)


@torch.no_grad()
def their_logits(model: PreTrainedModel, tokens_BQ: Tensor) -> Tensor:
    return model(tokens_BQ).logits


def their_tokens(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    continue_: Any = model.generate
    out = continue_(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal(name: str, loaded: Any) -> None:
    theirs, ours, _ = loaded(name)
    wanted = their_logits(theirs, tokens())
    # Logits that hardly vary would agree whatever the model did.
    assert wanted.std() > 0.3
    for attention in ("flash", "naive"):
        torch.testing.assert_close(our_logits(ours, tokens(), attention), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal(name: str, loaded: Any) -> None:
    theirs, ours, _ = loaded(name)
    wanted = [their_tokens(theirs, prompt) for prompt in PROMPTS]
    assert generate(ours, PROMPTS, NEW_TOKENS) == wanted
    # A dense prefill attends over the prompt and not over the cache, but must leave the same cache behind.
    assert generate(ours, PROMPTS[:1], NEW_TOKENS, prefill="dense") == wanted[:1]


@pytest.mark.parametrize("name", CASES)
def test_saved_checkpoint_loads_in_transformers(name: str, loaded: Any, tmp_path: Path) -> None:
    theirs, ours, _ = loaded(name)
    files = save(ours, tmp_path, max_shard_bytes=20_000)
    assert len(files) > 1
    options: Any = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True}
    loading: Any = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    back, report = loading
    assert not any(report.values()), report
    assert torch.equal(their_logits(back, tokens()), their_logits(theirs, tokens()))


@pytest.mark.parametrize("name", CASES)
def test_parameter_count_equals(name: str, loaded: Any) -> None:
    theirs, ours, _ = loaded(name)
    assert parameter_counts(ours.config)["total"] == sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def no_windows(config: ModelConfig) -> ModelConfig:
    return each_layer(config, lambda kind: replace(kind, window=0))


def plain_ropes(config: ModelConfig) -> ModelConfig:
    def plain(kind: LayerKind) -> LayerKind:
        return kind if kind.rope is None else replace(kind, rope=replace(kind.rope, kind="default"))

    return each_layer(config, plain)


def each_layer(config: ModelConfig, change: Callable[[LayerKind], LayerKind]) -> ModelConfig:
    return replace(config, layers=tuple(change(kind) for kind in config.layers))


def moe(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, moe=replace(config.moe, **changes) if config.moe else None)


def setting(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, **changes)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", no_windows),
        ("qwen2", no_windows),
        ("gemma2", no_windows),
        ("gemma3", no_windows),
        ("phi3", no_windows),
        ("gpt_oss", no_windows),
        ("mixtral", no_windows),
        ("llama3", plain_ropes),
        ("llama-biased", plain_ropes),
        ("llama-yarn", plain_ropes),
        ("gemma3", plain_ropes),
        ("phi3-longrope", plain_ropes),
        ("gpt_oss", plain_ropes),
        ("deepseek_v2", plain_ropes),
        ("deepseek_v3", plain_ropes),
        ("phi3-longrope", setting(max_context=6)),
        ("gpt2", setting(norm_eps=0.1)),
        ("gpt2", setting(activation="relu")),
        ("gemma2", setting(attention_softcap=0.0)),
        ("gemma2", setting(logits_softcap=0.0)),
        ("gemma2", setting(attention_scale=None)),
        ("gemma2", setting(norm_offset=0.0)),
        ("gemma3", setting(embedding_scale=1.0)),
        ("gpt_oss", moe(scoring="softmax", normalize=False)),
        ("mixtral", moe(normalize=False)),
        ("qwen3_moe-sparse-step", moe(normalize=True)),
        ("deepseek_v2", moe(groups=1, top_groups=1)),
        ("deepseek_v2", moe(scale=1.0)),
        ("deepseek_v3", moe(group_score="max")),
        ("deepseek_v3", moe(normalize=False)),
    ],
)
def test_every_setting_shows_in_the_logits(
    name: str, change: Callable[[ModelConfig], ModelConfig], loaded: Any
) -> None:
    """The agreement above means something only if a setting that is read wrongly breaks it."""
    _, ours, folder = loaded(name)
    changed = change(ours.config)
    assert changed != ours.config
    other = load(Transformer(changed), folder, "cpu", torch.float32)
    assert (our_logits(other, tokens()) - our_logits(ours, tokens())).abs().max() > 1e-3


def test_longrope_takes_its_short_factors_within_the_original_context(loaded: Any) -> None:
    """transformers chooses by the sequence at hand, we by the context that the model is set up for, as vLLM does."""
    theirs, ours, folder = loaded("phi3-longrope")
    short = load(Transformer(replace(ours.config, max_context=6)), folder, "cpu", torch.float32)
    first = tokens()[:, :6]
    torch.testing.assert_close(our_logits(short, first), their_logits(theirs, first), atol=1e-4, rtol=0)
    assert (our_logits(ours, first) - their_logits(theirs, first)).abs().max() > 1e-3
