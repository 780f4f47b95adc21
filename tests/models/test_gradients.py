"""Gradients of a training step against transformers', and recomputation against keeping."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rooflight.models.layout import Layout
from rooflight.models.recompute import Recompute
from rooflight.models.transformer import Transformer
from rooflight.models.weights import load_pretrained
from rooflight.ops.op import find
from tests.models.families import VOCAB, checkpoint

ROWS, LENGTH = 2, 24
IGNORED = -100


def batch() -> Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(11))


def step(
    model: Transformer, tokens_BQ: Tensor, recompute: Recompute, attention: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of predicting each next token, and the gradient of every parameter."""
    targets_BQ = torch.cat((tokens_BQ[:, 1:], torch.full((ROWS, 1), IGNORED)), dim=1)
    positions_T = torch.arange(LENGTH).repeat(ROWS)
    layout = Layout(dense=(ROWS, LENGTH), attention=attention)
    model.zero_grad()
    loss = model(tokens_BQ.flatten(), positions_T, layout, targets_BQ.flatten(), recompute=recompute)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("attention", ["flash", "naive"])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3_moe", "gpt_oss", "deepseek_v2", "gpt2"])
def test_gradients_equal(name: str, attention: str, tmp_path: Path) -> None:
    theirs, folder = checkpoint(name, tmp_path / "weights")
    ours = load_pretrained(folder, dtype=torch.float32)
    loss = theirs(batch(), labels=batch()).loss
    loss.backward()
    our_loss, gradients = step(ours, batch(), "none", attention)
    torch.testing.assert_close(our_loss, loss.detach(), atol=1e-5, rtol=0)
    # Their gradients take the way that their weights take: saved under their names and read under ours.
    with torch.no_grad():
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = dict(load_pretrained(tmp_path / "gradients", dtype=torch.float32).named_parameters())
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[key].detach(), atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("attention", ["flash", "naive"])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3_moe"])
def test_recomputation_changes_no_bit(name: str, attention: str, tmp_path: Path) -> None:
    model = load_pretrained(checkpoint(name, tmp_path)[1], dtype=torch.float32)
    loss, kept = step(model, batch(), "none", attention)
    for recompute in ("selective", "full"):
        again, recomputed = step(model, batch(), recompute, attention)
        assert torch.equal(loss, again)
        for key, gradient in kept.items():
            assert torch.equal(gradient, recomputed[key]), f"{recompute}: {key}"


class Calls(TorchDispatchMode):
    """Counts calls of our operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = find(func)
        if op is not None:
            self.counts[op.name] += 1
        return func(*args, **(kwargs or {}))


def test_recomputation_runs_again_what_it_threw_away(tmp_path: Path) -> None:
    model = load_pretrained(checkpoint("llama3", tmp_path)[1], dtype=torch.float32)
    counts: dict[str, Counter[str]] = {}
    for recompute in ("none", "selective", "full"):
        with Calls() as calls:
            step(model, batch(), recompute, "flash")
        counts[recompute] = calls.counts
    layers = len(model.config.layers)
    assert counts["none"]["linear"] == 4 * layers
    assert counts["none"]["gated_activation"] == layers
    # Matrix multiplies are kept by selective recomputation and cheap operations are not; full keeps neither.
    assert counts["selective"]["linear"] == 4 * layers
    assert counts["selective"]["gated_activation"] == 2 * layers
    assert counts["full"]["gated_activation"] == 2 * layers
    assert counts["full"]["linear"] > 4 * layers
