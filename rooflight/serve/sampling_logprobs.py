"""Log-probabilities of chosen tokens and of the likeliest beside them: gathered on the device, told on the host.

Legend: L rows that ask  V vocabulary  T prompt tokens  K likeliest tokens of a row
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rooflight.serve.request import TokenLogprobs
from rooflight.serve.sampling_upload import Download

# Rows are worked off so many logits at a time: 256 MiB in fp32, whatever the prompt's length.
_LOGITS_AT_ONCE = 2**26


class Logprobs:
    """Log-probabilities of some rows on the device.

    tops: how many of the likeliest tokens each row is told. whole_LX: token, rank and the likeliest tokens; real_LX:
    the log-probabilities of the token and of the likeliest.
    """

    def __init__(self, logits_LV: Tensor, tokens_L: Tensor, tops: Sequence[int]):
        self.tops = tuple(tops)
        most = min(max(self.tops, default=0), logits_LV.shape[1])
        rows = max(1, _LOGITS_AT_ONCE // logits_LV.shape[1])
        pieces = [_gather(*piece, most) for piece in zip(logits_LV.split(rows), tokens_L.split(rows), strict=True)]
        self.whole_LX, self.real_LX = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What `records` wants, on the device."""
        return self.whole_LX, self.real_LX

    def records(self, whole_LX: Tensor, real_LX: Tensor) -> list[TokenLogprobs]:
        """A record a row, of the two tensors as they came to the host."""
        return [
            TokenLogprobs(token, real[0], rank, tuple(zip(likeliest[:top], real[1:], strict=False)))
            for (token, rank, *likeliest), real, top in zip(whole_LX.tolist(), real_LX.tolist(), self.tops, strict=True)
        ]


def _gather(logits_LV: Tensor, tokens_L: Tensor, most: int) -> tuple[Tensor, Tensor]:
    logits_LV, tokens_L1 = logits_LV.float(), tokens_L.unsqueeze(-1)
    chosen_L1 = logits_LV.gather(-1, tokens_L1)
    rank_L1 = (logits_LV > chosen_L1).sum(-1, keepdim=True) + 1
    best_LK, likeliest_LK = logits_LV.topk(most, dim=-1)
    normalizer_L1 = logits_LV.logsumexp(-1, keepdim=True)
    whole_LX = torch.cat((tokens_L1, rank_L1, likeliest_LK), -1)
    return whole_LX, torch.cat((chosen_L1, best_LK), -1) - normalizer_L1


class PromptLogprobs:
    """The log-probabilities of prompt tokens on their way to the host."""

    def __init__(self, logprobs: Logprobs):
        self._logprobs, self._download = logprobs, Download(logprobs.tensors)

    def read(self) -> list[TokenLogprobs]:
        """A record a token. Waits."""
        return self._logprobs.records(*self._download.wait())


def prompt_logprobs(logits_TV: Tensor, targets_T: Tensor, top: int) -> PromptLogprobs:
    """Log-probabilities of targets_T, each the token that follows its row of logits, with the `top` likeliest.

    Begins on the device and returns at once; of the model's own distribution.
    """
    return PromptLogprobs(Logprobs(logits_TV, targets_T, [top] * targets_T.shape[0]))
