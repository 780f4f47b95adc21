"""Choosing the next token from logits: greedily, or at random among what temperature, top-k, top-p and min-p leave.

Drawing is the inverse of a cumulative distribution whose weights are whole numbers, ⌊2⁴⁰ · p / greatest p⌋. Sums of
whole numbers do not depend on the order of adding, so a row's token is the same whatever else is in the batch and
however a device divides the work; and a token of weight 0 can never be drawn, nor one beyond the last.

Legend: B sequences  V vocabulary  K likeliest tokens, sorted  C chunks of a vocabulary  W tokens a chunk
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rooflight.ops.op import KERNEL_DTYPES, Op, lazy
from rooflight.ops.sampling_cost import greedy_cost, sample_cost, sample_plain_cost

_KERNELS, _RANKED_KERNELS = "rooflight.ops.kernels.sampling", "rooflight.ops.kernels.sampling_ranked"
# Tokens and rows up to which the kernels' chunks are few enough to be summed up, and their counters suffice.
_WIDEST, _MOST_ROWS = 2**20, 2**15
# 2⁴⁰: exact to multiply by, and the sum over 2²³ tokens still fits into 63 bits.
_ONE = 2.0**40
_LOG2_E = 1.4426950408889634
_CHUNK = 1024
# A CPU tries this many of the likeliest tokens before it sorts a vocabulary whose cut top_p decides.
_FIRST_TRY = 1024
# Logits worked on at once, 256 rows of 262,144: what is made of them in between is several times their size. Fewer
# would cost launches.
_AT_ONCE = 2**26


def _greedy(logits_BV: Tensor) -> Tensor:
    # A CPU finds the greatest of bf16 numbers five times slower than it widens them first.
    return (logits_BV if logits_BV.is_cuda else logits_BV.float()).argmax(dim=-1)


def _greedy_shape(logits_BV: Tensor) -> Tensor:
    return logits_BV.new_empty((logits_BV.shape[0],), dtype=torch.int64)


def _takes(logits_BV: Tensor, *_: object) -> bool:
    """Whether the kernels draw from such logits; what else a draw needs comes in any type."""
    rows, columns = logits_BV.shape
    # Triton 3.6 cannot compile the choice from a single token.
    return logits_BV.dtype in KERNEL_DTYPES and 0 < rows <= _MOST_ROWS and 1 < columns <= _WIDEST


greedy = Op(
    "greedy", _greedy, cost=greedy_cost, shape=_greedy_shape, kernel=lazy(_KERNELS, "greedy"), kernel_takes=_takes
)


def _ratios(logits_BN: Tensor, greatest_B1: Tensor, temperature_B: Tensor) -> Tensor:
    """Probabilities relative to the greatest, fp32: exp((logit − greatest) / temperature)."""
    # The difference first: divided by a small temperature, the logits themselves would overflow. Greedy rows, whose
    # draw nobody looks at, divide by something at least. As a power of 2, a GPU's own: our kernels and torch's then
    # agree to the last bit.
    scale_B = temperature_B.float().clamp(min=1e-30).reciprocal_().mul_(_LOG2_E)
    return torch.sub(logits_BN, greatest_B1.float()).mul_(scale_B.unsqueeze(-1)).exp2_()


def _upto(ratio_BN: Tensor) -> Tensor:
    """Sums of whole weights up to each element, the ratios being used up."""
    return ratio_BN.mul_(_ONE).to(torch.int64).contiguous().cumsum_(-1)


def _target(uniform_B: Tensor, mass_B: Tensor) -> Tensor:
    """The whole number below `mass_B` at which the draw falls: ⌊u · mass⌋, for u ≤ 1 − 2⁻⁵³.

    fp64 may round the mass up by half a unit of its last place; u takes away at least as much before it rounds again.
    """
    return (uniform_B.double() * mass_B).to(torch.int64)


def _first_above(upto_BN: Tensor, target_B: Tensor) -> Tensor:
    """Position [B, 1] of the first cumulative weight above the target; the last where there is none.

    There always is one unless the logits hold NaN or no finite value: then any token will do, but a token it must be.
    """
    found_B1 = torch.searchsorted(upto_BN, target_B.unsqueeze(-1), right=True)
    return found_B1.clamp_(max=upto_BN.shape[-1] - 1)


def _in_pieces(choose: Callable[..., Tensor], logits_BV: Tensor, *others: Tensor) -> Tensor:
    """`choose` for so many rows at a time; rows know nothing of one another."""
    most = max(1, _AT_ONCE // logits_BV.shape[1])
    if logits_BV.shape[0] <= most:
        return choose(logits_BV, *others)
    pieces = zip(*(tensor.split(most) for tensor in (logits_BV, *others)), strict=True)
    return torch.cat([choose(*piece) for piece in pieces])


def _sample_plain(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulative distribution of softmax(logits / temperature) at uniform_B ∈ [0, 1), by token number.

    A temperature of 0 is greedy.
    """
    return _in_pieces(_sample_plain_piece, logits_BV, temperature_B, uniform_B)


