"""The random numbers of sampling: one for each output token of a request, from its seed and the token's index alone.

Legend: B rows
"""

from __future__ import annotations

import hashlib

import numpy as np

# The increment and the two multipliers of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators"; multipliers of Stafford's variant 13).
_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x_B: np.ndarray) -> np.ndarray:
    x_B = (x_B ^ (x_B >> np.uint64(30))) * _FIRST
    x_B = (x_B ^ (x_B >> np.uint64(27))) * _SECOND
    return x_B ^ (x_B >> np.uint64(31))


def uniforms(seeds_B: np.ndarray, indices_B: np.ndarray) -> np.ndarray:
    """u ∈ [0, 1) of 53 bits for (seed, index): number `index` of the SplitMix64 sequence of the mixed seed.

    seeds_B: uint64. indices_B: whole numbers of 0 and more. The seed is mixed first, so that neighbouring seeds do not
    share a sequence one step apart.
    """
    state_B = _mix(seeds_B + _STEP) + (indices_B.astype(np.uint64) + np.uint64(1)) * _STEP
    return (_mix(state_B) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of(engine_seed: int, request_id: str) -> int:
    """The 64-bit seed of a request that brings none: a hash of the engine's seed and the request's id."""
    digest = hashlib.blake2b(f"{engine_seed}\n{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
