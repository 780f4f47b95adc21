"""Token ids that others wrote become the same documents whatever file they came in, and bad files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rooflight.errors import InvalidValue
from rooflight.train.data import Vocabulary, token_files, tokenize
from tests.train.data.corpus import ids_of


def test_foreign_token_files(tmp_path: Path) -> None:
    vocabulary = Vocabulary(100, 9, "")
    expected = [[1, 2, 9], [3, 9], [4, 5, 6, 9]]
    after = np.array([1, 2, 9, 3, 9, 4, 5, 6, 9])
    before = np.array([9, 1, 2, 9, 9, 3, 9, 4, 5, 6])
    header = np.zeros(256, dtype="<i4")
    files = {"after.bin": after.astype("<u2"), "before.bin": before.astype("<u2"), "open.bin": after[:-1].astype("<u2")}
    for name, ids in files.items():
        ids.tofile(tmp_path / name)
    for magic, dtype in ((20240520, "<u2"), (20240801, "<u4")):
        header[:3] = magic, 1, len(before)
        (tmp_path / f"{magic}.bin").write_bytes(header.tobytes() + before.astype(dtype).tobytes())
    for dtype in ("uint16", "uint32", "int32"):
        np.save(tmp_path / f"{dtype}.npy", before.astype(dtype))
    paths = sorted(tmp_path.glob("*.*"))
    assert len(paths) == 8
    for path in paths:
        assert ids_of(tokenize([str(path)], vocabulary, tmp_path / "store" / path.name)) == expected, path.name
    together = tokenize([str(tmp_path / "*.npy")], vocabulary, tmp_path / "store" / "together")
    assert ids_of(together) == expected * 3


def test_blocks_do_not_cut_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9, 10, 11, 0, 12], dtype="<u2")
    ids.tofile(tmp_path / "a.bin")
    for block in range(1, 16):
        monkeypatch.setattr(token_files, "_BLOCK", block)
        held = tokenize([str(tmp_path / "a.bin")], Vocabulary(20, 0, ""), tmp_path / f"store{block}")
        assert ids_of(held) == [[1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 10, 11, 0], [12, 0]], block


@pytest.mark.parametrize(
    ("name", "ids", "match"),
    [
        ("a.bin", np.array([1, 100], dtype="<u2"), "holds the token id 100, the tokenizer has ids 0 to 99"),
        ("a.npy", np.array([1, -5], dtype=np.int32), "holds the token id -5"),
        ("a.npy", np.array([[1, 2]], dtype=np.int32), r"holds int32 of shape \[1, 2\]; token ids are a flat array"),
        ("a.npy", np.array([1.0]), "holds float64"),
        ("a.bin", np.array([1, 2, 3], dtype=np.uint8), "has 3 bytes, which is no whole number of uint16"),
        ("a.bin", np.array([], dtype="<u2"), "holds no token ids"),
        ("a.bin", np.array([9, 9], dtype="<u2"), "holds no token but the end of text"),
        ("a.npy", None, r"is no \.npy array"),
    ],
)
def test_bad_token_files(name: str, ids: np.ndarray | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if ids is None:
        path.write_bytes(b"nothing")
    elif name.endswith("npy"):
        np.save(path, ids)
    else:
        ids.tofile(path)
    with pytest.raises(InvalidValue, match=match):
        tokenize([str(path)], Vocabulary(100, 9, ""), tmp_path / "store")
    assert not (tmp_path / "store").exists()
