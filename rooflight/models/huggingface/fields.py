"""`Fields`: the keys of a Hugging Face config.json, read with their types checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rooflight.errors import InvalidValue


class _Required:
    """Marks a key that a config must have."""


REQUIRED: Final = _Required()


class Fields:
    """A mapping from config.json; a refusal is one line that names the file, the key, its value and what is allowed.

    A key whose value is null counts as absent, as it does in transformers.
    """

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def refuse(self, key: str, allowed: str) -> InvalidValue:
        """The error for a key that is absent or holds a value of the wrong kind."""
        name = f"{self.prefix}{key}"
        if not self.has(key):
            return InvalidValue(f"{self.where}: the key {name!r} is missing; it must be {allowed}")
        return InvalidValue(f"{self.where}: {name} is {_brief(self.data[key])}; it must be {allowed}")

    def integer(self, key: str, default: int | _Required = REQUIRED, minimum: int = 1, maximum: int = 10**9) -> int:
        """A whole number from `minimum` to `maximum`."""
        value = self.data.get(key)
        if value is None and not isinstance(default, _Required):
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            kind = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise self.refuse(key, kind if maximum == 10**9 else f"{kind}, at most {maximum}")
        return value

    def number(self, key: str, default: float | _Required = REQUIRED) -> float:
        """A finite number that is not negative."""
        value = self.data.get(key)
        if value is None and not isinstance(default, _Required):
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise self.refuse(key, "a finite number, not negative")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, allowed: Iterable[str], default: str | _Required = REQUIRED) -> str:
        allowed = tuple(allowed)
        value = self.data.get(key)
        if value is None and not isinstance(default, _Required):
            return default
        if value not in allowed:
            raise self.refuse(key, f"one of {', '.join(allowed)}")
        return value

    def only(self, key: str, value: Any) -> None:
        """Refuse a setting that the decoder does not implement; an absent key is the one value that it does."""
        if self.has(key) and self.data[key] != value:
            raise self.refuse(key, f"{json.dumps(value)}, the only setting that Rooflight implements")

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self.data.get(key)
        is_list = isinstance(value, list) and len(value) == length
        if not is_list or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value or ()):
            raise self.refuse(key, f"a list of {length} numbers")
        return tuple(float(x) for x in value or ())

    def indices(self, key: str, count: int) -> frozenset[int]:
        """A list of layer numbers below `count`, empty when absent."""
        value = self.data.get(key)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or not all(type(x) is int and 0 <= x < count for x in value):
            raise self.refuse(key, f"a list of layer numbers from 0 to {count - 1}")
        return frozenset(value)

    def section(self, key: str) -> Fields | None:
        """A nested mapping, or None when absent."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, "a JSON object")
        return Fields(value, self.where, f"{self.prefix}{key}.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a missing, truncated or foreign file raises InvalidValue naming it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidValue(
            f"{path}: cannot be read ({error.strerror or error}); give an existing config.json"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{path}: is not a text file; give a JSON file such as config.json") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidValue(
            f"{path}: is not valid JSON ({error}); it is truncated or corrupt, fetch it again"
        ) from error
    if not isinstance(data, dict):
        raise InvalidValue(f"{path}: holds {_brief(data)}; it must hold a JSON object with the model's settings")
    return data
