"""Generation over a paged KV cache: one prefill of ragged prompts, then a token a step for each.

Legend: T tokens of a step  B sequences  M blocks a sequence at most  V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.models.transformer import Transformer
from rooflight.ops import batch
from rooflight.ops.sampling import greedy, sample

Prefill = Literal["auto", "dense", "paged"]


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    block_size: int = 16,
    prefill: Prefill = "auto",
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """The `max_new_tokens` next tokens of each prompt, one after the other; prompts may differ in length.

    temperature: 0 takes the likeliest token each time; above, tokens are drawn, the same ones for the same seed.
    prefill: `dense` attends over the prompts as whole rows and needs them equally long, `paged` attends over the cache,
    `auto` takes the first where it can. Raises InvalidValue on an empty prompt, a token outside the vocabulary, and a
    context beyond the model's.
    """
    _check(model, prompt_ids, max_new_tokens)
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    lengths = [len(prompt) for prompt in prompt_ids]
    blocks = max(-(-(length + max_new_tokens) // block_size) for length in lengths)
    cache = KVCache.allocate(model.config, blocks * len(lengths), block_size, dtype, device)
    # Unwritten slots of a block are masked, but a mask times NaN is NaN.
    for tensor in (*cache.keys, *cache.values):
        if tensor is not None:
            tensor.zero_()
    table_BM = torch.arange(len(lengths) * blocks, device=device).view(len(lengths), blocks)
    dense = prefill == "dense" or (prefill == "auto" and len(set(lengths)) == 1)
    if prefill == "dense" and len(set(lengths)) > 1:
        raise InvalidValue(
            f"a dense prefill needs prompts of one length, not {sorted(set(lengths))}; use prefill='paged'"
        )
    pending = [list(prompt) for prompt in prompt_ids]
    contexts, out = [0] * len(lengths), [[] for _ in lengths]
    draws = torch.Generator().manual_seed(seed)
    for step in range(max_new_tokens):
        contexts = [context + len(new) for context, new in zip(contexts, pending, strict=True)]
        logits_BV = _step(model, cache, table_BM, pending, contexts, dense and step == 0)
        next_B = _draw(logits_BV, temperature, draws) if temperature else greedy(logits_BV)
        pending = [[token] for token in next_B.tolist()]
        for tokens, new in zip(out, pending, strict=True):
            tokens += new
    return out


def _step(
    model: Transformer,
    cache: KVCache,
    table_BM: Tensor,
    new: list[list[int]],
    contexts: list[int],
    dense: bool,
) -> Tensor:
    """Run the new tokens of each sequence, whose cache then holds `contexts` tokens; the logits after each."""
    device, block_size = table_BM.device, cache.keys[0].shape[1]
    lengths = [len(tokens) for tokens in new]
    starts = [0, *accumulate(lengths)]
    positions = [list(range(c - n, c)) for n, c in zip(lengths, contexts, strict=True)]
    tokens_T = torch.tensor([token for tokens in new for token in tokens], device=device)
    positions_T = torch.tensor([position for row in positions for position in row], device=device)
    rows_T = torch.repeat_interleave(torch.arange(len(new), device=device), torch.tensor(lengths, device=device))
    slots_T = table_BM[rows_T, positions_T // block_size] * block_size + positions_T % block_size
    paged = Paged(
        cache,
        table_BM,
        torch.tensor(contexts, device=device),
        torch.tensor(starts, device=device),
        slots_T,
        max(lengths),
    )
    layout = Layout((len(new), lengths[0]) if dense else None, paged)
    last_B = torch.tensor(starts[1:], device=device) - 1
    with batch.use(batch.Batch.of(lengths, contexts)):
        return model(tokens_T, positions_T, layout, select_B=last_B)


def _draw(logits_BV: Tensor, temperature: float, draws: torch.Generator) -> Tensor:
    rows, device = logits_BV.shape[0], logits_BV.device
    whole = torch.ones(rows, device=device)
    uniform_B = torch.rand(rows, generator=draws).to(device)
    none = torch.zeros(rows, device=device)
    return sample(logits_BV, whole * temperature, none.long(), whole, none, uniform_B)


def _check(model: Transformer, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = model.config
    if not prompt_ids or not all(prompt_ids):
        raise InvalidValue("an empty prompt cannot be continued; give at least one token for each sequence")
    if max_new_tokens < 1:
        raise InvalidValue(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for prompt in prompt_ids:
        if len(prompt) + max_new_tokens > config.max_context:
            raise InvalidValue(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{config.max_context}; shorten one of them"
            )
        outside = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if outside is not None:
            raise InvalidValue(
                f"token {outside} is outside the vocabulary of {config.vocab_size}; use 0 to {config.vocab_size - 1}"
            )
