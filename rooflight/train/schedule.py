"""Learning rates over a run: cosine, warm-up–stable–decay and constant, each a function of the step alone."""

from __future__ import annotations

import math

from rooflight.errors import InvalidValue


def learning_rate(
    step: int, steps: int, *, kind: str, peak: float, least: float, warmup: int = 0, decay: float = 0.2
) -> float:
    """The rate of step `step`, counted from 0, of a run of `steps`.

    Warm-up: peak·(step + 1)/warmup. cosine: from peak to least·peak along half a cosine (1608.03983). wsd: peak, then
    over the last `decay` share of the steps straight down to least·peak (2404.06395). constant: peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    if kind == "cosine":
        begin = warmup
        progress = (step - begin) / max(steps - 1 - begin, 1)
        return peak * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if kind == "wsd":
        length = max(round(steps * decay), 1) if decay else 0
        begin = max(steps - length, warmup)
        if step < begin:
            return peak
        progress = (step - begin + 1) / max(steps - begin, 1)
        return peak * (1 - (1 - least) * min(progress, 1.0))
    raise InvalidValue(f"schedule {kind!r} is unknown; use one of cosine, wsd, constant")
