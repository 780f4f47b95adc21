"""Entry point: finds the command, runs it, and turns our errors into one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rooflight import __version__
from rooflight.cli import bench, explain, probe, serve, train
from rooflight.cli.parser import Parser
from rooflight.errors import RooflightError

COMMANDS = {"explain": explain, "train": train, "serve": serve, "bench": bench, "probe": probe}


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(
        prog="rooflight",
        description="Train, serve and price transformers from one program: run it wet and measure, or dry and predict.",
    )
    parser.add_argument("--version", action="version", version=f"rooflight {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, epilog=module.EXAMPLES)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on stderr for what the user can mend."""
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
        if options.command is None:
            parser.print_help()
            return 0
        options.run(options)
    except RooflightError as error:
        print(f"rooflight: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rooflight: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing to say, and nothing more to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def console() -> NoReturn:
    """The `rooflight` program: `main` without the seconds that Python spends on torch's thousands of modules.

    No collector while they are imported, and no teardown of them at the end (seen: 2.5 s to 1.4 s around the work).
    """
    gc.disable()
    code = main()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
