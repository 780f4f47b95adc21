"""`Sampler`: the next token of every row of a step, chosen on the device without waiting for it.

Order, as in vLLM: log-probabilities of the raw logits are told; then allowed tokens, min_tokens, logit_bias,
penalties, temperature, min_p, top_k, top_p, the draw.

Legend: B rows  V vocabulary  L rows that ask for log-probabilities  G rows of one kind
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rooflight.ops import sampling
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import TokenLogprobs
from rooflight.serve.sampling_edits import Edits, Row
from rooflight.serve.sampling_logprobs import Logprobs
from rooflight.serve.sampling_random import seed_of, uniforms
from rooflight.serve.sampling_upload import Download, upload
from rooflight.serve.step import Part

# How a row is drawn. It depends on the row alone, so that company never changes a token.
_GREEDY, _PLAIN, _FEW, _SORTED = range(4)
# Up to this top_k the likeliest are selected, on a CPU; beyond it and without one that sorts the whole vocabulary.
_MOST_SELECTED = 1024


def row_of(part: Part, mask: np.ndarray | None = None) -> Row:
    """The row of a part that samples; mask: the tokens that its structured output allows next."""
    request = part.request
    prompt = len(request.prompt)
    tenancy = (request.id, request.admissions)
    # A part that samples ends where its output begins or goes on, whatever has been scheduled since.
    return Row(request.slot, tenancy, request.params, request.tokens, prompt, part.context - prompt, request.ends, mask)


class Sampled:
    """A step's choice: tokens_B (int64) and slots_B on the device, and on its way to the host.

    slots_B: where the tokens are yet to be kept for the next step; None where they are.
    asked: positions of the rows that `logprobs` tells of. The copy begins when this is made, so that it does not wait
    for a step that is queued after.
    """

    def __init__(
        self,
        tokens_B: Tensor,
        slots_B: Tensor | None = None,
        asked: Sequence[int] = (),
        logprobs: Logprobs | None = None,
    ):
        self.tokens_B, self.slots_B = tokens_B, slots_B
        self._asked, self._logprobs = asked, logprobs
        self._download = Download([tokens_B, *(logprobs.tensors if logprobs is not None else ())])

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Tokens, and beside each its log-probabilities or None; no list of them where no row asked. Waits."""
        tokens_B, *more = self._download.wait()
        tokens = tokens_B.tolist()
        if self._logprobs is None:
            return tokens, []
        told: list[TokenLogprobs | None] = [None] * len(tokens)
        for position, record in zip(self._asked, self._logprobs.records(*more), strict=True):
            told[position] = record
        return tokens, told


