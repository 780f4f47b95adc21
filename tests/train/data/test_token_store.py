"""The store of token ids: what is written is what the tokenizer says, and no half of one is ever taken for whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from rooflight.errors import InvalidValue, RooflightError
from rooflight.train.data import (
    Progress,
    Tokenizer,
    Vocabulary,
    documents,
    open_shards,
    readers,
    resolve,
    tokenize,
    writer,
)
from tests.train.data.corpus import ids_of, store, text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([text(0, 3000)], 320)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(20):
        path = tmp_path / "text" / f"{number:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(number, 20 * number), encoding="utf-8")
    return tmp_path / "text"


@pytest.mark.parametrize("shard_tokens", [1, 500, 1 << 29])
def test_documents_are_their_encodings(shard_tokens: int, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    held = tokenize([str(folder)], tokenizer, tmp_path / "store", shard_tokens=shard_tokens)
    expected = [[*tokenizer.encode(sample), tokenizer.eos_id] for sample in documents([str(folder)]) if sample]
    assert ids_of(held) == expected
    assert held.tokens == sum(map(len, expected))
    assert len(held.files) == {1: 19, 500: len(held.files), 1 << 29: 1}[shard_tokens]
    assert shard_tokens != 500 or 5 < len(held.files) < 19
    assert held.files[0].dtype == np.uint16
    again = open_shards(tmp_path / "store", verify=True)
    assert ids_of(again) == expected and again.vocabulary == tokenizer.vocabulary
    assert Tokenizer.load(tmp_path / "store").fingerprint() == tokenizer.fingerprint()


def test_runs_from_several_files_come_in_the_order_asked(tmp_path: Path) -> None:
    held = store(tmp_path, [7, 5, 9, 30, 4] * 5, shard_tokens=20)
    assert len(held.files) > 4
    stream = np.concatenate([held.document(number) for number in range(held.documents)])
    starts = held.starts_N1[:-1][::-1] + 1
    lengths = np.diff(held.starts_N1)[::-1] - 2
    expected = [stream[start : start + length] for start, length in zip(starts, lengths)]
    assert held.read(starts, lengths).tolist() == np.concatenate(expected).tolist()


def test_a_long_document_is_one_document(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text(5, 3000)
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "_BLOCK", 500)
    held = tokenize([str(tmp_path / "a.txt")], tokenizer, tmp_path / "store")
    assert ids_of(held) == [[*tokenizer.encode(whole), tokenizer.eos_id]], "cut at seams, no token differs"


def test_wide_ids(tmp_path: Path) -> None:
    ids = np.array([5, 70_000, 0, 65_536, 0], dtype=np.int64)
    np.save(tmp_path / "a.npy", ids)
    held = tokenize([str(tmp_path / "a.npy")], Vocabulary(70_001, 0, ""), tmp_path / "store")
    assert held.files[0].dtype == np.uint32
    assert ids_of(held) == [[5, 70_000, 0], [65_536, 0]]


def built_at(directory: Path) -> int:
    return (directory / "meta.json").stat().st_mtime_ns


def test_it_is_made_once_and_again_when_something_changed(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    place = tmp_path / "store"
    tokenize([str(folder)], tokenizer, place)
    first = built_at(place)
    tokenize(resolve([str(folder / "*.txt")]), tokenizer, place)
    assert built_at(place) == first, "the same files and tokenizer"
    (folder / "05.txt").write_text("changed")
    held = tokenize([str(folder)], tokenizer, place)
    assert built_at(place) != first and tokenizer.decode(held.document(4)[:-1].tolist()) == "changed"
    second = built_at(place)
    assert tokenize([str(folder)], Tokenizer.bytes(), place).vocabulary.size == 256
    assert built_at(place) != second
    (place / "tokens-00000.bin").write_bytes(b"")
    assert tokenize([str(folder)], Tokenizer.bytes(), place).tokens > 1000, "a damaged one is made again"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".store.lock", "store", "text"]


def test_progress(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[Progress] = []
    held = tokenize([str(folder)], tokenizer, tmp_path / "store", seen.append)
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert seen[-1] == Progress(total, total, held.documents, held.tokens)
    assert [entry.bytes_read for entry in seen] == sorted(entry.bytes_read for entry in seen)


def test_stores_are_sources(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    one = tokenize([str(folder / "0*")], tokenizer, tmp_path / "one", shard_tokens=300)
    two = tokenize([str(folder / "1*")], tokenizer, tmp_path / "two")
    both = tokenize([str(tmp_path / "one"), str(tmp_path / "two")], None, tmp_path / "unused")
    assert ids_of(both) == ids_of(one) + ids_of(two)
    assert both.documents == one.documents + two.documents and not (tmp_path / "unused").exists()
    assert resolve([str(tmp_path / "o*")]).stores == (tmp_path / "one",)
    with pytest.raises(InvalidValue, match="made with another tokenizer than the one given"):
        tokenize([str(tmp_path / "one")], Tokenizer.bytes(), tmp_path / "unused")
    tokenize([str(folder)], Tokenizer.bytes(), tmp_path / "bytes")
    with pytest.raises(InvalidValue, match="were made with different tokenizers"):
        open_shards(tmp_path / "one", tmp_path / "bytes")
    with pytest.raises(InvalidValue, match="mixes text .* with token shards of Rooflight's own"):
        resolve([str(folder), str(tmp_path / "one")])


def test_a_run_inside_its_own_data_does_not_read_itself(folder: Path, tokenizer: Tokenizer) -> None:
    before = resolve([str(folder)]).digest()
    tokenize([str(folder)], tokenizer, folder / "run" / "data")
    assert resolve([str(folder)]).digest() == before


def test_text_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    for nothing in (None, Vocabulary(300, 0, "")):
        with pytest.raises(InvalidValue, match="needs a tokenizer; name one with --tokenizer"):
            tokenize([str(folder)], nothing, tmp_path / "store")


def test_what_is_there_already_is_not_touched(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years of work")
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis"):
        with pytest.raises(InvalidValue, match="holds other files"):
            tokenize([str(folder)], tokenizer, place)
    assert (tmp_path / "mine" / "thesis").read_text() == "years of work"


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".store.lock")


def onto_a_full_disk(path: Path) -> BinaryIO:
    return open("/dev/full", "wb", buffering=1 << 20) if path.name.endswith("0.bin") else path.open("wb")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the full disk is Linux's /dev/full")
def test_a_full_disk(folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokenize([str(folder / "1*")], tokenizer, tmp_path / "out" / "store").tokens
    monkeypatch.setattr(writer, "open_file", onto_a_full_disk)
    with pytest.raises(RooflightError, match=r"out/store: the disk is full; .* need about \d+\.\d\d GiB, .* are free"):
        tokenize([str(folder)], tokenizer, tmp_path / "out" / "store")
    assert left_in(tmp_path / "out") == ["store"], "the partial store is gone"
    assert open_shards(tmp_path / "out" / "store", verify=True).tokens == before, "the older one is whole"


def test_an_interrupt(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([str(folder)], tokenizer, tmp_path / "out" / "store", interrupt)
    assert left_in(tmp_path / "out") == []


def build_slowly(folder: Path, place: Path, ready: Path) -> None:
    def wait(progress: Progress) -> None:
        ready.touch()
        time.sleep(60)

    tokenize([str(folder)], Tokenizer.bytes(), place, wait)


def build_at_once(folder: Path, place: Path) -> None:
    tokenize([str(folder)], Tokenizer.bytes(), place)


def test_kill_minus_nine(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "store"
    child = multiprocessing.get_context("spawn").Process(target=build_slowly, args=(folder, place, tmp_path / "ready"))
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert left_in(tmp_path / "out") == [".store.partial"]
    assert not place.exists()
    held = tokenize([str(folder)], Tokenizer.bytes(), place)
    assert held.documents == 19 and left_in(tmp_path / "out") == ["store"]


def test_two_at_once_make_one(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "store"
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=build_at_once, args=(folder, place)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert open_shards(place, verify=True).documents == 19 and left_in(tmp_path / "out") == ["store"]


def test_damage_is_named(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    place = tmp_path / "store"
    tokenize([str(folder)], tokenizer, place)
    tokens = place / "tokens-00000.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    open_shards(place)
    with pytest.raises(InvalidValue, match=r"tokens-00000\.bin: its content is not what was written"):
        open_shards(place, verify=True)
    tokens.write_bytes(whole[:-2])
    with pytest.raises(InvalidValue, match=rf"tokens-00000\.bin: has {len(whole) - 2} bytes where .* {len(whole)}"):
        open_shards(place)
    tokens.unlink()
    with pytest.raises(InvalidValue, match=r"tokens-00000\.bin: is missing"):
        open_shards(place)
    meta = json.loads((place / "meta.json").read_text())
    for change, match in (({"version": 99}, "is of version 99"), ({"files": []}, "names no files")):
        (place / "meta.json").write_text(json.dumps({**meta, **change}))
        with pytest.raises(InvalidValue, match=match):
            open_shards(place)
    (place / "meta.json").write_text("{")
    with pytest.raises(InvalidValue, match="is no store of token shards"):
        open_shards(place)
    with pytest.raises(InvalidValue, match="no directory of token shards"):
        open_shards()
