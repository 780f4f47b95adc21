"""How long `rooflight explain` takes from the shell and how much memory: one table, each row a process of its own.

    python benchmarks/explain_speed.py [--runs 3]

wall: the fastest run from start to exit, imports included. RSS: the most that the process ever held. Nothing is
asserted; the limits beside them are those of issue 2 for two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A command line, and the limits that hold for it."""

    argv: tuple[str, ...]
    limit_seconds: float
    limit_bytes: float = 1.5e9


CASES = (
    Case(("llama-3.1-405b", "--phase", "train", "--context", "8192"), 10.0),
    Case(("llama-3.1-405b", "--phase", "decode", "--batch", "64", "--context", "8192"), 10.0),
    Case(("deepseek-v3", "--phase", "train", "--context", "4096"), 10.0),
    Case(("llama-3.1-8b", "--phase", "prefill", "--context", "4096"), 3.0),
    Case(("llama-3.1-8b", "--phase", "decode", "--batch", "64", "--context", "4096"), 3.0),
    Case(("llama-3.1-8b", "--phase", "train", "--context", "4096"), 3.0),
    Case(("llama-3.1-8b", "--phase", "train", "--context", "4096", "-o", "html"), 3.0),
)


def run(argv: tuple[str, ...]) -> tuple[float, float]:
    """Wall seconds and peak resident bytes of one `rooflight explain`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "rooflight", "explain", *argv], stdout=subprocess.DEVNULL)
    # Of this one child alone, where getrusage(RUSAGE_CHILDREN) is the most of all that came before.
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"rooflight explain {' '.join(argv)} ended with exit code {process.returncode}")
    # Linux counts in KiB, macOS in bytes.
    return wall, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=3, help="runs of each case; the fastest counts (default 3)")
    runs = max(1, parser.parse_args().runs)
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, fastest of {runs}\n")
    print("| rooflight explain | wall | limit | peak RSS | limit |")
    print("|---|---|---|---|---|")
    for case in CASES:
        seen = [run(case.argv) for _ in range(runs)]
        wall, size = min(wall for wall, _ in seen), max(size for _, size in seen)
        print(
            f"| {' '.join(case.argv)} | {wall:.2f} s | {case.limit_seconds:g} s "
            f"| {size / 1e9:.2f} GB | {case.limit_bytes / 1e9:g} GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