def _sample_plain_piece(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    greatest_B1, likeliest_B1 = logits_BV.max(dim=-1, keepdim=True)
    ratio_BV = _ratios(logits_BV, greatest_B1, temperature_B)
    by_chunks = not logits_BV.is_cuda and logits_BV.shape[1] > 2 * _CHUNK
    drawn_B1 = _drawn_by_chunks(ratio_BV, uniform_B) if by_chunks else _drawn_by_scan(ratio_BV, uniform_B)
    return torch.where(temperature_B.unsqueeze(-1) > 0, drawn_B1, likeliest_B1).squeeze(-1)


def _drawn_by_scan(ratio_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token [B, 1] that the draw falls on, in the fewest launches."""
    upto_BV = _upto(ratio_BV)
    return _first_above(upto_BV, _target(uniform_B, upto_BV[:, -1]))


def _drawn_by_chunks(ratio_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The same without a scan over the vocabulary, slow on a CPU: sums of chunks, then a scan within one."""
    weight_BV = ratio_BV.mul_(_ONE).to(torch.int64)
    vocabulary = weight_BV.shape[1]
    chunked = vocabulary // _CHUNK * _CHUNK
    sums_BC = weight_BV[:, :chunked].unflatten(-1, (-1, _CHUNK)).sum(-1)
    upto_BC = torch.cat((sums_BC, weight_BV[:, chunked:].sum(-1, keepdim=True)), -1).cumsum_(-1)
    target_B = _target(uniform_B, upto_BC[:, -1])
    chunk_B1 = _first_above(upto_BC, target_B)
    before_B1 = torch.where(chunk_B1 > 0, upto_BC.gather(-1, (chunk_B1 - 1).clamp_(min=0)), 0)
    # Past the vocabulary's end the last token stands again; the draw is found before them.
    token_BW = (chunk_B1 * _CHUNK + torch.arange(_CHUNK, device=weight_BV.device)).clamp_(max=vocabulary - 1)
    within_BW = weight_BV.gather(-1, token_BW).cumsum_(-1)
    return token_BW.gather(-1, _first_above(within_BW, target_B - before_B1.squeeze(-1)))


def _sample_plain_shape(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    return logits_BV.new_empty((logits_BV.shape[0],), dtype=torch.int64)


sample_plain = Op(
    "sample_plain",
    _sample_plain,
    cost=sample_plain_cost,
    shape=_sample_plain_shape,
    kernel=lazy(_KERNELS, "sample_plain"),
    kernel_takes=_takes,
)


def _likeliest(logits_BV: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` greatest logits of each row in falling order and their tokens; equal ones by token number."""
    if most == 0 or most >= logits_BV.shape[1]:
        values_BK, tokens_BK = logits_BV.sort(dim=-1, descending=True, stable=True)
        return values_BK, tokens_BK
    if logits_BV.is_cuda:
        # Of logits equal to the last one CUDA's selection takes those of the lowest numbers, which tests hold; it does
        # not order what it took.
        tokens_BK = logits_BV.topk(most, dim=-1, sorted=False).indices.sort(dim=-1).values
        values_BK, order_BK = logits_BV.gather(-1, tokens_BK).sort(dim=-1, descending=True, stable=True)
        return values_BK, tokens_BK.gather(-1, order_BK)
    # A CPU's selection takes any of equal logits: select by keys that are all different. + 0.0 makes −0 a 0.
    bits_BV = (logits_BV.float() + 0.0).view(torch.int32)
    rising_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)
    last = logits_BV.shape[1] - 1
    key_BV = (rising_BV.to(torch.int64) << 32) + torch.arange(last, -1, -1, device=logits_BV.device)
    tokens_BK = last - (key_BV.topk(most, dim=-1).values & 0xFFFFFFFF)
    return logits_BV.gather(-1, tokens_BK), tokens_BK


def _sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
    most: int = 0,
) -> Tensor:
    """Inverse of the cumulative distribution at uniform_B ∈ [0, 1), over tokens from likely to unlikely.

    Kept: probability ≥ min_p · the greatest; then the top_k most likely (0: all); then the fewest that together reach
    top_p of what is left. A temperature of 0 is greedy; equal logits order by token number.
    most: a promise that the top_k of every row that is not greedy is 1 to this (0: none), for which nothing is sorted
    but the likeliest `most`.
    """
    trying = most == 0 and not logits_BV.is_cuda and logits_BV.shape[1] > 4 * _FIRST_TRY
    choose = _sample_by_trying if trying else partial(_sample_piece, most=most)
    return _in_pieces(choose, logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)


def _sample_piece(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
    most: int,
) -> Tensor:
    ranked_BK, tokens_BK = _likeliest(logits_BV, most)
    ratio_BK = _ratios(ranked_BK, ranked_BK[:, :1], temperature_B)
    last_B1 = _last_of_min_p_and_top_k(ratio_BK, top_k_B, min_p_B)
    upto_BK = _upto(ratio_BK)
    total_B = upto_BK.gather(-1, last_B1).squeeze(-1)
    return _draw(upto_BK, tokens_BK, total_B, temperature_B, top_p_B, uniform_B)


def _last_of_min_p_and_top_k(ratio_BK: Tensor, top_k_B: Tensor, min_p_B: Tensor) -> Tensor:
    """Rank [B, 1] of the least likely token that both keep: what a filter keeps is a beginning of the ranks."""
    likely_B1 = (ratio_BK >= min_p_B.float().unsqueeze(-1)).sum(-1, keepdim=True)
    top_k_B1 = top_k_B.unsqueeze(-1)
    return torch.where(top_k_B1 > 0, torch.minimum(top_k_B1, likely_B1), likely_B1).sub_(1).clamp_(min=0)


def _enough(top_p_B: Tensor, total_B: Tensor) -> Tensor:
    """The whole weight at which tokens taken by rank suffice: ⌈top_p · total⌉."""
    return torch.minimum((top_p_B.double() * total_B).ceil_().to(torch.int64), total_B)


def _draw(
    upto_BK: Tensor, tokens_BK: Tensor, total_B: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    # What top_p keeps ends with the first cumulative weight that is enough, and weighs as much; at a top_p of 0 that is
    # the likeliest token's.
    last_B1 = _first_above(upto_BK, _enough(top_p_B, total_B) - 1)
    rank_B1 = _first_above(upto_BK, _target(uniform_B, upto_BK.gather(-1, last_B1).squeeze(-1)))
    return tokens_BK.gather(-1, rank_B1.mul_(temperature_B.unsqueeze(-1) > 0)).squeeze(-1)


def _sample_by_trying(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    """The same where looking at values costs nothing: a row is sorted as a whole only if its likeliest do not do."""
    ranked_BK, tokens_BK = _likeliest(logits_BV, _FIRST_TRY)
    ratio_BK = _ratios(ranked_BK, ranked_BK[:, :1], temperature_B)
    last_B1 = _last_of_min_p_and_top_k(ratio_BK, top_k_B, min_p_B)
    upto_BK = _upto(ratio_BK)
    ratio_BV = _ratios(logits_BV, ranked_BK[:, :1], temperature_B)
    ratio_BV.masked_fill_(ratio_BV < min_p_B.float().unsqueeze(-1), 0.0)
    total_B = ratio_BV.mul_(_ONE).to(torch.int64).sum(-1)
    limited_B = (top_k_B > 0) & (top_k_B <= _FIRST_TRY)
    total_B = torch.where(limited_B, upto_BK.gather(-1, last_B1).squeeze(-1), total_B)
    out_B = _draw(upto_BK, tokens_BK, total_B, temperature_B, top_p_B, uniform_B)
    over_B = (upto_BK[:, -1] < _enough(top_p_B, total_B)) | (top_k_B > _FIRST_TRY)
    again_L = (over_B & (temperature_B > 0)).nonzero().squeeze(-1)
    if again_L.numel():
        every = (logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)
        out_B[again_L] = _sample_piece(*(tensor.index_select(0, again_L) for tensor in every), most=0)
    return out_B


def _sample_shape(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    uniform_B: Tensor,
    most: int = 0,
) -> Tensor:
    return logits_BV.new_empty((logits_BV.shape[0],), dtype=torch.int64)


sample = Op(
    "sample",
    _sample,
    cost=sample_cost,
    shape=_sample_shape,
    kernel=lazy(_RANKED_KERNELS, "sample"),
    kernel_takes=_takes,
)
