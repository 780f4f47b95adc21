"""Choosing the next token, for `bench ops`.

Legend: B rows  V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from rooflight.ops import sampling
from rooflight.workload.op_bench.case import Args, Draw, Operation

TEMPERATURE = 0.8


def _plain_inputs(draw: Draw, rows: int, vocabulary: int) -> Args:
    return draw(rows, vocabulary), torch.full((rows,), TEMPERATURE, device=draw.device), draw.uniform(rows)


def _drawn(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Place of the first cumulative mass above the draw."""
    upto_BV = mass_BV.cumsum(-1)
    found_B1 = torch.searchsorted(upto_BV, (uniform_B * upto_BV[:, -1]).unsqueeze(-1), right=True)
    return found_B1.clamp_(max=mass_BV.shape[-1] - 1)


def _in_vocabulary_order(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    return _drawn((logits_BV.double() / temperature_B.unsqueeze(-1)).softmax(-1), uniform_B).squeeze(-1)


def _filtered_inputs(draw: Draw, rows: int, vocabulary: int, top_k: int, top_p: float) -> Args:
    logits, temperature, uniform = _plain_inputs(draw, rows, vocabulary)
    top_k_B = torch.full((rows,), top_k, device=draw.device)
    top_p_B = torch.full((rows,), top_p, device=draw.device)
    # top_k is also the promise that no row wants more, 0 that there is none.
    return logits, temperature, top_k_B, top_p_B, torch.zeros_like(top_p_B), uniform, top_k


def _by_rank(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
    most: int,
) -> Tensor:
    ranked_BV, tokens_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    probs_BV = (ranked_BV / temperature_B.unsqueeze(-1)).softmax(-1)
    rank_V = torch.arange(probs_BV.shape[-1], device=probs_BV.device)
    probs_BV = probs_BV.masked_fill(probs_BV < min_p_B.unsqueeze(-1) * probs_BV[:, :1], 0.0)
    probs_BV = probs_BV.masked_fill((rank_V >= top_k_B.unsqueeze(-1)) & (top_k_B > 0).unsqueeze(-1), 0.0)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    enough_B1 = top_p_B.unsqueeze(-1) * probs_BV.sum(-1, keepdim=True)
    kept_BV = probs_BV.masked_fill((before_BV >= enough_B1) & (rank_V > 0), 0.0)
    return tokens_BV.gather(-1, _drawn(kept_BV, uniform_B)).squeeze(-1)


def _filtered_label(rows: int, vocabulary: int, top_k: int, top_p: float) -> str:
    filters = [f"top-k {top_k}"] * (top_k > 0) + [f"top-p {top_p:g}"] * (top_p < 1)
    return ", ".join([f"{rows}×{vocabulary}", *filters])


OPERATIONS = [
    Operation(
        "greedy",
        "the likeliest token",
        make=lambda draw, rows, vocabulary: (draw(rows, vocabulary),),
        ours=sampling.greedy,
        plain=lambda logits: logits.argmax(-1),
        label="{}×{}".format,
        tokens=True,
    ),
    Operation(
        "sample_plain",
        "a token drawn at a temperature",
        make=_plain_inputs,
        ours=sampling.sample_plain,
        plain=sampling.sample_plain.reference,
        reference=_in_vocabulary_order,
        label="{}×{}".format,
        compiles=False,
        plain_runs_here=True,
        tokens=True,
        wide=torch.float64,
    ),
    Operation(
        "sample",
        "a token drawn among what temperature, top-k, top-p and min-p leave",
        make=_filtered_inputs,
        ours=sampling.sample,
        plain=sampling.sample.reference,
        reference=_by_rank,
        label=_filtered_label,
        compiles=False,
        plain_runs_here=True,
        tokens=True,
        wide=torch.float64,
    ),
]
