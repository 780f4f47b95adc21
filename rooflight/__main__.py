"""`python -m rooflight` is the `rooflight` command."""

from rooflight.cli import console

console()
