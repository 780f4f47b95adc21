"""The data set of a run: train and held-out documents, their order, and the row of every sample of the run.

Legend: B rows  Q tokens a row  N documents
"""

from __future__ import annotations

import numpy as np

from rooflight.errors import InvalidValue
from rooflight.train.data.order import key_of, mixed, permuted
from rooflight.train.data.packing import IGNORE, Packing, Rows
from rooflight.train.data.shards import Store

__all__ = ["IGNORE", "Dataset", "Rows"]

_SPLIT, _DOCUMENTS, _ROWS = 1, 2, 3
_BLOCK = 1 << 20


class Dataset:
    """Rows of `context` tokens from a store; sample n of a run is the same row whatever the batch size or the ranks.

    Documents are put in an order by `seed`, laid end to end and cut into rows; every epoch goes through all rows in an
    order of its own. All that a checkpoint must keep is the number of samples seen.

    holdout: the share of documents that is never trained on, drawn by a hash of their index and the same for every
    seed: at least one. Where that leaves train or held-out text without a row, the end of the longest document is held
    out instead. Raises InvalidValue when there are not tokens enough for a row of each.
    """

    def __init__(self, store: Store, context: int, seed: int = 0, holdout: float = 0.0):
        if context < 1:
            raise InvalidValue(f"--context {context} is too small; a row has at least 1 token")
        if not 0.0 <= holdout < 1.0:
            raise InvalidValue(f"--holdout {holdout} is no share of the documents; it must be at least 0 and below 1")
        self.store, self.context, self.seed = store, context, seed
        starts_N, lengths_N = np.asarray(store.starts_N1[:-1]), np.diff(store.starts_N1)
        if store.tokens < context:
            raise InvalidValue(
                f"the data has {store.tokens} tokens, less than one row of --context {context}; "
                f"give more text, or --context {store.tokens} or less"
            )
        held_N = _held_out(store.documents, holdout)
        held_tokens = int(lengths_N[held_N].sum())
        self._held_out: Packing | None = None
        if holdout == 0.0:
            train = starts_N, lengths_N
        elif held_tokens >= context and store.tokens - held_tokens >= context:
            train = starts_N[~held_N], lengths_N[~held_N]
            self._held_out = self._packed(starts_N[held_N], lengths_N[held_N], 0)
        else:
            train, tail = _tail_split(starts_N, lengths_N, context, holdout)
            self._held_out = self._packed(*tail, 0)
        self._train = self._packed(*train, seed)

    @property
    def tokens(self) -> int:
        """Tokens to train on in an epoch."""
        return self._train.count * self.context

    @property
    def rows_per_epoch(self) -> int:
        """Rows to train on in an epoch."""
        return self._train.count

    @property
    def held_out_rows(self) -> int:
        """Rows of held-out text."""
        return self._held_out.count if self._held_out else 0

    def epoch(self, sample: int) -> float:
        """How many times the data has been gone through after `sample` samples."""
        return sample / self.rows_per_epoch

    def rows(self, first: int, count: int) -> Rows:
        """Samples first, first + 1, … of the run, counted from 0 over all epochs."""
        if first < 0 or count < 1:
            raise InvalidValue(f"samples {first} to {first + count - 1} do not exist; the first is 0, and one is least")
        samples_B = np.arange(first, first + count)
        epochs_B, places_B = np.divmod(samples_B, self.rows_per_epoch)
        numbers_B = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs_B[0]), int(epochs_B[-1]) + 1):
            at = epochs_B == epoch
            numbers_B[at] = permuted(places_B[at], self.rows_per_epoch, key_of(self.seed, _ROWS, epoch))
        return self._train.rows(numbers_B, tuple(samples_B.tolist()))

    def held_out(self, count: int, first: int = 0) -> Rows:
        """Rows first, first + 1, … of the held-out text, at most `count`: the same ones every time and for every seed.

        Raises InvalidValue when nothing is held out, or no row is left from `first` on.
        """
        if self._held_out is None:
            raise InvalidValue("there is no held-out text to evaluate on; give --holdout above 0")
        stop = min(first + count, self.held_out_rows)
        if first < 0 or stop <= first:
            raise InvalidValue(
                f"the held-out text has {self.held_out_rows} rows; {count} from {first} are none of them"
            )
        return self._held_out.rows(np.arange(first, stop), tuple(range(first, stop)))

    def _packed(self, starts_N: np.ndarray, lengths_N: np.ndarray, seed: int) -> Packing:
        count, key = len(starts_N), key_of(seed, _DOCUMENTS)
        order_N = np.empty(count, dtype=np.int64)
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            order_N[start:stop] = permuted(np.arange(start, stop), count, key)
        return Packing(self.store, starts_N[order_N], lengths_N[order_N], self.context)


def _held_out(count: int, share: float) -> np.ndarray:
    """Which documents are held out: those whose hash is below `share`, but at least one and never all."""
    held_N = np.zeros(count, dtype=bool)
    if share == 0.0 or count < 2:
        return held_N
    key, least, most = np.uint64(key_of(_SPLIT)), (1 << 64, 0), (-1, 0)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        hash_N = mixed(np.arange(start, stop, dtype=np.uint64) ^ key)
        held_N[start:stop] = hash_N < np.uint64(share * float(1 << 64))
        least = min(least, (int(hash_N.min()), start + int(hash_N.argmin())))
        most = max(most, (int(hash_N.max()), start + int(hash_N.argmax())))
    held_N[least[1]] = True
    held_N[most[1]] = False
    return held_N


def _tail_split(
    starts_N: np.ndarray, lengths_N: np.ndarray, context: int, share: float
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Train and held-out runs when the last `share` of all tokens, at least a row, comes off the longest document."""
    total, longest = int(lengths_N.sum()), int(lengths_N.argmax())
    tail = min(max(context, int(share * total)), int(lengths_N[longest]) - 1, total - context)
    if tail < context:
        raise InvalidValue(
            f"the data has {total} tokens in {len(lengths_N)} documents, too few for a row of --context {context} to "
            "train on and one to hold out; give more text, a smaller --context, or --holdout 0"
        )
    train_N = lengths_N.copy()
    train_N[longest] -= tail
    return (starts_N, train_N), (starts_N[longest : longest + 1] + train_N[longest], np.array([tail]))
