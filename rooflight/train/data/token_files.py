"""Token ids that somebody else wrote: flat .bin files (also llm.c's, with a header) and .npy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rooflight.errors import InvalidValue
from rooflight.models.tokenizer import Vocabulary

_BLOCK = 1 << 20
_NPY_TYPES = ("uint16", "uint32", "int32", "int64")
# llm.c: 256 int32 of header that begin with this number and a version; then the ids, as wide as the number says.
_LLM_C = {20240520: "<u2", 20240801: "<u4"}
_LLM_C_HEADER_BYTES = 1024


def read_tokens(path: Path, vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, bool, int]]:
    """Runs of ids, whether a document ends with them, and how many bytes of the file have been read.

    The vocabulary's `eos_id` separates documents, whether it stands before or after each, and is not part of the runs.
    Raises InvalidValue on a file of another form and on ids outside of the vocabulary.
    """
    ids_T = _mapped(path)
    open_run = False
    for start in range(0, len(ids_T), _BLOCK):
        block = ids_T[start : start + _BLOCK]
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= vocabulary.size:
            wrong = low if low < 0 else high
            raise InvalidValue(
                f"{path}: holds the token id {wrong}, the tokenizer has ids 0 to {vocabulary.size - 1}; "
                "give the tokenizer that made the file"
            )
        position = (start + len(block)) * ids_T.itemsize
        at = 0
        for end in [*np.flatnonzero(block == vocabulary.eos_id).tolist(), len(block)]:
            ends = end < len(block)
            if end > at or (ends and open_run):
                yield block[at:end], ends, position
                open_run = not ends
            at = end + 1
    if open_run:
        yield ids_T[:0], True, len(ids_T) * ids_T.itemsize


def _mapped(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if path.suffix.lower() == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InvalidValue(f"{path}: is no .npy array ({error}); write it again with numpy.save") from error
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.name not in _NPY_TYPES:
            what = f"{ids.dtype.name} of shape {list(ids.shape)}" if isinstance(ids, np.ndarray) else "no array"
            raise InvalidValue(f"{path}: holds {what}; token ids are a flat array of {', '.join(_NPY_TYPES)}")
        ids = np.asarray(ids)
    else:
        offset, dtype = _form(path, size)
        if (size - offset) % dtype.itemsize:
            raise InvalidValue(
                f"{path}: has {size} bytes, which is no whole number of {dtype.name} ids; fetch it again"
            )
        count = (size - offset) // dtype.itemsize
        ids = np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))) if count else []
    if not len(ids):
        raise InvalidValue(f"{path}: holds no token ids; remove it from --data")
    return np.asarray(ids)


def _form(path: Path, size: int) -> tuple[int, np.dtype]:
    """Bytes of header and the type of the ids in a .bin file; without a header they are uint16."""
    if size >= _LLM_C_HEADER_BYTES:
        magic, _, count = np.fromfile(path, dtype="<i4", count=3).tolist()
        if magic in _LLM_C:
            dtype = np.dtype(_LLM_C[magic])
            if size - _LLM_C_HEADER_BYTES != count * dtype.itemsize:
                raise InvalidValue(
                    f"{path}: its header tells of {count} ids, its size of another number; fetch it again"
                )
            return _LLM_C_HEADER_BYTES, dtype
    return 0, np.dtype("<u2")
