"""`rooflight probe`: measure this machine and write its file, which every command takes with --on here."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from rooflight.cli.parser import one_of, positive

SUMMARY = "measure this machine's ceilings and its efficiency at each operation; --on here then uses them"
EXAMPLES = """examples:
  rooflight probe
  rooflight probe --device cpu --budget 60 --out my-laptop.toml
  torchrun --nproc-per-node 2 -m rooflight probe      (also measures the links)"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `rooflight probe`."""
    parser.add_argument(
        "--device", type=one_of("--device", ("cpu", "cuda")), help="cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--budget", type=positive("--budget", 3600), default=100, help="seconds that it may take (default 100)"
    )
    parser.add_argument("--out", type=Path, help="the machine file to write (default: the one that --on here reads)")


def run(options: argparse.Namespace) -> None:
    """Probe and say where the file is."""
    from rooflight.hardware.probe import probe
    from rooflight.workload.calibrate import operation_samples

    gc.enable()
    machine = probe(
        options.device,
        float(options.budget),
        [operation_samples],
        path=options.out,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for name, figure in machine.measured.items():
        print(f"{name:>16}  {figure.value:.4g}")
    print(f"{len(machine.samples):>16}  samples of operations")
