"""The text that a run trains on: files, folders, globs and data sets, resolved to an ordered list and streamed."""

from __future__ import annotations

import glob
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rooflight.errors import InvalidValue
from rooflight.train.data.folders import READERS, STORE, TOKENS, Found, Source, directory_sources, file_source
from rooflight.train.data.readers import Piece


@dataclass(frozen=True)
class Sources:
    """Files in the order in which they are read, and what was passed over on the way."""

    specs: tuple[str, ...]
    files: tuple[Source, ...]
    text_field: str
    notes: tuple[str, ...]

    @property
    def stores(self) -> tuple[Path, ...]:
        """The directories of token shards among the sources."""
        return tuple(source.path for source in self.files if source.kind == STORE)

    @property
    def tokenized(self) -> bool:
        """Whether the sources are token ids already; text and token ids are never mixed."""
        return self.files[0].kind in (TOKENS, STORE)

    def sizes(self) -> list[int]:
        """Bytes of each file on disk; of a token store its meta.json."""
        return [_stat(source)[0] for source in self.files]

    def digest(self) -> str:
        """A hash of every file's path, size and time of change, and of the field: equal while nothing has changed."""
        lines = (f"{source.kind}\0{source.path.resolve()}\0{_stat(source)}\n" for source in self.files)
        return hashlib.sha256(f"{self.text_field}\n{''.join(lines)}".encode(errors="surrogateescape")).hexdigest()

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """Every document in pieces of bounded length, each with the index of its file.

        Raises InvalidValue naming the file (and line) on corrupt input, and when there is no text at all.
        """
        if self.tokenized:
            raise InvalidValue(f"{self.files[0].path}: holds token ids, not text; name text here")
        empty = True
        for number, source in enumerate(self.files):
            for piece in READERS[source.kind](source.path, self.text_field):
                empty = empty and not piece.text
                yield number, piece
        if empty:
            raise InvalidValue(f"{' '.join(self.specs)}: holds no text; every document in it is empty")

    def documents(self) -> Iterator[str]:
        """The documents' text in order; one longer than about two million characters comes in several parts."""
        return (piece.text for _, piece in self.pieces() if piece.text)

    def sample(self, max_bytes: int) -> Iterator[str]:
        """About `max_bytes` of text drawn evenly from all documents, always the same: what a tokenizer learns from."""
        share = min(1.0, max_bytes / max(sum(self.sizes()), 1))
        taken = 0
        for number, text in enumerate(self.documents()):
            # Compressed files hold more than their size, so the draw alone does not bound what is taken.
            if taken >= max_bytes:
                return
            if share == 1.0 or zlib.crc32(number.to_bytes(8, "little")) < share * (1 << 32) or not taken:
                taken += len(text.encode("utf-8", "replace"))
                yield text


def resolve(specs: Sequence[str], text_field: str = "text") -> Sources:
    """The files that `specs` name: each a file, a folder (read recursively), a data set's directory or a glob.

    Files come in the order of the specs, sorted within each; one named twice is read once. Raises InvalidValue when a
    spec names nothing, a folder holds nothing readable, or text is mixed with token ids.
    """
    if not specs:
        raise InvalidValue(
            "--data names nothing; give text files, folders, .jsonl, .parquet, data sets or token shards"
        )
    if not text_field:
        raise InvalidValue("--text-field is empty; name the field that holds the text")
    files: dict[Path, Source] = {}
    found = Found()
    for spec in specs:
        part = _found(spec)
        if not part.sources:
            raise InvalidValue(_nothing_in(spec, part))
        for source in part.sources:
            files.setdefault(source.path.resolve(), source)
        found.extend(part)
    ordered = tuple(files.values())
    _check_unmixed(ordered)
    return Sources(tuple(specs), ordered, text_field, _notes(found))


def documents(specs: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """The text of every document that `specs` name, streamed in a fixed order; see `resolve`."""
    return resolve(specs, text_field).documents()


def _found(spec: str) -> Found:
    path = Path(spec).expanduser()
    if path.is_dir():
        return directory_sources(path)
    if path.exists():
        return Found([file_source(path)])
    if not glob.has_magic(spec):
        raise InvalidValue(f"--data {spec}: there is no such file or folder; check the path, or quote a glob")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise InvalidValue(f"--data {spec}: the glob matches nothing; check it ('**' goes through folders)")
    found = Found()
    # A recursive glob names folders as well as the files in them; the files are meant.
    for match in [match for match in matches if match.is_file()] or matches:
        if match.is_dir():
            found.extend(directory_sources(match))
        else:
            found.add(match, token_files=True)
    return found


def _nothing_in(spec: str, part: Found) -> str:
    if part.binary:
        hint = next((path for path in part.binary if path.suffix in (".bin", ".npy")), None)
        what = (
            f"--data {spec}: holds no text; {len(part.binary)} binary files, such as {part.binary[0]}, were passed over"
        )
        return what + (f"; token ids are named by a glob: {hint.parent}/*{hint.suffix}" if hint else "")
    if part.unreadable:
        return f"--data {spec}: {part.unreadable[0]} cannot be read; check its permissions"
    return f"--data {spec}: is an empty folder; put text files into it or name another"


def _check_unmixed(files: tuple[Source, ...]) -> None:
    names = {TOKENS: "token ids", STORE: "token shards of Rooflight's own"}
    first = files[0]
    for source in files:
        if source.kind != first.kind and (source.kind in names or first.kind in names):
            one, other = (names.get(kind, "text") for kind in (first.kind, source.kind))
            raise InvalidValue(f"--data mixes {one} ({first.path}) with {other} ({source.path}); give one of them")


def _notes(found: Found) -> tuple[str, ...]:
    notes = []
    for paths, words in (
        (found.binary, "passed over as binary"),
        (found.unreadable, "passed over as unreadable"),
        (found.held_out, "left out as other splits than train"),
    ):
        if paths:
            notes.append(f"{words}: {len(paths)}, such as {paths[0]}")
    return tuple(notes)


def _stat(source: Source) -> tuple[int, int]:
    path = source.path / "meta.json" if source.kind == STORE else source.path
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidValue(f"{path}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns
