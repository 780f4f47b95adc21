"""`rooflight bench ops`: every operation by name and shape, timed, checked, beside its roof and its peers."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rooflight.cli.parser import one_of
from rooflight.errors import InvalidValue, RooflightError

if TYPE_CHECKING:
    from rooflight.workload.op_bench import Result, Setting

SUMMARY = "every operation, forward and backward: time, share of the roof, and the peers that are here"
EXAMPLES = """examples:
  rooflight bench ops
  rooflight bench ops attention paged_attention --sweep
  rooflight bench ops rms_norm swiglu --dtype fp32 --peers eager,compile -o md
  rooflight bench ops --list"""

PEERS = ("eager", "compile", "cudnn", "flash", "efficient", "math", "flex", "fa2", "fa3", "liger", "fused")
DTYPES = ("bf16", "fp16", "fp32")
_BUDGET_SECONDS = 24 * 3600.0  # each candidate has a budget of its own


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `rooflight bench ops`."""
    parser.add_argument("names", metavar="OPERATION", nargs="*", help="operations to run (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list the operations with their shapes and end")
    parser.add_argument("--sweep", action="store_true", help="run a grid of shapes, not the usual one or two")
    parser.add_argument(
        "--backward", action=argparse.BooleanOptionalAction, default=True, help="time the backward too (default)"
    )
    parser.add_argument("--device", type=one_of("--device", ("cpu", "cuda")), help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", type=one_of("--dtype", DTYPES), help="type of inputs (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--on",
        metavar="MACHINE",
        default="",
        help="whose roof (default: here as probed, else the GPU's of the catalog)",
    )
    parser.add_argument("--peers", metavar="PEER,…", type=_peers, help=f"of {', '.join(PEERS)} only these; or none")
    parser.add_argument("-o", "--output", type=one_of("-o", ("table", "json", "md")), default="table")
    parser.add_argument("--result", metavar="FILE", type=Path, help="write all figures there too, as JSON")


def _peers(text: str) -> frozenset[str]:
    known = one_of("--peers", (*PEERS, "none"))
    names = frozenset(known(name.strip()) for name in text.split(","))
    if "none" in names and len(names) > 1:
        raise InvalidValue(f"--peers {text!r} names peers and none; give one or the other")
    return names - {"none"}


def run(options: argparse.Namespace) -> None:
    """Measure and print the report; raises RooflightError on what the user can mend, and on a wrong result."""
    if options.result is not None and not options.result.resolve().parent.is_dir():
        raise InvalidValue(f"--result {options.result}: there is no directory {options.result.parent}; make it first")
    from rooflight.workload import op_bench

    operations = op_bench.chosen(options.names)
    setting = _setting(options)
    if options.list:
        _list(setting, [operation.name for operation in operations])
        return
    from rooflight.hardware.timing import Timer

    gc.enable()
    timer = Timer(setting.device, _BUDGET_SECONDS, _say)
    result = op_bench.run(operations, setting, timer, _say)
    _write(result, options)
    if result.bad:
        raise RooflightError(f"{len(result.bad)} of {len(result.rows)} rows are no good: {'; '.join(result.bad)}")


def _setting(options: argparse.Namespace) -> Setting:
    import torch

    from rooflight.workload import op_bench

    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise InvalidValue("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    device = torch.device(options.device or ("cuda" if there else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    name = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    machine = op_bench.machine_for(options.on, device)
    return op_bench.Setting(device, dtype, machine, options.backward, options.sweep, options.peers)


def _list(setting: Setting, names: list[str]) -> None:
    from rooflight.workload.op_bench import OPERATIONS
    from rooflight.workload.op_bench.shapes import SHAPES

    for name in names:
        operation = OPERATIONS[name]
        also = f" (also {', '.join(operation.also)})" if operation.also else ""
        print(f"{name}{also}: {operation.about}")
        for sizes in SHAPES[name].on(setting.device, setting.sweep):
            print(f"  {operation.label(*sizes)}")


def _write(result: Result, options: argparse.Namespace) -> None:
    from rooflight.report import op_bench as report
    from rooflight.report.terminal import console_for

    if options.output == "table":
        report.render(result, console_for(sys.stdout))
    else:
        print({"json": report.to_json, "md": report.to_markdown}[options.output](result), end="")
    if options.result is not None:
        options.result.write_text(report.to_json(result), encoding="utf-8")
        _say(f"wrote {options.result}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
