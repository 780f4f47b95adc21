"""Each kind of text file as a stream of pieces of documents, so that no file is ever held whole."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rooflight.errors import InvalidValue

PIECE_CHARACTERS = 2 << 20
_BLOCK = 1 << 20
_SNIFFED = 8 << 10
# Between these two characters every tokenizer in use cuts anyway: a line end after a word, and the next line's first
# letter. Cutting a long document there changes none of its tokens.
_SEAM = re.compile(r"\S\n(?=\S)")


class Piece(NamedTuple):
    """Part of a document, whether the document ends with it, and how many bytes of the file have been read."""

    text: str
    ends: bool
    position: int


def read_text(path: Path, field: str) -> Iterator[Piece]:
    """A text file (also .gz or .zst) as one document; bytes that are no UTF-8 become U+FFFD."""
    with opened(path) as (stream, position):
        decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        held = ""
        while True:
            try:
                block = stream.read(_BLOCK)
            except (OSError, EOFError, zlib.error) as error:
                raise _broken(path, error) from error
            held += decoder.decode(block, final=not block)
            if not block:
                break
            if len(held) > PIECE_CHARACTERS:
                at = _seam(held)
                yield Piece(held[:at], False, position())
                held = held[at:]
        yield Piece(held, True, position())


def read_jsonl(path: Path, field: str) -> Iterator[Piece]:
    """A JSON object a line (also .gz or .zst), its `field` a document each; null and empty ones are left out.

    Raises InvalidValue with file and line on anything else.
    """
    with opened(path) as (stream, position):
        number = 0
        while True:
            number += 1
            try:
                line = stream.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise _broken(path, error, number) from error
            if not line:
                return
            if not line.strip():
                continue
            yield from _pieces(_field(line, f"{path}:{number}", field), position())


def _field(line: bytes, where: str, field: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig", errors="replace"))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        )
        raise InvalidValue(f"{where}: is no JSON ({reason}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise InvalidValue(f"{where}: holds {_kind(row)} where an object with a field {field!r} is expected")
    if field not in row:
        raise no_field(where, field, list(row))
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InvalidValue(
            f"{where}: the field {field!r} holds {_kind(text)}, not text; name another with --text-field"
        )
    # JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_parquet(path: Path, field: str) -> Iterator[Piece]:
    """A Parquet file, its column `field` a document a row; null and empty ones are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            _check_column(path, file.schema_arrow, field)
            rows, size, done = max(file.metadata.num_rows, 1), path.stat().st_size, 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                done += batch.num_rows
                yield from _column(batch.column(batch.schema.names.index(field)), size * done // rows)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, "Parquet", error) from error


def read_arrow(path: Path, field: str) -> Iterator[Piece]:
    """An Arrow file as Hugging Face datasets keep them (a stream, or the older file form), a document a row."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            for batch in _arrow_batches(path, source, field):
                column = batch.column(batch.schema.names.index(field))
                for start in range(0, len(column), 256):
                    yield from _column(column.slice(start, 256), source.tell())
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, "Arrow", error) from error


def _arrow_batches(path: Path, source: Any, field: str) -> Iterator[Any]:
    import pyarrow as pa

    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        _check_column(path, file.schema, field)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        _check_column(path, stream.schema, field)
        yield from stream


def _check_column(path: Path, schema: Any, field: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise no_field(str(path), field, schema.names)
    kind = schema.field(field).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    textual = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(test(inner) for test in textual):
        raise InvalidValue(f"{path}: the column {field!r} holds {kind}, not text; name another with --text-field")


def _column(column: Any, position: int) -> Iterator[Piece]:
    import pyarrow as pa

    if pa.types.is_null(column.type):
        return
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # As bytes, for a column may hold strings that are no UTF-8.
    for value in column.cast(pa.large_binary()).to_pylist():
        yield from _pieces((value or b"").decode("utf-8", errors="replace"), position)


def _pieces(text: str, position: int) -> Iterator[Piece]:
    """A document that is in memory already, in pieces of bounded length; an empty one gives none."""
    while len(text) > PIECE_CHARACTERS:
        at = _seam(text)
        yield Piece(text[:at], False, position)
        text = text[at:]
    if text:
        yield Piece(text, True, position)


def _seam(text: str) -> int:
    """Where to cut a text of more than PIECE_CHARACTERS: the last seam before that, a line end, or just there."""
    start = PIECE_CHARACTERS // 2
    at = max((match.end() for match in _SEAM.finditer(text, start, PIECE_CHARACTERS)), default=0)
    return at or text.rfind("\n", start, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file for reading, unpacked if its name ends in .gz or .zst, and a function that tells how far in it we are."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidValue(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        stream: Any = file
        if path.suffix.lower() == ".gz":
            stream = gzip.GzipFile(fileobj=file)
        elif path.suffix.lower() == ".zst":
            import pyarrow as pa

            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), _BLOCK)
        yield stream, file.tell


def is_binary(path: Path) -> bool:
    """Whether what a file holds, unpacked, has a NUL byte in its first 8 KiB; InvalidValue when it cannot be read."""
    with opened(path) as (stream, _):
        try:
            return b"\0" in stream.read(_SNIFFED)
        except (OSError, EOFError, zlib.error) as error:
            raise _broken(path, error) from error


def no_field(where: str, field: str, present: list[str]) -> InvalidValue:
    """The error for a row or a file without the field that was asked for."""
    names = ", ".join(present[:12]) + (", …" if len(present) > 12 else "")
    return InvalidValue(
        f"{where}: has no field {field!r}; it has {names or 'none'}: name one of them with --text-field"
    )


def _broken(path: Path, error: Exception, line: int | None = None) -> InvalidValue:
    where = f"{path}:{line}" if line else str(path)
    return InvalidValue(
        f"{where}: cannot be read on ({_first_line(error)}); it is truncated or corrupt, fetch it again"
    )


def _corrupt(path: Path, what: str, error: Exception) -> InvalidValue:
    return InvalidValue(
        f"{path}: is not a whole {what} file ({_first_line(error)}); it is truncated or corrupt, fetch it again"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
