"""The command line: `rooflight COMMAND`."""

from rooflight.cli.main import console, main

__all__ = ["console", "main"]
