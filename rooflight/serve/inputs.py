"""What a step's model run is fed: tokens, positions, cache slots and block tables, sent to the device in one copy.

Legend: T new tokens  B parts of the step  S slots, a spare one for padding included  M blocks a sequence at most
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rooflight.models.layout import KVCache, Layout, Paged
from rooflight.serve.step import Part, Step

UNKNOWN = -1  # in place of a token that only the device knows yet
_COLUMNS = 16
_ALIGNMENT = 4  # arrays begin at multiples of 16 bytes: kernels are compiled for one kind of address
_RING = 3  # steps whose copies may be under way at once: one running, one waiting, one being written


@dataclass(slots=True)
class Fed:
    """One step's inputs on the device, and where in the hidden states each part's last token stands."""

    tokens_T: Tensor
    positions_T: Tensor
    layout: Layout
    last_B: Tensor


class Inputs:
    """Keeps every slot's block table on the device, and sends what a step adds.

    cache: holds one block more than the scheduler knows: tokens of padding rows are written there.
    last_S: the last token sampled in each slot, which a step that runs ahead of the host reads.
    """

    def __init__(self, cache: KVCache, slots: int, max_tokens: int, max_model_len: int, device: torch.device):
        self.cache, self.device, self.cuda = cache, device, device.type == "cuda"
        self.blocks, self.block_size = cache.keys[0].shape[0], cache.keys[0].shape[1]
        self.spare_block, self.spare_slot = self.blocks - 1, slots
        # A multiple, so that kernels are compiled for one kind of row.
        width = -(-max_model_len // self.block_size // _COLUMNS) * _COLUMNS
        # The host's copy answers where a token lies without asking the device.
        self._table_SM = np.full((slots + 1, width), self.spare_block, dtype=np.int32)
        self.table_SM = torch.from_numpy(self._table_SM.copy()).to(device)
        self.last_S = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._tenants: list[tuple[str, int, int]] = [("", 0, 0)] * (slots + 1)
        # A token: id, position, cache slot, owner. A part: slot, context, start, last. A table change: place, block.
        size = 4 * max_tokens + 16 * (slots + 8) + 2 * (slots + 1) * width + _ALIGNMENT * 16
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
        staging, total = self._ring[turn].numpy(), 0
        for array in arrays:
            staging[total : total + array.size] = array
            total += _aligned(array.size)
        self._sent[:total].copy_(self._ring[turn][:total], non_blocking=True)
        if self.cuda:
            self._written[turn].record()
        return self.sent(sizes)

    def sent(self, sizes: list[int]) -> list[Tensor]:
        """The first arrays, of these sizes, where every `send` puts them."""
        views: list[Tensor] = []
        start = 0
        for size in sizes:
            views.append(self._sent[start : start + size])
            start += _aligned(size)
        return views

    def apply(self, places: Tensor, blocks: Tensor) -> None:
        """Write table changes that were sent."""
        if len(places):
            self.table_SM.view(-1)[places.long()] = blocks

    def decode_arrays(self, parts: tuple[Part, ...], rows: int) -> list[NDArray[np.int32]]:
        """What `decode_inputs` gives of steps of one token a part, padded to `rows`; a padding row has no context."""
        count = len(parts)
        # As wide as the model wants them, so that the device converts nothing.
        out = np.zeros((4, rows), dtype=np.int64)
        out[0], out[3] = self.spare_slot, self.spare_block * self.block_size
        out[0, :count] = [part.request.slot for part in parts]
        out[1, :count] = [part.start for part in parts]
        out[2, :count] = [UNKNOWN if part.placeholder else part.request.tokens[part.start] for part in parts]
        slots, positions = out[0, :count], out[1, :count]
        out[3, :count] = self._cache_slots(slots, positions)
        contexts = np.zeros(rows, dtype=np.int32)
        contexts[:count] = positions + 1
        return [*(row.view(np.int32) for row in out), contexts]

    def decode_inputs(self, rows: int, words: int) -> list[Tensor]:
        """Slot, position, token, cache slot (int64) and context of each row, and the words sent after them."""
        *wide, contexts_B, more = self.sent([2 * rows] * 4 + [rows, words])
        return [*(x.view(torch.int64) for x in wide), contexts_B, more]

    def feed(self, step: Step) -> Fed:
        """Inputs of a step of any parts, no larger than it is."""
        longest = max(part.context for part in step.parts)
        self.send_step(step, step.tokens, step.sequences)
        most = max(part.count for part in step.parts)
        # A CPU reads whole rows of the table; a GPU's kernels read what they need, and like rows of one length.
        width = None if self.cuda else -(-longest // self.block_size)
        return self.fed(step.tokens, step.sequences, most, width)

    def send_step(self, step: Step, tokens: int, rows: int) -> None:
        """Send a step padded to so many tokens and parts: padding tokens belong to no part, padding parts are empty."""
        parts, real, count = step.parts, step.tokens, step.sequences
        counts_B = np.zeros(rows, dtype=np.int32)
        counts_B[:count] = [part.count for part in parts]
        begins_B = np.zeros(rows, dtype=np.int32)
        begins_B[:count] = [part.start for part in parts]
        slots_B = np.full(rows, self.spare_slot, dtype=np.int32)
        slots_B[:count] = [part.request.slot for part in parts]
        starts_B1 = np.zeros(rows + 1, dtype=np.int32)
        np.cumsum(counts_B, out=starts_B1[1:])
        places, blocks = self.table_changes(parts)
        new = np.zeros((4, tokens), dtype=np.int32)
        tokens_T, positions_T, cache_slots_T, owners_T = new
        tokens_T[:real] = np.fromiter(
            chain.from_iterable(
                (UNKNOWN,) if part.placeholder else part.request.tokens[part.start : part.context] for part in parts
            ),
            dtype=np.int32,
            count=real,
        )
        owners_T[:real] = np.repeat(slots_B, counts_B)
        positions_T[:real] = np.arange(real, dtype=np.int32) + np.repeat(begins_B - starts_B1[:-1], counts_B)
        cache_slots_T[real:] = self.spare_block * self.block_size
        cache_slots_T[:real] = self._cache_slots(owners_T[:real], positions_T[:real])
        last_B = np.maximum(starts_B1[1:] - 1, 0)
        changes = [np.array(places, dtype=np.int32), np.array(blocks, dtype=np.int32)]
        sent = self.send([*new, slots_B, begins_B + counts_B, last_B, starts_B1, *changes])
        self.apply(*sent[-2:])

    def fed(self, tokens: int, rows: int, max_query: int, width: int | None) -> Fed:
        """What `send_step` sent, as a model takes it. width: columns of the block table, all when None."""
        sent = self.sent([tokens] * 4 + [rows] * 3 + [rows + 1])
        tokens_T, positions_T, places_T, owners_T, slots_B, contexts_B, last_B, starts_B1 = sent
        tokens_T = torch.where(tokens_T < 0, self.last_S[owners_T.long()], tokens_T.long())
        table_BM = self.table_SM[slots_B.long()]
        if width is not None:
            table_BM = table_BM[:, :width]
        paged = Paged(self.cache, table_BM, contexts_B, starts_B1, places_T.long(), max_query)
        return Fed(tokens_T, positions_T, Layout(None, paged), last_B.long())

    def _cache_slots(self, owners: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
        size = self.block_size
        return self._table_SM[owners, positions // size] * size + positions % size


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