class Sampler:
    """Samples for requests in slots 0 to max_num_seqs − 1; a slot's settings are read once a tenancy.

    seed: the engine's, from which requests without one of their own have theirs.
    """

    def __init__(self, vocab_size: int, device: torch.device | str, max_num_seqs: int, seed: int = 0):
        self.vocab_size, self.device, self._engine_seed = vocab_size, torch.device(device), seed
        self._tenants: list[tuple[str, int] | None] = [None] * max_num_seqs
        # By slot, as 64-bit words: temperature, top_p and min_p as fp64, then top_k.
        self._settings = np.zeros((4, max_num_seqs), np.int64)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._kinds = np.zeros(max_num_seqs, np.int8)
        self._special = np.zeros(max_num_seqs, np.bool_)
        self._edits = Edits(vocab_size, self.device, max_num_seqs)

    def sample(self, logits_BV: Tensor, rows: Sequence[Row]) -> Sampled:
        """A token a row of logits_BV, which stay as they are; returns before a GPU is through.

        Raises ValueError where rows are not those of the logits, and where penalties lack tokens of the output.
        """
        if logits_BV.shape != (len(rows), self.vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits_BV.shape)} for {len(rows)} rows × {self.vocab_size} tokens"
            )
        for row in rows:
            if self._tenants[row.slot] != row.tenancy:
                self._admit(row)
        slots_B = np.array([row.slot for row in rows], np.int64)
        kinds_B = self._kinds[slots_B]
        special = [
            (position, row)
            for position, (row, is_special) in enumerate(zip(rows, self._special[slots_B].tolist(), strict=True))
            if is_special or row.mask is not None
        ]
        asking = [(position, row) for position, row in special if row.params.logprobs is not None]
        arrays = self._edits.collect(special)
        edited = bool(arrays)
        arrays["slots"] = slots_B
        groups = self._groups(kinds_B)
        arrays |= {f"group {number}": positions for number, (_, positions) in enumerate(groups) if len(groups) > 1}
        if asking:
            arrays["asked"] = np.array([position for position, _ in asking], np.int64)
        if any(kind != _GREEDY for kind, _ in groups):
            words = np.empty((5, len(rows)), np.int64)
            words[:4] = self._settings[:, slots_B]
            indices_B = np.array([row.index for row in rows], np.uint64)
            words.view(np.float64)[4] = uniforms(self._seeds[slots_B], indices_B)
            arrays["words"] = words
        there = upload(arrays, self.device)

        chosen_BV = logits_BV
        if edited:
            chosen_BV = logits_BV.to(torch.float32, copy=True).contiguous()
            self._edits.apply(chosen_BV, there)
        tokens_B = self._draw(chosen_BV, groups, there, slots_B)
        if not asking:
            return Sampled(tokens_B, there["slots"])
        raw_LV = logits_BV.index_select(0, there["asked"])
        tops = [row.params.logprobs or 0 for _, row in asking]
        logprobs = Logprobs(raw_LV, tokens_B.index_select(0, there["asked"]), tops)
        return Sampled(tokens_B, there["slots"], [position for position, _ in asking], logprobs)

    def draws(self, rows: Sequence[Row]) -> np.ndarray | None:
        """Temperatures and draws [2, B] for `sample_plain`, where that is all that the rows need; else None."""
        for row in rows:
            if self._tenants[row.slot] != row.tenancy:
                self._admit(row)
        slots_B = np.array([row.slot for row in rows], np.int64)
        if self._special[slots_B].any() or (self._kinds[slots_B] > _PLAIN).any():
            return None
        if any(row.mask is not None for row in rows):
            return None
        indices_B = np.array([row.index for row in rows], np.uint64)
        temperatures_B = self._settings.view(np.float64)[0, slots_B]
        return np.stack((temperatures_B, uniforms(self._seeds[slots_B], indices_B)))

    def _admit(self, row: Row) -> None:
        params, slot = row.params, row.slot
        self._tenants[slot] = row.tenancy
        self._edits.penalties.release(slot)
        self._settings.view(np.float64)[:3, slot] = params.temperature, params.top_p, params.min_p
        top_k = params.top_k if 0 < params.top_k < self.vocab_size and not params.greedy else 0
        self._settings[3, slot] = top_k
        seed = seed_of(self._engine_seed, row.tenancy[0]) if params.seed is None else params.seed
        self._seeds[slot] = np.uint64(seed % 2**64)
        self._kinds[slot] = _kind(params, top_k)
        self._special[slot] = (
            params.penalized or bool(params.logit_bias) or params.min_tokens > 0 or params.logprobs is not None
        )

    @staticmethod
    def _groups(kinds_B: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Rows that are drawn together, (kind, positions); greedy ones, which any kind serves, go with the cheapest."""
        kinds = [kind for kind in range(4) if (kinds_B == kind).any()]
        if kinds[:1] == [_GREEDY] and len(kinds) > 1:
            kinds_B = np.where(kinds_B == _GREEDY, kinds[1], kinds_B)
            kinds = kinds[1:]
        return [(kind, np.flatnonzero(kinds_B == kind)) for kind in kinds]

    def _draw(
        self, logits_BV: Tensor, groups: list[tuple[int, np.ndarray]], there: dict[str, Tensor], slots_B: np.ndarray
    ) -> Tensor:
        if "words" not in there:
            return sampling.greedy(logits_BV)
        if len(groups) == 1:
            return self._draw_group(groups[0][0], logits_BV, there["words"], slots_B)
        tokens_B = torch.empty(logits_BV.shape[0], dtype=torch.int64, device=logits_BV.device)
        for number, (kind, positions) in enumerate(groups):
            rows_G = there[f"group {number}"]
            words = there["words"].index_select(1, rows_G)
            tokens_G = self._draw_group(kind, logits_BV.index_select(0, rows_G), words, slots_B[positions])
            tokens_B.index_copy_(0, rows_G, tokens_G)
        return tokens_B

    def _draw_group(self, kind: int, logits_GV: Tensor, words: Tensor, slots_G: np.ndarray) -> Tensor:
        temperature_G, top_p_G, min_p_G, _, uniform_G = words.view(torch.float64).unbind(0)
        if kind == _PLAIN:
            return sampling.sample_plain(logits_GV, temperature_G, uniform_G)
        most = int(self._settings[3, slots_G].max()) if kind == _FEW else 0
        return sampling.sample(logits_GV, temperature_G, words[3], top_p_G, min_p_G, uniform_G, most)


def _kind(params: SamplingParams, top_k: int) -> int:
    if params.greedy:
        return _GREEDY
    if 0 < top_k <= _MOST_SELECTED:
        return _FEW
    return _SORTED if top_k or params.top_p < 1.0 or params.min_p > 0.0 else _PLAIN
