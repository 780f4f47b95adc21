"""Frequencies of rotary positions, plain and stretched for long contexts.

Sources: RoPE 2104.09864; YaRN 2309.00071; Llama 3.1's banded scaling as in its release; LongRoPE 2402.13753.
Legend: C = dims/2 frequencies
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.models.config import Rope


def _base(rope: Rope) -> Tensor:
    return rope.theta ** -(torch.arange(0, int(rope.dims), 2, dtype=torch.int64).float() / int(rope.dims))


def _llama3(rope: Rope) -> Tensor:
    frequencies_C = _base(rope)
    wavelength = 2 * math.pi / frequencies_C
    low = rope.original_context / rope.low_freq_factor
    high = rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequencies_C / rope.factor + smooth * frequencies_C
    scaled = torch.where(wavelength > low, frequencies_C / rope.factor, frequencies_C)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: Rope) -> tuple[Tensor, float]:
    dims = int(rope.dims)

    def dimension(rotations: float) -> float:
        return (dims * math.log(rope.original_context / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = ((torch.arange(dims // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    kept = 1 - ramp
    frequencies_C = _base(rope)
    stretched = frequencies_C / rope.factor * (1 - kept) + frequencies_C * kept
    if rope.attention_factor is not None:
        return stretched, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return stretched, _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return stretched, _yarn_mscale(rope.factor)


def yarn_softmax_scale(rope: Rope) -> float:
    """Factor that DeepSeek puts on the softmax scale when YaRN's mscale_all_dim is set: mscale²."""
    if rope.kind != "yarn" or not rope.mscale_all_dim:
        return 1.0
    return _yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2


def frequencies(rope: Rope, context: int) -> tuple[Tensor, float]:
    """Inverse frequencies [C] in fp32 and the factor on cos and sin, for sequences of up to `context` tokens."""
    if rope.kind == "default":
        return _base(rope), 1.0
    if rope.kind == "linear":
        return _base(rope) / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope), 1.0
    if rope.kind == "yarn":
        return _yarn(rope)
    if rope.kind == "longrope":
        factors = rope.long_factors if context > rope.original_context else rope.short_factors
        ratio = rope.factor
        scale = rope.attention_factor
        if scale is None:
            scale = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(rope.original_context))
        return _base(rope) / torch.tensor(factors, dtype=torch.float32), scale
    raise InvalidValue(f"rope kind {rope.kind!r} is unknown; use default, linear, llama3, yarn or longrope")
