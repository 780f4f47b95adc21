"""What a step's model run is fed: tokens, positions, cache slots and block tables, sent to the device in one copy.

Legend: T new tokens  B parts of the step  S slots, a spare one for padding included  M blocks a sequence at most
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.serve.step import Part, Step

UNKNOWN = -1  # in place of a token that only the device knows yet
_RING = 3  # steps whose copies may be under way at once: one running, one waiting, one being written


@dataclass(slots=True)
class Fed:
    """One step's inputs on the device, and where in the hidden states each part's last token stands."""

    tokens_T: Tensor
    positions_T: Tensor
    layout: Layout
    last_B: Tensor
    starts_B1: NDArray[np.int32]


class Inputs:
    """Keeps every slot's block table on the device, and sends what a step adds.

    cache: holds one block more than the scheduler knows: tokens of padding rows are written there.
    last_S: the last token sampled in each slot, which a step that runs ahead of the host reads.
    """

    def __init__(self, cache: KVCache, slots: int, max_tokens: int, max_model_len: int, device: torch.device):
        self.cache, self.device, self.cuda = cache, device, device.type == "cuda"
        self.blocks, self.block_size = cache.keys[0].shape[0], cache.keys[0].shape[1]
        self.spare_block, self.spare_slot = self.blocks - 1, slots
        width = -(-max_model_len // self.block_size)
        # The host's copy answers where a token lies without asking the device.
        self._table_SM = np.full((slots + 1, width), self.spare_block, dtype=np.int32)
        self.table_SM = torch.from_numpy(self._table_SM.copy()).to(device)
        self.last_S = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._tenants: list[tuple[str, int, int]] = [("", 0, 0)] * (slots + 1)
        # A token: id, position, cache slot, owner. A part: slot, context, start, last. A table change: place, block.
        size = 4 * max_tokens + 5 * (slots + 2) + 2 * (slots + 1) * width
        self._sent = torch.zeros(size, dtype=torch.int32, device=device)
        self._ring = [torch.zeros(size, dtype=torch.int32, pin_memory=self.cuda) for _ in range(_RING)]
        self._written = [torch.cuda.Event() for _ in range(_RING)] if self.cuda else []
        self._turn = 0

    def table_changes(self, parts: tuple[Part, ...]) -> tuple[list[int], list[int]]:
        """Places in the flat table and blocks that the parts' requests have gained; a new tenant's all."""
        width = self._table_SM.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for part in parts:
            request = part.request
            slot, held = request.slot, len(request.blocks)
            name, admission, known = self._tenants[slot]
            if name != request.id or admission != request.admissions:
                known = 0
            if known < held:
                new = request.blocks[known:]
                self._table_SM[slot, known:held] = new
                places += range(slot * width + known, slot * width + held)
                blocks += new
            self._tenants[slot] = (request.id, request.admissions, held)
        return places, blocks

    def send(self, arrays: list[NDArray[np.int32]]) -> list[Tensor]:
        """The arrays as views of one device buffer, after one copy; good until the next `send`."""
        sizes = [array.size for array in arrays]
        turn, self._turn = self._turn, (self._turn + 1) % _RING
        if self.cuda:
            # Its last copy must be through before the host writes there again.
            self._written[turn].synchronize()
        staging, total = self._ring[turn], sum(sizes)
        np.concatenate(arrays, out=staging.numpy()[:total])
        self._sent[:total].copy_(staging[:total], non_blocking=True)
        if self.cuda:
            self._written[turn].record()
        return list(self._sent[:total].split(sizes))

    def sent(self, count: int, size: int) -> list[Tensor]:
        """The first arrays, all of one size, where every `send` puts them."""
        return list(self._sent[: count * size].split(size))

    def apply(self, places: Tensor, blocks: Tensor) -> None:
        """Write table changes that were sent."""
        if len(places):
            self.table_SM.view(-1)[places.long()] = blocks

    def decode_arrays(self, parts: tuple[Part, ...], rows: int) -> list[NDArray[np.int32]]:
        """Slot, position, token and cache slot of steps of one token a part, padded to `rows`; a padding row's position
        is −1."""
        count = len(parts)
        out = np.full((4, rows), -1, dtype=np.int32)
        out[0], out[3] = self.spare_slot, self.spare_block * self.block_size
        out[0, :count] = [part.request.slot for part in parts]
        out[1, :count] = [part.start for part in parts]
        out[2, :count] = [UNKNOWN if part.placeholder else part.request.tokens[part.start] for part in parts]
        slots, positions = out[0, :count], out[1, :count]
        out[3, :count] = self._cache_slots(slots, positions)
        return list(out)

    def feed(self, step: Step) -> Fed:
        """Inputs of a step of any parts."""
        parts = step.parts
        counts = np.array([part.count for part in parts], dtype=np.int32)
        begins = np.array([part.start for part in parts], dtype=np.int32)
        slots = np.array([part.request.slot for part in parts], dtype=np.int32)
        starts_B1 = np.zeros(len(parts) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts_B1[1:])
        places, blocks = self.table_changes(parts)
        tokens = np.fromiter(
            chain.from_iterable(
                (UNKNOWN,) if part.placeholder else part.request.tokens[part.start : part.context] for part in parts
            ),
            dtype=np.int32,
            count=int(starts_B1[-1]),
        )
        owners = np.repeat(slots, counts)
        positions = np.arange(starts_B1[-1], dtype=np.int32) + np.repeat(begins - starts_B1[:-1], counts)
        cache_slots = self._cache_slots(owners, positions)
        arrays = [tokens, positions, cache_slots, owners, slots, begins + counts, starts_B1, starts_B1[1:] - 1]
        arrays += [np.array(places, dtype=np.int32), np.array(blocks, dtype=np.int32)]
        sent = self.send(arrays)
        tokens_T, positions_T, slots_T, owners_T, slots_B, contexts_B, starts, last_B, places_U, blocks_U = sent
        self.apply(places_U, blocks_U)
        if any(part.placeholder for part in parts):
            tokens_T = torch.where(tokens_T < 0, self.last_S[owners_T.long()].int(), tokens_T)
        table_BM = self.table_SM[slots_B.long(), : self._columns(begins + counts)]
        paged = Paged(self.cache, table_BM, contexts_B, starts, slots_T.long(), int(counts.max()))
        return Fed(tokens_T, positions_T, Layout(None, paged), last_B.long(), starts_B1)

    def _columns(self, contexts: NDArray[np.int32]) -> int:
        """Columns of the block table that the longest context reaches."""
        return -(-int(contexts.max()) // self.block_size)

    def _cache_slots(self, owners: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        size = self.block_size
        return self._table_SM[owners, positions // size] * size + positions % size
