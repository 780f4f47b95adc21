"""Documents laid end to end and cut into rows of equal length, without a row ever being stored.

Legend: B rows  Q tokens a row  N documents  P pieces: what one document gives to one row
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rooflight.train.data.shards import Store

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to train on: tokens, the next token of each, and where the documents in them begin.

    positions restart at 0 in each piece; lengths are each row's pieces, which add up to the row. A target is IGNORE at
    the last token of a document, for what follows is unrelated. sample_ids: the global sample counter of each row.
    """

    tokens_BQ: np.ndarray
    targets_BQ: np.ndarray
    positions_BQ: np.ndarray
    lengths: tuple[tuple[int, ...], ...]
    sample_ids: tuple[int, ...]

    @property
    def targets(self) -> int:
        """How many tokens have a target: what a mean loss divides by."""
        return int(np.count_nonzero(self.targets_BQ != IGNORE))


class Packing:
    """N documents in the order given, as rows of `context` tokens; 16 bytes of memory a document."""

    def __init__(self, store: Store, starts_N: np.ndarray, lengths_N: np.ndarray, context: int):
        self._store, self._starts_N, self._context = store, starts_N, context
        self._places_N1 = np.zeros(len(starts_N) + 1, dtype=np.int64)
        np.cumsum(lengths_N, out=self._places_N1[1:])

    @property
    def tokens(self) -> int:
        """Tokens in all, what is left after the last row included."""
        return int(self._places_N1[-1])

    @property
    def count(self) -> int:
        """Whole rows; fewer than `context` tokens are left over."""
        return self.tokens // self._context

    def rows(self, numbers_B: np.ndarray, sample_ids: tuple[int, ...]) -> Rows:
        """The rows of these numbers, in this order."""
        context, count = self._context, len(numbers_B)
        begins_B = numbers_B.astype(np.int64) * context
        first_B = np.searchsorted(self._places_N1, begins_B, side="right") - 1
        last_B = np.searchsorted(self._places_N1, begins_B + context, side="left") - 1
        pieces_B = last_B - first_B + 1
        row_P = np.repeat(np.arange(count), pieces_B)
        document_P = np.arange(len(row_P)) - np.repeat(np.cumsum(pieces_B) - pieces_B, pieces_B) + first_B[row_P]
        begin_P = np.maximum(self._places_N1[document_P], begins_B[row_P])
        end_P = np.minimum(self._places_N1[document_P + 1], begins_B[row_P] + context)
        length_P = end_P - begin_P
        source_P = self._starts_N[document_P] + begin_P - self._places_N1[document_P]
        place_P = np.cumsum(length_P) - length_P

        tokens_T = self._store.read(source_P, length_P)
        positions_T = np.arange(count * context) - np.repeat(place_P, length_P)
        targets_T = np.empty_like(tokens_T)
        targets_T[:-1] = tokens_T[1:]
        targets_T[place_P + length_P - 1] = IGNORE
        # The row's cut is no border: the document goes on, and its next token is known.
        goes_on = np.flatnonzero(end_P < self._places_N1[document_P + 1])
        next_tokens = self._store.read(source_P[goes_on] + length_P[goes_on], np.ones_like(goes_on))
        targets_T[place_P[goes_on] + length_P[goes_on] - 1] = next_tokens
        lengths = length_P.tolist()
        bounds = np.cumsum(pieces_B).tolist()
        return Rows(
            tokens_T.reshape(count, context),
            targets_T.reshape(count, context),
            positions_T.reshape(count, context),
            tuple(tuple(lengths[start:stop]) for start, stop in zip([0, *bounds], bounds)),
            sample_ids,
        )
