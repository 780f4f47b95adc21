"""Every kind of source gives its documents in order, and every broken one says in a line what is wrong."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rooflight.errors import InvalidValue
from rooflight.train.data import documents, readers, resolve
from tests.train.data.corpus import text

TEXTS = ["first\nline", "zweites ü", "三", "", "last"]
KEPT = [sample for sample in TEXTS if sample]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_jsonl(path: Path) -> None:
    path.write_bytes(lines([{"text": sample, "n": n} for n, sample in enumerate(TEXTS)] + [{"text": None}]) + b"\n")


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(lines([{"text": sample} for sample in TEXTS])))


def write_zst(path: Path) -> None:
    path.write_bytes(pa.compress(lines([{"text": sample} for sample in TEXTS]), codec="zstd", asbytes=True))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"n": range(6), "text": [*TEXTS, None]}), path, row_group_size=2)


def write_dictionary(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string()).dictionary_encode()}), path)


def write_stream(path: Path, column: str = "text") -> None:
    table = pa.table({"n": range(6), column: [*TEXTS, None]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_file(path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def save_to_disk(path: Path, column: str = "text") -> None:
    """As `datasets.Dataset.save_to_disk` lays it out."""
    path.mkdir(parents=True)
    write_stream(path / "data-00000-of-00002.arrow", column)
    write_stream(path / "data-00001-of-00002.arrow", column)
    files = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    state = {"_data_files": files, "_fingerprint": "ab", "_format_columns": None, "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")


ROW_FILES = {
    "a.jsonl": write_jsonl, "a.jsonl.gz": write_gz, "a.json.gz": write_gz, "A.JSONL.GZ": write_gz,
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet, "b.parquet": write_dictionary, "a.arrow": write_stream, "b.arrow": write_file,
}  # fmt: skip


@pytest.mark.parametrize("name", ROW_FILES)
def test_files_of_rows(name: str, tmp_path: Path) -> None:
    ROW_FILES[name](tmp_path / name)
    assert list(documents([str(tmp_path / name)])) == KEPT


def test_text_files_and_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmark\r\nkept \xff \xe6\x9d")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("gepackt ü".encode()))
    (tmp_path / "noname").write_text("no suffix")
    given = [str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "noname")]
    assert list(documents(given)) == ["mark\r\nkept \ufffd \ufffd", "gepackt ü", "no suffix"]


def test_a_folder_is_read_in_order_and_what_is_not_text_is_told(tmp_path: Path) -> None:
    for name, content in {
        "z.py": b"z", "a.md": b"a", "sub/b.rst": b"b", "sub/deep/c": b"c", "sub-x/d.txt": b"d",
        "image.png": b"\x89\0\0", "ids.bin": b"\1\0", ".hidden": b"h",
        ".git/config": b"g", "lost.tar.gz": gzip.compress(b"x\0y"),
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / "rows.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path)
    sources = resolve([str(tmp_path)])
    assert list(sources.documents()) == ["a", *KEPT, "b", "c", "d", "z"]
    assert sources.notes == (f"passed over as binary: 3, such as {tmp_path / 'ids.bin'}",)


def test_globs_and_repeats(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "sub/c.py", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "x.py").write_bytes(b"\0")
    star = resolve([str(tmp_path / "**" / "*.py"), str(tmp_path / "sub"), str(tmp_path / "a.py")])
    assert list(star.documents()) == ["a.py", "b.py", "sub/c.py", "sub/d.txt"]
    assert len(star.notes) == 1
    assert list(documents([str(tmp_path / "sub*")])) == ["sub/c.py", "sub/d.txt"]
    (tmp_path / "odd[1].txt").write_text("odd")
    assert list(documents([str(tmp_path / "odd[1].txt")])) == ["odd"], "a name that looks like a glob"


def test_saved_data_sets(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "one")
    assert list(documents([str(tmp_path / "one")])) == KEPT * 2
    save_to_disk(tmp_path / "all" / "train")
    save_to_disk(tmp_path / "all" / "test")
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    sources = resolve([str(tmp_path / "all")])
    assert list(sources.documents()) == KEPT * 2
    assert sources.notes == (f"left out as other splits than train: 1, such as {tmp_path / 'all' / 'test'}",)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["dev", "test"]}')
    with pytest.raises(InvalidValue, match="has no split 'train'; it has dev, test"):
        resolve([str(tmp_path / "all")])
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InvalidValue, match="data-00001-of-00002.arrow that state.json names is missing"):
        resolve([str(tmp_path / "one")])


def test_a_folder_of_text_with_a_state_json_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "a.txt").write_text("text")
    assert list(documents([str(tmp_path)])) == ["text", "{}"]


def test_hub_snapshots(tmp_path: Path) -> None:
    hub = tmp_path / "datasets--who--what"
    snapshot = hub / "snapshots" / "abc"
    for folder in (hub / "blobs", hub / "refs", snapshot / "data"):
        folder.mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    write_parquet(hub / "blobs" / "0001")
    (snapshot / "data" / "train-00000-of-00001.parquet").symlink_to(hub / "blobs" / "0001")
    write_parquet(snapshot / "data" / "test-00000-of-00001.parquet")
    (snapshot / "README.md").write_text("about")
    (snapshot / ".gitattributes").write_text("*")
    for spec in (hub, snapshot):
        sources = resolve([str(spec)])
        assert list(sources.documents()) == KEPT, "train alone, and no README"
        assert len(sources.notes) == 1
    for name in ("notes.txt", "load.py", "about.md"):
        (snapshot / name).write_text("one more")
        assert len(list(documents([str(snapshot)]))) == 2 * len(KEPT) + 2, "with a text among them it is a folder"
        (snapshot / name).unlink()


def test_another_field(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set", column="content")
    assert list(documents([str(tmp_path / "set")], "content")) == KEPT * 2
    (tmp_path / "a.jsonl").write_bytes(lines([{"content": "x"}]))
    assert list(documents([str(tmp_path / "a.jsonl")], "content")) == ["x"]


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude42"}\n{"text": "\xff"}\n')
    assert list(documents([str(tmp_path / "a.jsonl")])) == ["a\ufffdb 🙂", "\ufffd"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_long_documents_come_in_parts_that_are_cut_at_seams(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "_BLOCK", 300)
    whole = text(1, 2000) + "x" * 5000 + "\n\n \n".join("abc" * 900)
    (tmp_path / name).write_bytes(whole.encode() if name == "a.txt" else lines([{"text": whole}, {"text": "two"}]))
    pieces = [piece for _, piece in resolve([str(tmp_path / name)]).pieces()]
    first = pieces[: -1 if name == "a.jsonl" else None]
    assert "".join(piece.text for piece in first) == whole
    assert [piece.ends for piece in first] == [False] * (len(first) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= 1300 and len(first) > 5
    assert pieces[0].text[-1] == "\n" and not pieces[0].text[-2].isspace() and not pieces[1].text[0].isspace()


def test_a_sample_is_even_bounded_and_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": f"{n:06}" * 20} for n in range(2000)]))
    sources = resolve([str(tmp_path / "a.jsonl")])
    some = list(sources.sample(24_000))
    assert some == list(sources.sample(24_000))
    assert 120 < len(some) <= 201
    assert sum(int(sample[:6]) for sample in some) / len(some) == pytest.approx(1000, abs=150)
    assert list(sources.sample(10**9)) == list(sources.documents())


def test_the_digest_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    seen = {resolve([str(tmp_path)]).digest(), resolve([str(tmp_path / "a.txt")]).digest()}
    assert len(seen) == 1, "the same file however it is named"
    seen.add(resolve([str(tmp_path)], "other").digest())
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.add(resolve([str(tmp_path)]).digest())
    (tmp_path / "b.txt").write_text("two")
    seen.add(resolve([str(tmp_path)]).digest())
    assert len(seen) == 4


def broken(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return make


def cut_short(name: str, write: Callable[[Path], None]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        write(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        return str(folder / name)

    return make


BROKEN: dict[str, tuple[Callable[[Path], str], str]] = {
    "nothing": (lambda folder: str(folder / "nowhere"), "there is no such file or folder"),
    "no match": (lambda folder: str(folder / "*.nope"), "the glob matches nothing"),
    "empty folder": (lambda folder: str(folder), "is an empty folder"),
    "binary": (broken("a.txt", b"a\0b"), r"a\.txt: is a binary file"),
    "token ids in a folder": (lambda folder: broken("a.bin", b"\1\0")(folder)[:-6], r"by a glob: .*/\*\.bin"),
    "empty text": (broken("a.txt", b""), "holds no text; every document in it is empty"),
    "empty rows": (broken("a.jsonl", b'{"text": ""}\n\n'), "holds no text"),
    "no JSON": (broken("a.jsonl", b'{"text": "a"}\n{"text": \n'), r"a\.jsonl:2: is no JSON \(Expecting value"),
    "no object": (broken("a.jsonl", b"[1]\n"), r"a\.jsonl:1: holds a list where an object"),
    "no field": (broken("a.jsonl", b'{"body": "x", "id": 1}\n'), r":1: has no field 'text'; it has body, id: name one"),
    "a number": (broken("a.jsonl", b'{"text": 3}\n'), r":1: the field 'text' holds a number, not text"),
    "deep": (broken("a.jsonl", b"[" * 200_000), r":1: is no JSON \(nested too deep"),
    "gzip cut short": (cut_short("a.jsonl.gz", write_gz), r"a\.jsonl\.gz:\d+: cannot be read on .*truncated"),
    "no gzip": (broken("a.jsonl.gz", b"plain"), r"a\.jsonl\.gz:1: cannot be read on"),
    "text gzip": (broken("a.txt.gz", b"plain"), r"a\.txt\.gz: cannot be read on"),
    "zstd cut short": (cut_short("a.jsonl.zst", write_zst), r"a\.jsonl\.zst:\d+: cannot be read on"),
    "parquet cut short": (cut_short("a.parquet", write_parquet), r"a\.parquet: is not a whole Parquet file"),
    "no parquet": (broken("a.parquet", b""), r"a\.parquet: is not a whole Parquet file"),
    "arrow cut short": (cut_short("a.arrow", write_stream), r"a\.arrow: is not a whole Arrow file"),
    "no arrow": (broken("a.arrow", b"x" * 100), r"a\.arrow: is not a whole Arrow file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, tmp_path: Path) -> None:
    make, match = BROKEN[name]
    spec = make(tmp_path)
    with pytest.raises(InvalidValue, match=match) as caught:
        list(documents([spec]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_are_not_there_or_no_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    (write_parquet if kind == "parquet" else write_stream)(path)
    with pytest.raises(InvalidValue, match="has no field 'body'; it has n, text"):
        list(documents([str(path)], "body"))
    with pytest.raises(InvalidValue, match="the column 'n' holds int64, not text"):
        list(documents([str(path)], "n"))


def test_no_specs_and_no_field(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="--data names nothing"):
        resolve([])
    with pytest.raises(InvalidValue, match="--text-field is empty"):
        resolve([str(tmp_path)], "")
