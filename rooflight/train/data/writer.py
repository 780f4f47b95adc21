"""The files of a token store while they are written, and how far the writing is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rooflight.models.tokenizer import Vocabulary
from rooflight.train.data.shards import DOCUMENTS, id_type
from rooflight.train.data.sources import Sources


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a store is: bytes of the sources read so far and in all, documents and tokens written."""

    bytes_read: int
    bytes_total: int
    documents: int
    tokens: int


class Report:
    """Counts what was read and written, and tells the caller's callback."""

    def __init__(self, sources: Sources, callback: Callable[[Progress], None] | None):
        self.before = np.cumsum([0, *sources.sizes()]).tolist()
        self.callback, self.documents, self.tokens, self.read, self.bytes_written = callback, 0, 0, 0, 0

    def tell(self, file: int, position: int) -> None:
        """`position` bytes of the file of that number have been read."""
        self.read = min(self.before[file] + position, self.before[file + 1])
        if self.callback:
            self.callback(Progress(self.read, self.before[-1], self.documents, self.tokens))


class Writer:
    """The files of a store as they grow; ids are appended, documents are ended."""

    def __init__(self, directory: Path, vocabulary: Vocabulary, shard_tokens: int, report: Report):
        self.directory, self.shard_tokens, self.report = directory, shard_tokens, report
        self.dtype, self.eos = id_type(vocabulary.size), np.array([vocabulary.eos_id], id_type(vocabulary.size))
        self.entries: list[dict[str, Any]] = []
        self.file: BinaryIO | None = None
        self.in_file = 0
        self.starts = open_file(directory / DOCUMENTS)
        self.starts_hash = hashlib.sha256()
        self._start()

    def add(self, ids_T: np.ndarray) -> None:
        """Append ids to the document that is open."""
        if self.file is None:
            self.file, self.hash = open_file(self.directory / f"tokens-{len(self.entries):05}.bin"), hashlib.sha256()
        data = np.ascontiguousarray(ids_T, dtype=self.dtype).data
        self.file.write(data)
        self.hash.update(data)
        self.in_file += len(ids_T)
        self.report.tokens += len(ids_T)
        self.report.bytes_written += data.nbytes

    def end(self) -> None:
        """End the document that is open; the next one goes to a new file if this one is full."""
        self.add(self.eos)
        self._start()
        self.report.documents += 1
        if self.in_file >= self.shard_tokens:
            self._close_file()

    def finish(self) -> list[dict[str, Any]]:
        """Bring everything to the disk; name, bytes and sha256 of each file."""
        self._close_file()
        size = (self.report.documents + 1) * 8
        close(self.starts)
        return [*self.entries, {"name": DOCUMENTS, "bytes": size, "sha256": self.starts_hash.hexdigest()}]

    def abandon(self) -> None:
        """Close the files, whatever they hold."""
        for file in (self.file, self.starts):
            if file is not None:
                # A full disk fails once more when what is buffered cannot be written.
                with suppress(OSError):
                    file.close()

    def _start(self) -> None:
        data = self.report.tokens.to_bytes(8, "little")
        self.starts.write(data)
        self.starts_hash.update(data)

    def _close_file(self) -> None:
        if self.file is None:
            return
        name = f"tokens-{len(self.entries):05}.bin"
        close(self.file)
        size = self.in_file * self.dtype.itemsize
        self.entries.append({"name": name, "bytes": size, "sha256": self.hash.hexdigest()})
        self.file, self.in_file = None, 0


def open_file(path: Path) -> BinaryIO:
    """A new file for writing, buffered by the mebibyte, for documents can be short."""
    return path.open("wb", buffering=1 << 20)


def close(file: BinaryIO) -> None:
    """Close a file whose content has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
