"""The next batches of a run, made in a thread of their own while the current one is trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.train.data.dataset import Dataset, Rows

_WAKE_S = 0.1


class Prefetch:
    """An iterator over batches: samples start to start + batch, then as many from start + stride on, and so on.

    stride: samples of a step over all ranks (default: batch), so that rank r starts at r·batch. depth: batches that
    are made ahead. prepare: runs on each batch in the thread. stop: no batch begins at this sample or after it.
    An error in the thread is raised where the batch would have come. Use it as a context manager, or close it.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        start: int = 0,
        *,
        stride: int | None = None,
        stop: int | None = None,
        depth: int = 2,
        prepare: Callable[[Rows], Any] | None = None,
    ):
        stride = batch if stride is None else stride
        if batch < 1 or stride < batch or depth < 1 or start < 0:
            raise InvalidValue(
                f"batches of {batch} samples every {stride} from {start}, {depth} ahead, cannot be made; use at least "
                "1 sample and 1 ahead, a stride of at least the batch, and no negative start"
            )
        self._dataset, self._batch, self._stride, self._stop = dataset, batch, stride, stop
        self._prepare = prepare
        self._position = start
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(start,), name="rooflight-data", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """The first sample of the batch that comes next: where a resumed run starts."""
        return self._position

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if self._ended or self._closed.is_set():
            raise StopIteration
        kind, value = self._ready.get()
        if kind == "failed":
            self._failure = value
            raise value
        if kind == "ended":
            self._ended = True
            raise StopIteration
        self._position += self._stride
        return value

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it; harmless when done twice."""
        self._closed.set()
        self._thread.join()

    def _work(self, sample: int) -> None:
        try:
            while not self._closed.is_set() and (self._stop is None or sample < self._stop):
                rows = self._dataset.rows(sample, self._batch)
                self._put("rows", self._prepare(rows) if self._prepare else rows)
                sample += self._stride
            self._put("ended", None)
        except BaseException as error:  # whatever it is, the caller must see it
            self._put("failed", error)

    def _put(self, kind: str, value: Any) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put((kind, value), timeout=_WAKE_S)
                return
            except queue.Full:
                continue
