"""What every dataclass of settings shares: fields with help and rules, their checks, and values from text.

The flags of a command are derived from such a dataclass (`cli/parser.py`), and so are its TOML keys or environment
variables.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rooflight.errors import InvalidValue

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def option(default: Any, group: str, help: str, **meta: Any) -> Any:
    """A setting with its help; metadata choices, least, most, more_than and metavar are checked and shown."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **meta})


def check_values(settings: Any) -> None:
    """Raise InvalidValue on the first field whose value breaks its rule."""
    for entry in fields(settings):
        _check_value(entry.name, getattr(settings, entry.name), entry.metadata)


def _check_value(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    flag = "--" + name.replace("_", "-")
    if "choices" in rule and value not in rule["choices"]:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in rule["choices"]], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidValue(f"{flag} {value!r} is unknown; use one of {', '.join(map(str, rule['choices']))}{hint}")
    tests = {
        "least": (lambda a, b: a >= b, "at least"),
        "most": (lambda a, b: a <= b, "at most"),
        "less_than": (lambda a, b: a < b, "less than"),
        "more_than": (lambda a, b: a > b, "more than"),
    }
    for key, (holds, words) in tests.items():
        if key in rule and not holds(value, rule[key]):
            raise InvalidValue(f"{flag} {value} is out of range; it must be {words} {rule[key]}")


def parse_value(name: str, text: str, default: Any) -> Any:
    """A flag's text as the type of its default; whole numbers may end in K, M, B or T."""
    flag = "--" + name.replace("_", "-")
    if isinstance(default, int):
        return _whole(flag, text)
    if isinstance(default, float):
        try:
            value = float(text)
        except ValueError:
            raise InvalidValue(f"{flag} {text!r} is not a number") from None
        if value != value or value in (float("inf"), float("-inf")):
            raise InvalidValue(f"{flag} {text!r} is not a finite number")
        return value
    return text


def _whole(flag: str, text: str) -> int:
    number, factor = text.strip(), 1
    if number[-1:].upper() in UNITS:
        number, factor = number[:-1], UNITS[number[-1].upper()]
    try:
        value = float(number) * factor if "." in number else int(number) * factor
    except ValueError:
        raise InvalidValue(f"{flag} {text!r} is not a whole number (K, M, B and T may follow it)") from None
    if value != int(value):
        raise InvalidValue(f"{flag} {text!r} is not a whole number (K, M, B and T may follow it)")
    return int(value)
