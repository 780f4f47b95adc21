"""The model as it is, tried: its loss on held-out text, and text of its own."""

from __future__ import annotations

import torch

from rooflight.models.generate import generate
from rooflight.ops import batch as batches
from rooflight.train.feed import micro_batches
from rooflight.train.job import Job

TEMPERATURE = 0.8
PROMPT_TOKENS = 8


@torch.no_grad()
def held_out_loss(job: Job) -> tuple[float, int] | None:
    """Mean loss over the first held-out rows, and over how many tokens; None when nothing is held out."""
    if not job.dataset.held_out_rows:
        return None
    rows = job.dataset.held_out(job.settings.eval_rows)
    total = 0.0
    for micro in micro_batches(rows, 1, job.device):
        with batches.use(micro.facts):
            part = job.trainee.model(
                micro.tokens_T, micro.positions_T, micro.layout, micro.targets_T, target_count=max(rows.targets, 1)
            )
        total += float(part)
    return total, rows.targets


def sample_text(job: Job, step: int) -> str | None:
    """The prompt and what the model makes of it, another text after every step; None without a tokenizer."""
    settings = job.settings
    if job.tokenizer is None:
        return None
    prompt = job.tokenizer.encode(settings.sample_prompt) if settings.sample_prompt else _beginning(job)
    count = min(settings.sample_tokens, job.config.max_context - 1)
    new = generate(
        job.trainee.model,
        [prompt[-(job.config.max_context - count) :]],
        count,
        temperature=TEMPERATURE,
        seed=settings.seed + step,
    )[0]
    return job.tokenizer.decode(prompt + new)


def _beginning(job: Job) -> list[int]:
    """The first tokens of a held-out row, or of the first row."""
    dataset = job.dataset
    rows = dataset.held_out(1) if dataset.held_out_rows else dataset.rows(0, 1)
    return [int(token) for token in rows.tokens_BQ[0, : min(PROMPT_TOKENS, rows.lengths[0][0])]]
