"""Rows against a second packing in plain Python, and what must hold of every order and every split."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rooflight.errors import InvalidValue
from rooflight.train.data import IGNORE, Dataset, Rows, Store
from rooflight.train.data.order import key_of, mixed, permuted
from tests.train.data.corpus import lengths, store

SHAPES = {
    "many short documents": (lengths(1, 300, 9), 16, 1 << 20),
    "documents longer than rows": (lengths(2, 20, 400), 32, 1 << 20),
    "several files": (lengths(3, 100, 60), 25, 97),
    "rows of one token": (lengths(4, 30, 5), 1, 40),
    "borders fall together": ([8] * 40, 16, 64),
    "documents of an end alone and longer": ([2, 3, 2, 50, 2, 2, 31, 2] * 4, 7, 1 << 20),
}


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def shape(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, int]:
    document_lengths, context, shard_tokens = SHAPES[request.param]
    return store(tmp_path, document_lengths, shard_tokens), context


def documents_of(held: Store) -> list[list[int]]:
    return [held.document(number).tolist() for number in range(held.documents)]


def packed_by_hand(documents: list[list[int]], context: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (token, target, position), token by token: the second implementation."""
    stream = []
    for document in documents:
        for place, token in enumerate(document):
            stream.append((token, document[place + 1] if place + 1 < len(document) else IGNORE, place == 0))
    rows = []
    for start in range(0, len(stream) - context + 1, context):
        row, position = [], 0
        for token, target, begins in stream[start : start + context]:
            position = 0 if begins or not row else position + 1
            row.append((token, target, position))
        rows.append(row)
    return rows


def as_triples(rows: Rows) -> list[list[tuple[int, int, int]]]:
    both = zip(rows.tokens_BQ.tolist(), rows.targets_BQ.tolist(), rows.positions_BQ.tolist())
    return [list(zip(*row)) for row in both]


def test_every_row_is_as_packed_by_hand(shape: tuple[Store, int]) -> None:
    held, context = shape
    dataset = Dataset(held, context, seed=3)
    documents = documents_of(held)
    # Every token but the ends is unique, so the rows themselves tell in which order the documents were laid.
    order = permuted(np.arange(len(documents)), len(documents), key_of(3, 2)).tolist()
    assert sorted(order) == list(range(len(documents)))
    expected = packed_by_hand([documents[number] for number in order], context)
    found = as_triples(dataset.rows(0, dataset.rows_per_epoch))
    assert len(found) == len(expected) == dataset.rows_per_epoch == held.tokens // context
    assert sorted(found) == sorted(expected)


def test_lengths_tell_the_pieces(shape: tuple[Store, int]) -> None:
    held, context = shape
    rows = Dataset(held, context, seed=1).rows(0, 12)
    for position_Q, pieces in zip(rows.positions_BQ, rows.lengths):
        assert sum(pieces) == context and min(pieces) > 0
        assert position_Q.tolist() == [place for length in pieces for place in range(length)]
    assert rows.tokens_BQ.dtype == rows.targets_BQ.dtype == rows.positions_BQ.dtype == np.int64
    assert rows.targets == sum(target != IGNORE for row in rows.targets_BQ.tolist() for target in row)


def test_an_epoch_holds_every_token_once(shape: tuple[Store, int]) -> None:
    held, context = shape
    dataset = Dataset(held, context, seed=9)
    everything = sorted(token for document in documents_of(held) for token in document)
    for epoch in range(2):
        seen = sorted(dataset.rows(epoch * dataset.rows_per_epoch, dataset.rows_per_epoch).tokens_BQ.flatten().tolist())
        left = len(everything) - len(seen)
        assert 0 <= left < context
        if left == 0:
            assert seen == everything
        # All but the ends are unique: what was seen was seen once and exists.
        unique = [token for token in seen if token]
        assert len(set(unique)) == len(unique) and set(unique) <= set(everything)


def test_every_token_but_the_first_is_a_target_once(shape: tuple[Store, int]) -> None:
    held, context = shape
    dataset = Dataset(held, context, seed=9)
    rows = dataset.rows(0, dataset.rows_per_epoch)
    follows = {a: b for document in documents_of(held) for a, b in pairwise(document)}
    for token, target in zip(rows.tokens_BQ.flatten().tolist(), rows.targets_BQ.flatten().tolist()):
        assert target == (IGNORE if token == 0 else follows[token])


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_the_order_knows_no_batch_size(batch: int, shape: tuple[Store, int]) -> None:
    held, context = shape
    total = 192
    straight = as_triples(Dataset(held, context, seed=5).rows(0, total))
    again = Dataset(held, context, seed=5)
    assert [row for n in range(0, total, batch) for row in as_triples(again.rows(n, batch))] == straight
    resumed = Dataset(held, context, seed=5).rows(100, 20)
    assert as_triples(resumed) == straight[100:120]
    assert resumed.sample_ids == tuple(range(100, 120))


