"""Where a run says what it does: lines on stdout, a bar on stderr, OUT/log.jsonl, and TensorBoard where installed."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

GIB = 2**30


class Log:
    """Writes every event as one JSON line, and the ones that a person wants to see as text."""

    def __init__(self, directory: Path, steps: int, tensorboard: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "log.jsonl").open("a", encoding="utf-8")
        self._writer = _tensorboard(directory) if tensorboard else None
        self._bar = _bar(steps) if sys.stderr.isatty() else None

    def say(self, text: str) -> None:
        """A line for the person who watches; above the bar where there is one."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def event(self, kind: str, **facts: Any) -> None:
        """One JSON line: the kind, the time, and the facts; figures go to TensorBoard too."""
        finite = {key: _jsonable(value) for key, value in facts.items()}
        self._file.write(json.dumps({"event": kind, "time": time.time(), **finite}) + "\n")
        self._file.flush()
        if self._writer is not None and "step" in facts:
            for key, value in facts.items():
                if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{kind}/{key}", value, facts["step"])

    def advance(self, step: int, text: str = "") -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, what=text)

    def close(self) -> None:
        """Flush all, and take the bar down."""
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()
        self._file.close()


def _jsonable(value: Any) -> Any:
    # JSON has no infinities; a diverged loss is told as text.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"))


def _bar(steps: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.add_task("train", total=steps, what="")
    bar.start()
    return bar


def percent(share: float | None) -> str:
    """41.2%, or – where it is not known."""
    return "–" if share is None else f"{share:.1%}"


def against(measured: float | None, predicted: float | None, factor: float, unit: str) -> str:
    """measured/predicted in one unit, – for what is not known."""
    texts = ["–" if value is None else f"{value * factor:.4g}" for value in (measured, predicted)]
    return f"{texts[0]}/{texts[1]} {unit}"


def rate(tokens_per_second: float) -> str:
    """Tokens a second with three figures: 68.1k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if tokens_per_second >= size:
            return f"{tokens_per_second / size:.3g}{letter}"
    return f"{tokens_per_second:.3g}"
