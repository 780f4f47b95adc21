"""An argument parser whose errors are one line, and the option types that commands share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NoReturn

from rooflight.errors import InvalidValue
from rooflight.settings import parse_value


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


def settings_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """A flag for each field of a dataclass of settings, in the fields' groups; what is not given is left out."""
    groups: dict[str, Any] = {}
    for entry in fields(settings):
        group = entry.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = "--" + entry.name.replace("_", "-")
        text = entry.metadata["help"].replace("%", "%%")
        common = {"dest": entry.name, "default": argparse.SUPPRESS}
        if isinstance(entry.default, bool):
            groups[group].add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **common)
        elif isinstance(entry.default, tuple):
            groups[group].add_argument(flag, nargs="+", metavar=entry.metadata["metavar"], help=text, **common)
        else:
            shown = f"{text} (default {entry.default})" if entry.default else text
            choices = entry.metadata.get("choices")
            named = "{" + ",".join(map(str, choices)) + "}" if choices else entry.name.upper()
            metavar = entry.metadata.get("metavar", named)
            kind = _value_of(entry.name, entry.default)
            groups[group].add_argument(flag, type=kind, metavar=metavar, help=shown, **common)


def _value_of(name: str, default: Any) -> Any:
    return lambda text: parse_value(name, text, default)
