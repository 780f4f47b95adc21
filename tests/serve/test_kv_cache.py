"""The block pool against a model of lists and dictionaries that searches for everything."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from rooflight.errors import RooflightError
from rooflight.serve.kv_cache import BlockPool, chain


class Model:
    """The same pool without any index: users and content of each block, and when it was last given back."""

    def __init__(self, total: int):
        self.users = [0] * total
        self.content: list[bytes | None] = [None] * total
        self.given_back = [0] * total
        self.moment = 0

    def free(self) -> list[int]:
        return [block for block, users in enumerate(self.users) if users == 0]

    def next_taken(self) -> list[int]:
        """Blocks that may be taken next: any without content, else the one that is unused for longest."""
        free = self.free()
        empty = [block for block in free if self.content[block] is None]
        return empty or [min(free, key=lambda block: self.given_back[block])]

    def take(self, block: int) -> None:
        assert block in self.next_taken()
        self.users[block], self.content[block] = 1, None

    def keep(self, block: int, key: bytes) -> None:
        if key not in self.content and self.content[block] is None:
            self.content[block] = key

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.moment += 1
            self.users[block] -= 1
            self.given_back[block] = self.moment

    def find(self, keys: list[bytes]) -> list[int]:
        found = []
        for key in keys:
            if key not in self.content:
                break
            found.append(self.content.index(key))
        return found


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_against_the_model(seed: int) -> None:
    random = Random(seed)
    total = random.choice((1, 5, 24))
    pool, model = BlockPool(total), Model(total)
    # Chains that begin alike, as prompts do.
    chains = []
    for _ in range(6):
        begin = random.choice(chains)[: random.randint(0, 4)] if chains else []
        while len(begin) < 6:
            begin = [*begin, chain(begin[-1] if begin else b"", [random.randrange(99)] * 4)]
        chains.append(begin)
    held: list[tuple[list[int], list[bytes]]] = []
    for _ in range(1500):
        choice = random.random()
        keys = random.choice(chains)[: random.randint(1, 6)]
        if choice < 0.4:
            found = pool.find(keys)
            assert found == model.find(keys)
            fresh = len(keys) - len(found)
            unused = sum(model.users[block] == 0 for block in found)
            assert pool.unused_among(found) == unused
            if fresh + unused <= pool.free:
                pool.share(found)
                for block in found:
                    model.users[block] += 1
                taken = pool.take(fresh)
                for block in taken:
                    model.take(block)
                held.append((found + taken, keys))
        elif choice < 0.7 and held:
            blocks, own = random.choice(held)
            for block, key in list(zip(blocks, own, strict=True))[: random.randint(0, len(own))]:
                pool.keep(block, key)
                model.keep(block, key)
        elif choice < 0.99 and held:
            blocks, _ = held.pop(random.randrange(len(held)))
            pool.release(blocks)
            model.release(blocks)
        assert pool.free == len(model.free())
        assert pool.used == total - pool.free
        assert pool.cached == sum(key is not None for key in model.content)
    if any(model.users):
        with pytest.raises(RooflightError, match="are still in use without a request"):
            pool.check_idle()
    for blocks, _ in held:
        pool.release(blocks)
    pool.check_idle()


def test_what_a_released_sequence_held_is_given_up_from_its_end_and_oldest_first() -> None:
    pool = BlockPool(6)
    keys = {}
    for name in "ab":
        blocks = pool.take(3)
        keys[name] = [chain(name.encode(), [number]) for number in range(3)]
        for block, key in zip(blocks, keys[name], strict=True):
            pool.keep(block, key)
        pool.release(blocks)
    left = []
    while pool.free:
        left.append((len(pool.find(keys["a"])), len(pool.find(keys["b"]))))
        pool.take(1)
    assert left == [(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1)]


def test_a_block_that_is_found_again_is_no_longer_the_oldest() -> None:
    pool = BlockPool(2)
    for number in range(2):
        (block,) = pool.take(1)
        pool.keep(block, chain(b"", [number]))
        pool.release([block])
    first = pool.find([chain(b"", [0])])
    pool.share(first)
    pool.release(first)
    pool.take(1)
    assert pool.find([chain(b"", [0])]) == first and not pool.find([chain(b"", [1])])


def test_of_two_blocks_with_equal_content_the_first_is_found() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2)
    for block in (first, second):
        pool.keep(block, chain(b"", [7]))
    assert pool.find([chain(b"", [7])]) == [first] and pool.cached == 1
    pool.release([second])
    assert pool.take(1) == [second]
    assert pool.find([chain(b"", [7])]) == [first]


def test_equal_hashes_mean_equal_prefixes() -> None:
    keys: dict[bytes, tuple] = {}
    tokens_of_two = list(product((0, 1, 256, 2**31), repeat=2))
    for blocks in (1, 2, 3):
        for prefix in product(tokens_of_two, repeat=blocks):
            key = b""
            for tokens in prefix:
                key = chain(key, tokens)
            assert keys.setdefault(key, prefix) == prefix
    assert len(keys) == 16 + 16**2 + 16**3
    assert chain(b"", [1, 2]) == chain(b"", (1, 2))


def test_what_cannot_be_is_said() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    with pytest.raises(RooflightError, match="2 KV blocks were asked for and 1 are free"):
        pool.take(2)
    assert pool.free == 1
    pool.release(blocks)
    with pytest.raises(RooflightError, match="given back more often than it was taken"):
        pool.release(blocks[:1])
    pool.check_idle()
