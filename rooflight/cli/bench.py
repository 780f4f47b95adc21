"""`rooflight bench`: traffic against a server or an engine, wet or dry, told as vLLM tells it and beside the roof."""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rooflight.cli import bench_ops
from rooflight.cli.parser import Parser, one_of, settings_options
from rooflight.errors import InvalidValue
from rooflight.serve.bench.settings import (
    EndpointSettings,
    LatencySettings,
    ServeBenchSettings,
    TrafficSettings,
)
from rooflight.serve.settings import EngineSettings, from_environment

if TYPE_CHECKING:
    from rooflight.serve.bench.result import Result

SUMMARY = "measure serving (TTFT, TPOT, throughput, goodput; with --dry predict them) or operations, beside the roof"
EXAMPLES = """examples:
  rooflight bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --request-rate 4 --ignore-eos
  rooflight bench serve --model llama-3.1-8b --load-format dummy --dry --on h200 --goodput ttft:200 tpot:50
  rooflight bench throughput --model ./model --input-len 100:1024 --output-len 100:1024 --num-prompts 256 --compare
  rooflight bench latency --model ./model --batch-size 1 --input-len 1024 --output-len 128
  rooflight bench ops attention paged_attention --sweep"""

_KINDS = {
    "serve": ("requests as they arrive: against --base-url, or an engine in this process", ServeBenchSettings),
    "throughput": ("all requests at once, offline: output tokens a second", TrafficSettings),
    "latency": ("one batch of equal requests, again and again", LatencySettings),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The benchmarks of serving, each with its traffic's flags and the engine's; and that of operations."""
    kinds = parser.add_subparsers(dest="bench", metavar="BENCHMARK", required=True, parser_class=Parser)
    for name, (summary, settings) in _KINDS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        told = kind.add_argument_group("report")
        told.add_argument("-o", "--output", type=one_of("-o", ("table", "json", "md")), default="table")
        told.add_argument("--result", metavar="FILE", type=Path, help="write all figures there too, as JSON")
        dry = kind.add_argument_group("dry")
        dry.add_argument("--dry", action="store_true", help="predict, on a virtual clock, for the machine of --on")
        dry.add_argument("--compare", action="store_true", help="run wet and dry on the same traffic, side by side")
        if name == "serve":
            settings_options(kind, EndpointSettings)
        settings_options(kind, settings)
        settings_options(kind, EngineSettings)
    ops = kinds.add_parser("ops", help=bench_ops.SUMMARY, description=bench_ops.SUMMARY, epilog=bench_ops.EXAMPLES)
    ops.formatter_class = argparse.RawDescriptionHelpFormatter
    bench_ops.add_options(ops)


def run(options: argparse.Namespace) -> None:
    """Run a benchmark and print its report; raises RooflightError on what the user can mend."""
    if options.bench == "ops":
        bench_ops.run(options)
        return
    if options.dry and options.compare:
        raise InvalidValue("--dry predicts and --compare measures too; give one of them")
    if options.result is not None and not options.result.resolve().parent.is_dir():
        raise InvalidValue(f"--result {options.result}: there is no directory {options.result.parent}; make it first")
    traffic = _settings(options, _KINDS[options.bench][1]).check()
    given = from_environment(EngineSettings) | _given(options, EngineSettings)
    if options.bench != "serve":
        # As vLLM does: repeated prompts would be found in the prefix cache, and nothing would be measured.
        given.setdefault("enable_prefix_caching", False)
    engine = EngineSettings(**given)
    endpoint = _settings(options, EndpointSettings).check() if options.bench == "serve" else EndpointSettings()
    # The command line starts without the collector; a long run wants it back, but not over what is imported.
    from rooflight.serve.bench import run as bench

    gc.freeze()
    gc.enable()
    mode = bench.DRY if options.dry else bench.COMPARE if options.compare else bench.WET
    if isinstance(traffic, ServeBenchSettings):
        result = bench.serve(traffic, engine, endpoint, mode, _say)
    elif isinstance(traffic, TrafficSettings):
        result = bench.throughput(traffic, engine, mode, _say)
    else:
        result = bench.latency(traffic, engine, mode, _say)
    _write(result, options)


def _write(result: Result, options: argparse.Namespace) -> None:
    from rooflight.report import bench as report
    from rooflight.report.terminal import console_for

    if options.output == "table":
        report.render(result, console_for(sys.stdout))
    else:
        print({"json": report.to_json, "md": report.to_markdown}[options.output](result), end="")
    if options.result is not None:
        options.result.write_text(report.to_json(result, detailed=True), encoding="utf-8")
        print(f"wrote {options.result}", file=sys.stderr)


def _given(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """What flags gave for the fields of a settings class."""
    names = [entry.name for entry in fields(settings) if hasattr(options, entry.name)]
    values = {name: getattr(options, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _settings(options: argparse.Namespace, settings: type) -> Any:
    return settings(**_given(options, settings))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
