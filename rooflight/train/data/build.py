"""Making a token store from sources: streamed, under a temporary name, renamed when it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rooflight.errors import InvalidValue, RooflightError
from rooflight.models.huggingface import read_json
from rooflight.models.tokenizer import Tokenizer, Vocabulary
from rooflight.train.data.shards import FORMAT, META, VERSION, Store, is_store, open_shards
from rooflight.train.data.sources import Sources, resolve
from rooflight.train.data.token_files import read_tokens
from rooflight.train.data.writer import Progress, Report, Writer, close, open_file

GIB = 1 << 30
SHARD_TOKENS = 1 << 29
_BATCH_CHARACTERS = 2 << 20


def tokenize(
    sources: Sources | Sequence[str],
    tokenizer: Tokenizer | Vocabulary | None,
    directory: str | Path,
    progress: Callable[[Progress], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Store:
    """The token store of `sources` in `directory`: opened if it is there already for just these, else made.

    Text needs a Tokenizer; token files need the end of text and the number of ids alone; sources that are stores are
    opened where they lie, and a tokenizer given with them must be theirs. Processes that ask for the same directory at
    once wait for the one that makes it. Raises InvalidValue on bad sources and RooflightError when the disk is full or
    fails; what was written is then removed, and a store that was there before stays.
    """
    if not isinstance(sources, Sources):
        sources = resolve(sources)
    vocabulary = tokenizer.vocabulary if isinstance(tokenizer, Tokenizer) else tokenizer
    if sources.stores:
        return _stores(sources, vocabulary)
    if vocabulary is None or not (sources.tokenized or isinstance(tokenizer, Tokenizer)):
        raise InvalidValue(f"{sources.files[0].path}: needs a tokenizer; name one with --tokenizer, or train one")
    directory = Path(directory)
    made_from = {"digest": sources.digest(), "specs": list(sources.specs), "files": len(sources.files)}
    with _locked(directory):
        found = _made_before(directory, made_from["digest"], vocabulary)
        if found is not None:
            return found
        if not _free(directory):
            raise InvalidValue(f"--data-cache {directory}: holds other files; name a new directory or an empty one")
        partial = directory.parent / f".{directory.name}.partial"
        # The lock is held, so whatever stands here was left by a process that died.
        shutil.rmtree(partial, ignore_errors=True)
        report = Report(sources, progress)
        try:
            _make(sources, tokenizer, vocabulary, partial, made_from, report, shard_tokens)
            _put(partial, directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _disk_error(directory, error, report) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return open_shards(directory)


def _stores(sources: Sources, vocabulary: Vocabulary | None) -> Store:
    store = open_shards(*sources.stores)
    if vocabulary is not None and vocabulary.fingerprint != store.vocabulary.fingerprint:
        raise InvalidValue(
            f"{sources.stores[0]}: was made with another tokenizer than the one given; leave --tokenizer out, "
            "or make the shards again from the text"
        )
    return store


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system releases when the process dies."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = (directory.parent / f".{directory.name}.lock").open("w")
    except OSError as error:
        raise InvalidValue(f"--data-cache {directory}: cannot be written ({error.strerror}); name another") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _free(directory: Path) -> bool:
    """Whether a store may take the place of what is there: nothing, an empty directory or another store."""
    if not directory.exists() or is_store(directory):
        return True
    return directory.is_dir() and not any(directory.iterdir())


def _made_before(directory: Path, digest: str, vocabulary: Vocabulary) -> Store | None:
    if not is_store(directory):
        return None
    try:
        store = open_shards(directory)
    except InvalidValue:
        return None
    made_from = read_json(directory / META).get("sources")
    same = isinstance(made_from, dict) and made_from.get("digest") == digest and store.vocabulary == vocabulary
    return store if same else None


def _make(
    sources: Sources,
    tokenizer: Tokenizer | Vocabulary | None,
    vocabulary: Vocabulary,
    partial: Path,
    made_from: dict[str, Any],
    report: Report,
    shard_tokens: int,
) -> None:
    partial.mkdir()
    writer = Writer(partial, vocabulary, shard_tokens, report)
    try:
        if isinstance(tokenizer, Tokenizer) and not sources.tokenized:
            _write_text(sources, tokenizer, writer, report)
        else:
            _write_ids(sources, vocabulary, writer, report)
        if not report.documents:
            raise InvalidValue(f"{' '.join(sources.specs)}: holds no token but the end of text; name other data")
        entries = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(partial / "tokenizer")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": writer.dtype.str,
        "tokens": report.tokens,
        "documents": report.documents,
        "vocabulary": {
            "size": vocabulary.size, "eos_id": vocabulary.eos_id, "fingerprint": vocabulary.fingerprint,
        },
        "sources": made_from,
        "files": entries,
    }  # fmt: skip
    with open_file(partial / META) as file:
        file.write(json.dumps(meta, indent=2).encode())
        close(file)


def _write_text(sources: Sources, tokenizer: Tokenizer, writer: Writer, report: Report) -> None:
    prefix = np.array(tokenizer.prefix, dtype=np.int64)
    begins = True
    for batch in _batches(sources):
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for _, piece in batch])):
            ends = piece[1].ends
            if begins and not ids and ends:
                continue
            if begins and len(prefix):
                writer.add(prefix)
            writer.add(np.array(ids, dtype=np.int64))
            if ends:
                writer.end()
            begins = ends
        file, last = batch[-1]
        report.tell(file, last.position)


def _batches(sources: Sources) -> Iterator[list[Any]]:
    """Pieces of documents, some megabytes of text at a time: enough for the tokenizer to use every core."""
    batch, characters = [], 0
    for numbered in sources.pieces():
        batch.append(numbered)
        characters += len(numbered[1].text) + 64
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_ids(sources: Sources, vocabulary: Vocabulary, writer: Writer, report: Report) -> None:
    for number, source in enumerate(sources.files):
        for count, (ids_T, ends, position) in enumerate(read_tokens(source.path, vocabulary)):
            writer.add(ids_T)
            if ends:
                writer.end()
            if count % 4096 == 0:
                report.tell(number, position)
        report.tell(number, source.path.stat().st_size)


def _put(partial: Path, directory: Path) -> None:
    """Give the whole store its name; one that stood there before goes only when the new one has taken its place."""
    _sync(partial)
    old = directory.parent / f".{directory.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(directory: Path, error: OSError, report: Report) -> RooflightError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RooflightError(f"{error.filename or directory}: {error.strerror or error}; mend that and start again")
    needed = report.bytes_written * report.before[-1] / max(report.read, 1)
    free = shutil.disk_usage(directory.parent).free
    return RooflightError(
        f"{directory}: the disk is full; the tokens need about {needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free; "
        "make room, or name a directory on another disk with --data-cache"
    )
