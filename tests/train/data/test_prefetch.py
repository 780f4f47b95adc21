"""Batches made ahead: the same as made in place, errors where they belong, and no thread left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rooflight.errors import InvalidValue
from rooflight.train.data import Dataset, Prefetch, Rows
from tests.train.data.corpus import lengths, store


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(store(tmp_path, lengths(1, 60, 30)), 16, seed=4)


def same(a: Rows, b: Rows) -> bool:
    return (
        np.array_equal(a.tokens_BQ, b.tokens_BQ)
        and np.array_equal(a.targets_BQ, b.targets_BQ)
        and np.array_equal(a.positions_BQ, b.positions_BQ)
        and (a.lengths, a.sample_ids) == (b.lengths, b.sample_ids)
    )


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rooflight-data"]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_are_those_of_the_dataset(depth: int, dataset: Dataset) -> None:
    with Prefetch(dataset, 4, depth=depth) as batches:
        for number in range(20):
            assert batches.position == 4 * number
            assert same(next(batches), dataset.rows(4 * number, 4))
    assert not data_threads()


def test_a_position_is_enough_to_resume(dataset: Dataset) -> None:
    with Prefetch(dataset, 4) as batches:
        for _ in range(7):
            next(batches)
        position = batches.position
    with Prefetch(dataset, 4, position) as resumed:
        assert same(next(resumed), dataset.rows(28, 4))


def test_ranks_share_the_samples(dataset: Dataset) -> None:
    seen: list[int] = []
    for rank in range(3):
        with Prefetch(dataset, 2, 2 * rank, stride=6, stop=60) as batches:
            seen += [sample for rows in batches for sample in rows.sample_ids]
    assert sorted(seen) == list(range(60))


def test_it_stops_where_told(dataset: Dataset) -> None:
    with Prefetch(dataset, 4, 8, stop=20) as batches:
        assert [rows.sample_ids[0] for rows in batches] == [8, 12, 16]
        assert list(batches) == []


def test_prepare_runs_in_the_thread(dataset: Dataset) -> None:
    with Prefetch(dataset, 2, prepare=lambda rows: (rows.sample_ids, threading.current_thread().name)) as batches:
        assert next(batches) == ((0, 1), "rooflight-data")


def test_an_error_comes_where_its_batch_would(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataset.rows

    def failing(first: int, count: int) -> Rows:
        if first == 8:
            raise OSError("the disk went away")
        return whole(first, count)

    monkeypatch.setattr(dataset, "rows", failing)
    with Prefetch(dataset, 4) as batches:
        next(batches)
        next(batches)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk went away"):
                next(batches)
    assert not data_threads()


def test_it_is_made_ahead_but_not_further(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = dataset.rows
    monkeypatch.setattr(dataset, "rows", lambda first, count: made.append(first) or whole(first, count))
    with Prefetch(dataset, 4, depth=2):
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert made == [0, 4, 8], "two ready, one in hand"


def test_closing(dataset: Dataset) -> None:
    batches = Prefetch(dataset, 4)
    batches.close()
    batches.close()
    assert not data_threads()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize(("batch", "options"), [(0, {}), (4, {"stride": 2}), (4, {"depth": 0}), (4, {"start": -1})])
def test_bad_values(batch: int, options: dict[str, Any], dataset: Dataset) -> None:
    with pytest.raises(InvalidValue, match="cannot be made"):
        Prefetch(dataset, batch, **options)
