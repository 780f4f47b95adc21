"""The command line: `rooflight COMMAND`."""

from rooflight.cli.main import main

__all__ = ["main"]
