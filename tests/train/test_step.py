"""A training step against plain PyTorch and transformers: loss, every gradient and every weight, over 20 steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rooflight.models.layout import Layout
from rooflight.models.naming import pieces, tensors
from rooflight.models.transformer import Transformer
from rooflight.models.weights import load_pretrained
from rooflight.ops.batch import Batch
from rooflight.workload.optimizers import Update, learning_rate
from rooflight.workload.program import make_trainee
from rooflight.workload.training import MicroBatch, Recipe, Trainee
from tests.models.families import VOCAB, checkpoint

ROWS, LENGTH, STEPS, IGNORED = 4, 24, 20, -100
UPDATE = Update(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def rows(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of one step; some targets are ignored, more in some rows than in others."""
    generator = torch.Generator().manual_seed(step)
    tokens_BQ = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    targets_BQ = tokens_BQ.roll(-1, dims=1)
    targets_BQ[:, -1] = IGNORED
    targets_BQ[0, : LENGTH // 2] = IGNORED
    return tokens_BQ, targets_BQ


def micro_batches(step: int, count: int) -> tuple[list[MicroBatch], int]:
    tokens_BQ, targets_BQ = rows(step)
    size = ROWS // count
    found = []
    for start in range(0, ROWS, size):
        part = slice(start, start + size)
        found.append(
            MicroBatch(
                tokens_BQ[part].flatten(),
                targets_BQ[part].flatten(),
                torch.arange(LENGTH).repeat(size),
                Layout((size, LENGTH)),
                Batch.uniform(size, LENGTH, LENGTH),
            )
        )
    return found, int((targets_BQ != IGNORED).sum())


def trainee_of(model: Transformer, recipe: Recipe) -> Trainee:
    found = make_trainee(model, recipe, "adamw", tuple(1 for _ in model.config.layers))
    found.optimizer.allocate()
    return found


def their_step(model: Any, optimizer: torch.optim.Optimizer, step: int, clip: float) -> tuple[Tensor, Tensor]:
    """Loss and norm of a plain step, the loss over all targets of the batch."""
    tokens_BQ, targets_BQ = rows(step)
    logits_BQV = model(tokens_BQ).logits.float()
    loss = torch.nn.functional.cross_entropy(logits_BQV.flatten(0, 1), targets_BQ.flatten(), ignore_index=IGNORED)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach(), norm


@pytest.mark.parametrize(("name", "count"), [("llama3", 1), ("qwen3", 2), ("gemma2", 4)])
def test_twenty_steps_equal_plain_pytorch(name: str, count: int, tmp_path: Path) -> None:
    theirs, folder = checkpoint(name, tmp_path)
    theirs.train()
    ours = trainee_of(load_pretrained(folder, dtype=torch.float32), Recipe(clip=0.5, update=UPDATE))
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
    )
    their_parameters = dict(theirs.named_parameters())
    by_name = {p.name: p for p in pieces(ours.model.config, tensors(ours.model)) if p.name in their_parameters}
    assert by_name.keys() == their_parameters.keys()
    for step in range(STEPS):
        lr = 1e-3 * (step + 1) / STEPS
        learning_rate(ours.optimizer, lr)
        learning_rate(optimizer, lr)
        found: dict[str, Tensor] = {}

        def keep(factor: Tensor | None, found: dict[str, Tensor] = found) -> bool:
            assert factor is not None
            found["factor"] = factor.clone()
            for key, p in tensors(ours.model).items():
                if isinstance(p, torch.nn.Parameter) and p.grad is not None:
                    found[key] = p.grad.clone()
            return True

        micros, targets = micro_batches(step, count)
        outcome = ours.step(micros, targets=targets if count > 1 else 0, before_update=keep)
        loss, norm = their_step(theirs, optimizer, step, 0.5)
        torch.testing.assert_close(outcome.loss, loss, atol=1e-5, rtol=0)
        assert outcome.norm is not None
        torch.testing.assert_close(outcome.norm, norm, atol=1e-5, rtol=1e-5)
        for key, piece in by_name.items():
            wanted = their_parameters[key].grad
            assert wanted is not None
            mine = piece.view(found[piece.ours]) * found["factor"]
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
        optimizer.zero_grad()
    weights = tensors(ours.model)
    for key, piece in by_name.items():
        torch.testing.assert_close(piece.view(weights[piece.ours]), their_parameters[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("recompute", ["selective", "full", frozenset({"attention", "gated_activation"})])
def test_recomputation_changes_no_bit(recompute: Any, tmp_path: Path) -> None:
    _, folder = checkpoint("llama3", tmp_path)
    recipe = Recipe(clip=1.0, update=UPDATE)
    runs = []
    for how in ("none", recompute):
        trainee = trainee_of(load_pretrained(folder, dtype=torch.float32), replace(recipe, recompute=how))
        losses = []
        for step in range(3):
            micros, targets = micro_batches(step, 2)
            losses.append(trainee.step(micros, targets=targets).loss)
        runs.append((losses, dict(trainee.model.named_parameters())))
    (plain_losses, plain), (losses, weights) = runs
    assert all(torch.equal(a, b) for a, b in zip(plain_losses, losses, strict=True))
    assert all(torch.equal(plain[name], weights[name]) for name in plain)


@pytest.mark.parametrize("masters", [True, False])
def test_fp32_gradients_add_up_in_fp32(masters: bool, tmp_path: Path) -> None:
    """In bf16 weights, many micro-batches: fp32 accumulation lies nearer to the fp32 gradient than bf16's does."""
    _, folder = checkpoint("llama3", tmp_path)
    reference = trainee_of(load_pretrained(folder, dtype=torch.bfloat16).float(), Recipe(clip=0.0, update=UPDATE))
    update = replace(UPDATE, masters=masters)
    errors = []
    for fp32 in (True, False):
        trainee = trainee_of(
            load_pretrained(folder, dtype=torch.bfloat16), Recipe(clip=0.0, update=update, fp32_gradients=fp32)
        )
        # Four micro-batches, the same one many times over: the sum grows past what bf16 resolves.
        micros, targets = micro_batches(0, 4)
        trainee.gradients(micros * 16, targets * 16)
        reference.gradients(micros * 16, targets * 16)
        total, scale = 0.0, 0.0
        for mine, wanted in zip(trainee.trained, reference.trained, strict=True):
            gradient = trainee.gradient(mine)
            assert gradient is not None and wanted.grad is not None
            assert gradient.dtype == (torch.float32 if fp32 else torch.bfloat16)
            total += float((gradient.float() - wanted.grad).square().sum())
            scale += float(wanted.grad.square().sum())
            wanted.grad = None
        errors.append((total / scale) ** 0.5)
    assert errors[0] < errors[1]
    assert errors[0] < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, tmp_path: Path) -> None:
    _, folder = checkpoint("llama3", tmp_path)
    trainee = trainee_of(load_pretrained(folder, dtype=torch.float32), Recipe(clip=1.0, update=UPDATE))
    micros, _ = micro_batches(0, 1)
    trainee.step(micros)
    with torch.no_grad():
        trainee.model.norm.norm.weight[0] = bad
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    states = {
        p: {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for p, s in trainee.optimizer.state.items()
    }
    outcome = trainee.step(micros)
    assert outcome.factor is not None and not torch.isfinite(outcome.factor)
    for name, p in trainee.model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name
    for p, state in states.items():
        for key, value in state.items():
            assert torch.equal(trainee.optimizer.state[p][key], value)


def test_muon_trains_and_keeps_masters(tmp_path: Path) -> None:
    _, folder = checkpoint("llama3", tmp_path)
    update = Update("muon", lr=2e-3, masters=True)
    trainee = trainee_of(load_pretrained(folder, dtype=torch.bfloat16), Recipe(clip=1.0, update=update))
    micros, targets = micro_batches(0, 2)
    losses = [float(trainee.step(micros, targets=targets).loss) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    for p, state in trainee.optimizer.state.items():
        if "master" in state:
            assert torch.equal(state["master"].to(p.dtype), p)
