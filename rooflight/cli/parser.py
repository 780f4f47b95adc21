"""An argument parser whose errors are one line, and the option types that commands share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from rooflight.errors import InvalidValue


class Parser(argparse.ArgumentParser):
    """argparse, with one line on an error instead of the usage, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InvalidValue(f"{message}; see `{self.prog} --help`")


def one_of(option: str, values: Iterable[str]) -> Any:
    """A type for an option with a fixed set of values; its error names the value, what is allowed and the nearest."""
    allowed = tuple(values)

    def parse(text: str) -> str:
        if text in allowed:
            return text
        near = difflib.get_close_matches(text, allowed, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidValue(f"{option} {text!r} is unknown; use one of {', '.join(allowed)}{hint}")

    return parse


def positive(option: str, most: int = 2**31 - 1) -> Any:
    """A type for an option that is a whole number from 1 up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = 0
        if not 1 <= value <= most:
            raise InvalidValue(f"{option} {text!r} is not a whole number from 1 to {most}")
        return value

    return parse
