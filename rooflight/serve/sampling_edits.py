"""What changes logits before a draw: allowed tokens, min_tokens, logit_bias and penalties, in this order.

Legend: B rows  V vocabulary  M rows with a mask  W 32-bit words of a mask  P rows with penalties  S rows of the tables
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rooflight.serve.params import SamplingParams


@dataclass(slots=True)
class Row:
    """One row of logits to sample from.

    slot: the request's. tenancy: who holds the slot, told apart by id and admission. params: how to sample.
    prompt: how many of `tokens`, which the host knows so far, are the prompt's. index: which output token this is.
    ends: tokens that may not come before min_tokens. mask: allowed tokens as 32-bit words, lowest bit first (None:
    all), which the caller must leave as they are until `sample` has returned.
    """

    slot: int
    tenancy: tuple[str, int]
    params: SamplingParams
    tokens: Sequence[int]
    prompt: int
    index: int
    ends: frozenset[int]
    mask: np.ndarray | None = None


def without(mask_W: np.ndarray, tokens: frozenset[int]) -> np.ndarray:
    """A mask less these tokens; the mask as it is where nothing else is allowed."""
    left_W = mask_W.copy()
    for token in tokens:
        left_W.view(np.uint32)[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))
    return left_W if left_W.any() else mask_W


def apply_masks(logits_BV: Tensor, rows_M: Tensor, masks_MW: Tensor) -> None:
    """Make what masks do not allow −∞ in some rows; tokens past a mask's end are not allowed."""
    bytes_MX = masks_MW.view(torch.uint8).unsqueeze(-1)
    bits = torch.arange(8, dtype=torch.uint8, device=masks_MW.device)
    allowed_MV = ((bytes_MX >> bits) & 1).bool().flatten(1)[:, : logits_BV.shape[1]]
    masked_MV = logits_BV.index_select(0, rows_M)
    masked_MV[:, allowed_MV.shape[1] :] = -torch.inf
    masked_MV[:, : allowed_MV.shape[1]].masked_fill_(~allowed_MV, -torch.inf)
    logits_BV.index_copy_(0, rows_M, masked_MV)


class Penalties:
    """Which tokens stand in the prompt and how often each in the output, of the requests that penalties ask it of.

    Rows of the tables are made when the first request wants one (5 bytes a token of the vocabulary) and are kept for
    the next that does.
    """

    def __init__(self, vocab_size: int, device: torch.device, max_num_seqs: int):
        self._most = max_num_seqs
        self.in_prompt_SV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self.counts_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._free: list[int] = []
        # By slot: the tenancy that the row is of, the row, and how many tokens it has counted.
        self._held: dict[int, tuple[tuple[str, int], int, int]] = {}

    def release(self, slot: int) -> None:
        """The slot's request has gone."""
        if (held := self._held.pop(slot, None)) is not None:
            self._free.append(held[1])

    def collect(self, rows: Sequence[tuple[int, Row]]) -> dict[str, np.ndarray]:
        """What the device must learn for these rows, (position in the batch, row): arrays to upload for `apply`."""
        width = self.counts_SV.shape[1]
        places: list[int] = []
        cleared: list[int] = []
        prompt_at: list[np.ndarray] = []
        output_at: list[int] = []
        for _, row in rows:
            if len(row.tokens) - row.prompt != row.index:
                raise ValueError(
                    f"request {row.tenancy[0]}: penalties need its {row.index} output tokens and "
                    f"{len(row.tokens) - row.prompt} are known; do not schedule it ahead"
                )
            tenancy, place, counted = self._held.get(row.slot, (None, -1, 0))
            if tenancy != row.tenancy:
                self.release(row.slot)
                place, counted = self._take(), row.prompt
                cleared.append(place)
                prompt_at.append(np.asarray(row.tokens[: row.prompt], np.int64) + place * width)
            output_at.extend(place * width + token for token in row.tokens[counted:])
            self._held[row.slot] = (row.tenancy, place, len(row.tokens))
            places.append(place)
        factors = [
            (row.params.repetition_penalty, row.params.presence_penalty, row.params.frequency_penalty)
            for _, row in rows
        ]
        return {
            "penalty_rows": np.array([position for position, _ in rows], np.int64),
            "penalty_places": np.array(places, np.int64),
            "penalties": np.array(factors, np.float32).T.copy(),
            "cleared": np.array(cleared, np.int64),
            "prompt_at": np.concatenate([np.empty(0, np.int64), *prompt_at]),
            "output_at": np.array(output_at, np.int64),
        }

    def _take(self) -> int:
        if not self._free:
            before = self.counts_SV.shape[0]
            more = min(max(2 * before, 8), self._most) - before
            self._free = list(range(before + more - 1, before - 1, -1))
            self.in_prompt_SV, self.counts_SV = (
                torch.cat((table_SV, table_SV.new_zeros((more, table_SV.shape[1]))))
                for table_SV in (self.in_prompt_SV, self.counts_SV)
            )
        return self._free.pop()

    def apply(self, logits_BV: Tensor, there: dict[str, Tensor]) -> None:
        """Penalize in place: x / r where x > 0, else x · r, of standing tokens; then − p if in the output, − f · n."""
        if there["cleared"].numel():
            self.in_prompt_SV.index_fill_(0, there["cleared"], False)
            self.counts_SV.index_fill_(0, there["cleared"], 0)
            self.in_prompt_SV.view(-1).index_fill_(0, there["prompt_at"], True)
        output_at = there["output_at"]
        ones = torch.ones((), dtype=torch.int32, device=logits_BV.device).expand(output_at.shape)
        self.counts_SV.view(-1).scatter_add_(0, output_at, ones)
        rows_P, places_P = there["penalty_rows"], there["penalty_places"]
        repetition_P1, presence_P1, frequency_P1 = there["penalties"].unsqueeze(-1).unbind(0)
        counts_PV = self.counts_SV.index_select(0, places_P)
        in_output_PV = counts_PV > 0
        stands_PV = in_output_PV | self.in_prompt_SV.index_select(0, places_P)
        factor_PV = torch.where(stands_PV, repetition_P1, 1.0)
        x_PV = logits_BV.index_select(0, rows_P)
        x_PV = torch.where(x_PV > 0, x_PV / factor_PV, x_PV * factor_PV)
        x_PV -= frequency_P1 * counts_PV
        x_PV -= presence_P1 * in_output_PV
        logits_BV.index_copy_(0, rows_P, x_PV)


