"""Small corpora for the tests of the training data: words from a fixed seed, and stores with chosen documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rooflight.train.data import Store, Vocabulary, tokenize

WORDS = (
    "the",
    "of",
    "and",
    "attention",
    "gradient",
    "été",
    "naïve",
    "東京",
    "модель",
    "🙂",
    "x = y + 1;",
    "def",
    "    return",
)


def text(seed: int, words: int) -> str:
    """Words and line ends, the same for a seed."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(" \n") for _ in range(words))


def store(directory: Path, lengths: Sequence[int], shard_tokens: int = 1 << 20) -> Store:
    """A store whose tokens are all different (1, 2, 3 …) but for the ends of documents (0); lengths count the ends."""
    directory.mkdir(parents=True, exist_ok=True)
    ids: list[int] = []
    for length in lengths:
        first = len(ids) + 1
        ids += [*range(first, first + length - 1), 0]
    np.save(directory / "ids.npy", np.array(ids, dtype=np.int64))
    vocabulary = Vocabulary(max(ids) + 1, 0, "counted")
    return tokenize([str(directory / "ids.npy")], vocabulary, directory / "store", shard_tokens=shard_tokens)


def lengths(seed: int, count: int, most: int) -> list[int]:
    """Document lengths from 2 to `most`, the same for a seed."""
    draw = random.Random(seed)
    return [draw.randint(2, most) for _ in range(count)]


def ids_of(held: Store) -> list[list[int]]:
    """The ids of every document."""
    return [held.document(number).tolist() for number in range(held.documents)]
