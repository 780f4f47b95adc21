"""Orders and draws that depend on nothing but their keys: the same on every machine and under every NumPy.

NumPy's own generators may change their streams between versions, and a resumed run must not change its order with them.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1
_ROUNDS = 8


def mixed(values_N: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer of each value, evenly spread uint64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z_N = np.asarray(values_N, dtype=np.uint64) + _GOLDEN
    z_N = (z_N ^ (z_N >> np.uint64(30))) * _MIX_1
    z_N = (z_N ^ (z_N >> np.uint64(27))) * _MIX_2
    return z_N ^ (z_N >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers (a seed, a purpose, an epoch); their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mixed(key ^ np.uint64(part & _WORD))
    return int(key[0])


def permuted(positions_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each of `positions_N` (0 ≤ position < size) goes in the permutation of `size` that `key` names; int64.

    A Feistel network over the next power of two, walked until it lands inside (Black and Rogaway, CT-RSA 2002): no
    table, so an epoch of a billion rows costs no memory and begins at once.
    """
    bits = max(size - 1, 0).bit_length()
    if bits == 0:
        return np.zeros(len(positions_N), dtype=np.int64)
    keys_R = mixed(np.uint64(key) ^ np.arange(_ROUNDS, dtype=np.uint64))
    values_N = _feistel(np.asarray(positions_N, dtype=np.uint64), bits, keys_R)
    outside = np.flatnonzero(values_N >= size)
    while len(outside):
        values_N[outside] = _feistel(values_N[outside], bits, keys_R)
        outside = outside[values_N[outside] >= size]
    return values_N.astype(np.int64)


def _feistel(values_N: np.ndarray, bits: int, keys_R: np.ndarray) -> np.ndarray:
    low_bits = np.uint64((bits + 1) // 2)
    low_mask, high_mask = np.uint64((1 << (bits + 1) // 2) - 1), np.uint64((1 << bits // 2) - 1)
    low_N, high_N = values_N & low_mask, values_N >> low_bits
    for number in range(0, _ROUNDS, 2):
        low_N = low_N ^ (mixed(high_N ^ keys_R[number]) & low_mask)
        high_N = high_N ^ (mixed(low_N ^ keys_R[number + 1]) & high_mask)
    return (high_N << low_bits) | low_N
