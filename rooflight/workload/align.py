"""Lay a wet run's operations beside a dry run's where the two differ in a few copies."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_ALIKE = 0.8  # of the operations: below it the two are different programs


def align(predicted: Sequence[str], names: Sequence[str], seconds: Sequence[float]) -> tuple[list[float], list[str]]:
    """(seconds of each predicted operation, notes): what only the dry run did took none.

    A real kernel may choose other strides than its fake does (oneDNN's LSTM); autograd then copies in one run alone.
    Returns the measured seconds as they are where the runs are the same, or too different to be laid side by side.
    """
    if list(predicted) == list(names):
        return list(seconds), []
    matcher = difflib.SequenceMatcher(a=predicted, b=names, autojunk=False)
    same = matcher.get_matching_blocks()
    if 2 * sum(block.size for block in same) < _ALIKE * (len(predicted) + len(names)):
        return list(seconds), []
    laid = [0.0] * len(predicted)
    for block in same:
        laid[block.a : block.a + block.size] = seconds[block.b : block.b + block.size]
    only_dry = [name for tag, i, j, _, _ in matcher.get_opcodes() if tag != "equal" for name in predicted[i:j]]
    only_wet = [name for tag, _, _, i, j in matcher.get_opcodes() if tag != "equal" for name in names[i:j]]
    notes = [
        f"{len(found)} operations of the {run} run alone, for strides that only one of the two chose: "
        + ", ".join(dict.fromkeys(found))
        for run, found in (("dry", only_dry), ("wet", only_wet))
        if found
    ]
    return laid, notes