def test_epochs_and_seeds_differ(tmp_path: Path) -> None:
    held = store(tmp_path, lengths(1, 300, 40))
    dataset = Dataset(held, 16, seed=5)
    count = dataset.rows_per_epoch
    first, second = as_triples(dataset.rows(0, count)), as_triples(dataset.rows(count, count))
    assert first != second and sorted(first) == sorted(second), "another order of the same rows"
    other = as_triples(Dataset(held, 16, seed=6).rows(0, count))
    assert sorted(other) != sorted(first), "another seed packs other rows"
    assert dataset.epoch(count) == 1.0


def test_held_out_text_is_never_trained_on(shape: tuple[Store, int]) -> None:
    held, context = shape
    dataset = Dataset(held, context, seed=2, holdout=0.2)
    train = set(dataset.rows(0, 2 * dataset.rows_per_epoch).tokens_BQ.flatten().tolist()) - {0}
    rows = dataset.held_out(1 << 20)
    apart = set(rows.tokens_BQ.flatten().tolist()) - {0}
    assert len(rows.tokens_BQ) == dataset.held_out_rows > 0
    assert (apart or context == 1) and not train & apart
    left = held.tokens - (dataset.rows_per_epoch + dataset.held_out_rows) * context
    assert 0 <= left <= 2 * (context - 1)


def test_held_out_documents_are_whole_and_the_same_for_every_seed(tmp_path: Path) -> None:
    held = store(tmp_path, lengths(7, 2000, 30))
    one, other = Dataset(held, 8, seed=1, holdout=0.1), Dataset(held, 8, seed=2, holdout=0.1)
    assert as_triples(one.held_out(50)) == as_triples(other.held_out(50))
    assert as_triples(one.held_out(50))[20:30] == as_triples(one.held_out(10, first=20))
    apart = set(one.held_out(1 << 20).tokens_BQ.flatten().tolist()) - {0}
    chosen = [document for document in documents_of(held) if set(document) & apart]
    assert 120 < len(chosen) < 280, "about a tenth of 2,000 documents"
    train = set(one.rows(0, one.rows_per_epoch).tokens_BQ.flatten().tolist()) - {0}
    assert not any(set(document) & train for document in chosen), "a document is on one side only"


def test_at_least_one_document_is_held_out(tmp_path: Path) -> None:
    held = store(tmp_path, [20, 20, 20])
    dataset = Dataset(held, 10, holdout=0.001)
    assert dataset.held_out_rows == 2 and dataset.rows_per_epoch == 4


def test_one_huge_document_gives_its_end(tmp_path: Path) -> None:
    held = store(tmp_path, [1000])
    dataset = Dataset(held, 10, holdout=0.1)
    assert dataset.rows_per_epoch == 90 and dataset.held_out_rows == 10
    tail = [token for row in dataset.held_out(10).tokens_BQ.tolist() for token in row]
    assert tail == [*range(901, 1000), 0]
    rows = dataset.rows(0, 90)
    cut = rows.targets_BQ[rows.tokens_BQ == 900]
    assert cut.tolist() == [IGNORE], "what follows the cut is held out, also as a target"


def test_too_little_text(tmp_path: Path) -> None:
    held = store(tmp_path, [5, 6])
    with pytest.raises(InvalidValue, match="has 11 tokens, less than one row of --context 12"):
        Dataset(held, 12)
    assert Dataset(held, 11).rows_per_epoch == 1
    with pytest.raises(InvalidValue, match="11 tokens in 2 documents, too few for a row of --context 8"):
        Dataset(held, 8, holdout=0.1)
    with pytest.raises(InvalidValue, match="--context 0"):
        Dataset(held, 0)
    with pytest.raises(InvalidValue, match=r"--holdout 1\.0"):
        Dataset(held, 4, holdout=1.0)
    with pytest.raises(InvalidValue, match="no held-out text"):
        Dataset(held, 4).held_out(1)
    with pytest.raises(InvalidValue, match="samples -1 to 0"):
        Dataset(held, 4).rows(-1, 2)
    with pytest.raises(InvalidValue, match="has 1 rows; 2 from 1"):
        Dataset(held, 4, holdout=0.1).held_out(2, first=1)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permutations(size: int) -> None:
    orders = [permuted(np.arange(size), size, key).tolist() for key in range(8)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 7 or len({tuple(order) for order in orders}) == 8
    some = np.array([0, size - 1, size // 2])
    assert permuted(some, size, 3).tolist() == [orders[3][place] for place in some]


def test_permutations_are_even_and_never_change() -> None:
    # Chi-squared over where each of 10 positions goes, 81 degrees of freedom: 99.99% lie below 138.
    count = np.zeros((10, 10))
    for key in range(4000):
        count[np.arange(10), permuted(np.arange(10), 10, key_of(key))] += 1
    assert ((count - 400) ** 2 / 400).sum() < 138
    # A run that is resumed with a later release must find its order again.
    assert permuted(np.arange(10), 10, key_of(1, 2, 3)).tolist() == [4, 0, 3, 9, 8, 7, 5, 1, 6, 2]


def test_the_hash_is_splitmix64() -> None:
    # The first numbers of the published generator from the seed 1234567.
    golden, state = 0x9E3779B97F4A7C15, 1234567
    states = np.array([(state + step * golden) % (1 << 64) for step in range(3)], dtype=np.uint64)
    assert mixed(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
