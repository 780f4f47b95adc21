"""`BlockPool`: the blocks of the paged KV cache, counted by who uses them, and found again by what they hold.

A full block is known by the hash of all tokens up to its end (a chain, so that equal hashes mean equal prefixes); while
nobody uses it, it stays until its room is needed, the longest unused first. Paged attention: 2309.06180.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from rooflight.errors import RooflightError

_DIGEST_BYTES = 16


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block: of its tokens, and of all blocks before it through `parent` (empty for the first)."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=_DIGEST_BYTES).digest()


class BlockPool:
    """`total` blocks, numbered from 0: each is used by one request or more, or free, and then perhaps still cached."""

    def __init__(self, total: int):
        self.total = total
        self._users = [0] * total
        self._hash_of: list[bytes | None] = [None] * total
        self._by_hash: dict[bytes, int] = {}
        # In the order in which they are taken: without content first, then the longest unused.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))

    @property
    def free(self) -> int:
        """Blocks that nobody uses, cached ones included."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that a request uses."""
        return self.total - len(self._free)

    @property
    def cached(self) -> int:
        """Blocks whose content can be found again, used or not."""
        return len(self._by_hash)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix that is cached."""
        found: list[int] = []
        for key in hashes:
            block = self._by_hash.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def unused_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody uses: taking them takes from `free`."""
        return sum(self._users[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Use blocks that were found."""
        for block in blocks:
            if self._users[block] == 0:
                del self._free[block]
            self._users[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks for new content; what they held is forgotten. Raises RooflightError when fewer are free."""
        if count > len(self._free):
            raise RooflightError(f"{count} KV blocks were asked for and {len(self._free)} are free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def keep(self, block: int, key: bytes) -> None:
        """Let a full block be found by its hash; of two blocks with equal content the first stays the one found."""
        if self._hash_of[block] is None and key not in self._by_hash:
            self._hash_of[block] = key
            self._by_hash[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """One user fewer for each; of a sequence's blocks the last become reusable first."""
        for block in reversed(blocks):
            if self._users[block] < 1:
                raise RooflightError(f"KV block {block} was given back more often than it was taken")
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._by_hash[key]
            self._hash_of[block] = None

    def check_idle(self) -> None:
        """Raise RooflightError unless every block is free: what an engine without requests must find."""
        lost = self.total - len(self._free)
        if lost:
            blocks = [block for block in range(self.total) if block not in self._free]
            raise RooflightError(f"{lost} of {self.total} KV blocks are still in use without a request: {blocks[:8]}")
