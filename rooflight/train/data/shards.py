"""The store of token ids on disk: flat files, where each document begins, and meta.json, which is written last.

    tokens-00000.bin …   uint16 where the vocabulary fits, else uint32; a document lies whole in one file
    documents.bin        int64, where each document begins in the stream of all tokens, then the stream's length
    meta.json            form and version, counts, vocabulary, sha256 of each file, what it was made from
    tokenizer/           the tokenizer, where the store was made from text

Legend: N documents  T tokens  P runs of tokens  F files
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rooflight.errors import InvalidValue
from rooflight.models.huggingface import read_json
from rooflight.models.tokenizer import Vocabulary

META, DOCUMENTS, FORMAT, VERSION = "meta.json", "documents.bin", "rooflight tokens", 1


def id_type(vocabulary_size: int) -> np.dtype:
    """The smallest type that a store uses for ids below `vocabulary_size`."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class Store:
    """Token ids of N documents, mapped from disk; every document ends with the vocabulary's `eos_id`."""

    directories: tuple[Path, ...]
    vocabulary: Vocabulary
    files: tuple[np.ndarray, ...]
    file_starts_F1: np.ndarray
    starts_N1: np.ndarray

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.starts_N1) - 1

    @property
    def tokens(self) -> int:
        """How many tokens there are, ends of documents included."""
        return int(self.starts_N1[-1])

    def document(self, number: int) -> np.ndarray:
        """The ids of one document, its end of text included; int64."""
        start, stop = self.starts_N1[number], self.starts_N1[number + 1]
        return self.read(np.array([start]), np.array([stop - start]))

    def read(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """The ids of runs of tokens, one run after the other; int64. A run lies within one document."""
        if len(self.files) == 1:
            return self.files[0].take(_positions(starts_P, lengths_P)).astype(np.int64)
        ids_T = np.empty(int(lengths_P.sum()), dtype=np.int64)
        places_P = np.cumsum(lengths_P) - lengths_P
        file_P = np.searchsorted(self.file_starts_F1, starts_P, side="right") - 1
        for number in np.unique(file_P).tolist():
            at = np.flatnonzero(file_P == number)
            inside = _positions(starts_P[at] - self.file_starts_F1[number], lengths_P[at])
            ids_T[_positions(places_P[at], lengths_P[at])] = self.files[number].take(inside)
        return ids_T

    def fingerprint(self) -> str:
        """A hash of the ids themselves and of where documents begin: equal for equal tokens, wherever they lie."""
        entries = (entry for path in self.directories for entry in _files(path, read_json(path / META)))
        return hashlib.sha256("\n".join(str(entry["sha256"]) for entry in entries).encode()).hexdigest()

    def verify(self) -> None:
        """Read every file and compare its sha256; raises InvalidValue that names a damaged one."""
        for directory in self.directories:
            for entry in _files(directory, read_json(directory / META)):
                if sha256(directory / entry["name"]) != entry["sha256"]:
                    raise InvalidValue(
                        f"{directory / entry['name']}: its content is not what was written (sha256); "
                        f"remove {directory} and make it again"
                    )


def _positions(starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each run, one run after the other."""
    places_P = np.cumsum(lengths_P) - lengths_P
    return np.arange(int(lengths_P.sum())) + np.repeat(starts_P - places_P, lengths_P)


def is_store(directory: Path) -> bool:
    """Whether a directory says of itself that it is a token store."""
    try:
        return (directory / META).is_file() and read_json(directory / META).get("format") == FORMAT
    except InvalidValue:
        return False


def open_shards(*directories: str | Path, verify: bool = False) -> Store:
    """Map one store, or several as if they were one; with `verify` every byte is read and checked.

    Raises InvalidValue on a directory that is no whole store of this version, and on stores of different tokenizers.
    """
    if not directories:
        raise InvalidValue("no directory of token shards is named; give at least one")
    parts = [_open(Path(directory)) for directory in directories]
    first = parts[0]
    for part in parts[1:]:
        if part.vocabulary != first.vocabulary:
            raise InvalidValue(
                f"{part.directories[0]} and {first.directories[0]} were made with different tokenizers; "
                "make them again with the same one"
            )
    if len(parts) > 1:
        first = _joined(parts)
    if verify:
        first.verify()
    return first


def _joined(parts: Sequence[Store]) -> Store:
    offsets = np.cumsum([0] + [part.tokens for part in parts])
    return Store(
        tuple(part.directories[0] for part in parts),
        parts[0].vocabulary,
        tuple(file for part in parts for file in part.files),
        np.concatenate([part.file_starts_F1[:-1] + offset for part, offset in zip(parts, offsets)] + [offsets[-1:]]),
        np.concatenate([part.starts_N1[:-1] + offset for part, offset in zip(parts, offsets)] + [offsets[-1:]]),
    )


def _open(directory: Path) -> Store:
    if not is_store(directory):
        raise InvalidValue(f"{directory}: is no store of token shards; it has no meta.json that says so")
    meta = read_json(directory / META)
    if meta.get("version") != VERSION:
        raise InvalidValue(f"{directory}: is of version {meta.get('version')}, this one reads {VERSION}; make it again")
    entries = _files(directory, meta)
    for entry in entries:
        found = (directory / entry["name"]).stat().st_size if (directory / entry["name"]).is_file() else None
        if found != entry["bytes"]:
            what = "is missing" if found is None else f"has {found} bytes"
            raise InvalidValue(
                f"{directory / entry['name']}: {what} where meta.json tells of {entry['bytes']}; make the store again"
            )
    try:
        dtype, vocabulary = np.dtype(meta["dtype"]), Vocabulary(**meta["vocabulary"])
    except (KeyError, TypeError) as error:
        raise InvalidValue(f"{directory / META}: is not whole ({error}); make the store again") from error
    names = [entry["name"] for entry in entries if entry["name"] != DOCUMENTS]
    files = tuple(np.asarray(np.memmap(directory / name, dtype=dtype, mode="r")) for name in names)
    starts_N1 = np.asarray(np.memmap(directory / DOCUMENTS, dtype="<i8", mode="r"))
    file_starts_F1 = np.cumsum([0] + [len(file) for file in files])
    if starts_N1[-1] != file_starts_F1[-1]:
        raise InvalidValue(f"{directory / DOCUMENTS}: does not fit the token files; make the store again")
    return Store((directory,), vocabulary, files, file_starts_F1, starts_N1)


def _files(directory: Path, meta: dict[str, Any]) -> list[dict[str, Any]]:
    entries = meta.get("files")
    keys = {"name", "bytes", "sha256"}
    if (
        not isinstance(entries, list)
        or len(entries) < 2
        or not all(isinstance(entry, dict) and keys <= entry.keys() for entry in entries)
    ):
        raise InvalidValue(f"{directory / META}: names no files; make the store again")
    return entries


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