class Edits:
    """The changes of a step: `collect` on the host, and after one upload `apply` on the device."""

    def __init__(self, vocab_size: int, device: torch.device, max_num_seqs: int):
        self._vocab_size = vocab_size
        self.penalties = Penalties(vocab_size, device, max_num_seqs)

    def collect(self, rows: Sequence[tuple[int, Row]]) -> dict[str, np.ndarray]:
        """Arrays to upload for `apply`; empty where no row, (position in the batch, row), changes anything."""
        arrays: dict[str, np.ndarray] = {}
        masked: list[tuple[int, np.ndarray]] = []
        early_at: list[int] = []
        biased_at: list[int] = []
        biases: list[float] = []
        penalized: list[tuple[int, Row]] = []
        for position, row in rows:
            start = position * self._vocab_size
            early = row.ends if row.index < row.params.min_tokens else frozenset()
            if row.mask is not None:
                masked.append((position, without(row.mask, early) if early else row.mask))
            else:
                early_at.extend(start + token for token in early if token < self._vocab_size)
            biased_at.extend(start + token for token in row.params.logit_bias)
            biases.extend(row.params.logit_bias.values())
            if row.params.penalized:
                penalized.append((position, row))
        if masked:
            arrays["mask_rows"] = np.array([position for position, _ in masked], np.int64)
            arrays["masks"] = np.stack([mask for _, mask in masked])
        if early_at:
            arrays["early_at"] = np.array(early_at, np.int64)
        if biased_at:
            arrays["biased_at"], arrays["biases"] = np.array(biased_at, np.int64), np.array(biases, np.float32)
        if penalized:
            arrays |= self.penalties.collect(penalized)
        return arrays

    def apply(self, logits_BV: Tensor, there: dict[str, Tensor]) -> None:
        """Change contiguous fp32 logits in place as the uploaded arrays say."""
        if "masks" in there:
            apply_masks(logits_BV, there["mask_rows"], there["masks"])
        if "early_at" in there:
            logits_BV.view(-1).index_fill_(0, there["early_at"], -torch.inf)
        if "biased_at" in there:
            logits_BV.view(-1).index_add_(0, there["biased_at"], there["biases"])
        if "penalties" in there:
            self.penalties.apply(logits_BV, there)
