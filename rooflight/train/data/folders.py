"""What a file or a directory is as a source of training data, and which of a directory's files are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.huggingface import read_json
from rooflight.train.data.readers import is_binary, read_arrow, read_jsonl, read_parquet, read_text
from rooflight.train.data.shards import META, is_store

TEXT, JSONL, PARQUET, ARROW, TOKENS, STORE = "text", "jsonl", "parquet", "arrow", "tokens", "store"
READERS: dict[str, Callable[[Path, str], Any]] = {
    TEXT: read_text, JSONL: read_jsonl, PARQUET: read_parquet, ARROW: read_arrow,
}  # fmt: skip
_KINDS = {
    ".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET, ".arrow": ARROW, ".bin": TOKENS, ".npy": TOKENS,
}  # fmt: skip
# What stands beside the data in a data set's directory and is not itself data.
_BESIDE = re.compile(
    r"(readme|license|notice|citation|dataset_infos?|state|dataset_dict)(\W.*)?|.*\.(lock|png|jpe?g|gif|pdf)", re.I
)
_SPLIT = {
    "train": re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)", re.I),
    "held out": re.compile(r"(^|[^a-z])(test(ing)?|valid(ation)?|dev|val|eval(uation)?)([^a-z]|$)", re.I),
}


@dataclass(frozen=True, slots=True)
class Source:
    """One file (or token store) to read, and how: text, jsonl, parquet, arrow, tokens or store."""

    path: Path
    kind: str


@dataclass(slots=True)
class Found:
    """What a spec or a directory gave: its sources in order, and what was passed over."""

    sources: list[Source] = field(default_factory=list)
    binary: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)

    def add(self, path: Path, token_files: bool) -> None:
        """Take a file that nobody named by itself; one that is not text, or cannot be read, is passed over."""
        kind = kind_of(path)
        try:
            binary = (kind == TOKENS and not token_files) or (kind == TEXT and is_binary(path))
        except InvalidValue:
            self.unreadable.append(path)
            return
        if binary:
            self.binary.append(path)
        else:
            self.sources.append(Source(path, kind))

    def extend(self, other: Found) -> None:
        """Append what another one found."""
        self.sources += other.sources
        self.binary += other.binary
        self.unreadable += other.unreadable
        self.held_out += other.held_out


def kind_of(path: Path) -> str:
    """What a file is by its name: text unless a suffix says otherwise; C4 calls its JSONL .json.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return JSONL if inner in (".jsonl", ".ndjson", ".json") else TEXT
    return _KINDS.get(suffixes[-1], TEXT) if suffixes else TEXT


def file_source(path: Path) -> Source:
    """A file that was named by itself; raises InvalidValue when it is no text and of no kind that is known."""
    kind = kind_of(path)
    if kind == TEXT and is_binary(path):
        raise InvalidValue(
            f"{path}: is a binary file (it holds NUL bytes), not text; "
            "name text, .jsonl, .parquet, .arrow, .bin or .npy files"
        )
    return Source(path, kind)


def directory_sources(path: Path) -> Found:
    """What a directory holds: a token store, a saved Hugging Face data set, a hub snapshot, or a folder of files."""
    if is_store(path):
        return Found([Source(path, STORE)])
    if (path / "dataset_dict.json").is_file():
        return _saved_dict(path)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return Found(_saved(path))
    if (path / "snapshots").is_dir() and (path / "blobs").is_dir():
        return directory_sources(_snapshot(path))
    files = _walk(path)
    if any(kind_of(file) in (PARQUET, JSONL, ARROW) for file in files) and all(
        kind_of(file) in (PARQUET, JSONL, ARROW) or _BESIDE.fullmatch(file.name) for file in files
    ):
        return _data_set(path, files)
    found = Found()
    for file in files:
        # Ids in a folder would need a decision between them and the text; a glob names them.
        found.add(file, token_files=False)
    return found


def _saved_dict(path: Path) -> Found:
    splits = read_json(path / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or "train" not in splits:
        names = ", ".join(str(name) for name in splits) if isinstance(splits, list) and splits else "none"
        raise InvalidValue(f"{path}: has no split 'train'; it has {names}: name the directory of one of them")
    return Found(_saved(path / "train"), held_out=[path / str(name) for name in splits if name != "train"])


def _saved(path: Path) -> list[Source]:
    """The Arrow files of `Dataset.save_to_disk` in the order that its state.json gives."""
    if not (path / "state.json").is_file():
        raise InvalidValue(f"{path}: has no state.json; it is no whole data set, save it again with save_to_disk")
    state = read_json(path / "state.json")
    entries = state.get("_data_files")
    named = [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    names = [name for name in named if isinstance(name, str)]
    if not names:
        raise InvalidValue(f"{path / 'state.json'}: names no data files; save the data set again with save_to_disk")
    if state.get("_indices_data_files"):
        raise InvalidValue(f"{path}: holds a selection by index; call flatten_indices() before save_to_disk")
    for name in names:
        if not (path / name).is_file():
            raise InvalidValue(f"{path}: the file {name} that state.json names is missing; save the data set again")
    return [Source(path / name, ARROW) for name in names]


def _snapshot(path: Path) -> Path:
    """The snapshot of a hub cache directory that its ref `main` names, or the only one."""
    main = path / "refs" / "main"
    if main.is_file() and (named := path / "snapshots" / main.read_text().strip()).is_dir():
        return named
    snapshots = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
    if len(snapshots) != 1:
        raise InvalidValue(f"{path}: holds {len(snapshots)} snapshots and no ref main; name one of snapshots/")
    return snapshots[0]


def _data_set(path: Path, files: list[Path]) -> Found:
    """The data files of a snapshot; where a name tells that a file is for training, only those that are."""
    data = [file for file in files if kind_of(file) in (PARQUET, JSONL, ARROW)]
    names = {file: str(file.relative_to(path)) for file in data}
    train = [file for file in data if _SPLIT["train"].search(names[file])]
    kept = train or [file for file in data if not _SPLIT["held out"].search(names[file])] or data
    left = set(data).difference(kept)
    return Found([Source(file, kind_of(file)) for file in kept], held_out=[file for file in data if file in left])


def _walk(path: Path) -> list[Path]:
    """Every file below `path` in sorted order; hidden ones, linked directories and token stores are left alone."""
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        if META in names and is_store(Path(folder)):
            # A run whose directory lies in the folder that it reads must not train on its own shards.
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())
