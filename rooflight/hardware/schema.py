"""From the text of a machine file to a `Machine`, with one clear error for each bad value."""

from __future__ import annotations

import math
import tomllib
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.hardware.figures import ANY, STAND_INS, Figure, Link, Sample
from rooflight.hardware.machine import Machine

KINDS = ("gpu", "cpu", "tpu")
CACHES = ("l1", "l2", "l3", "shared")
KEYS = {
    "name", "title", "kind", "aliases", "device_names", "power_watts", "price_per_hour",
    "peaks", "memory", "caches", "launch", "links", "measured", "samples",
}  # fmt: skip


class _Reader:
    """Typed access to parsed TOML; every complaint starts with the file and the key."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, key: str, found: Any, allowed: str) -> InvalidValue:
        return InvalidValue(f"{self.where}: {key} is {found!r}; it must be {allowed}; mend it or run `rooflight probe`")

    def table(self, data: dict[str, Any], key: str, *, needed: bool = True) -> dict[str, Any]:
        found = data.get(key, None if needed else {})
        if not isinstance(found, dict):
            raise self.fail(key, found, "a table")
        return found

    def text(self, data: dict[str, Any], key: str, where: str = "") -> str:
        found = data.get(key)
        if not isinstance(found, str) or not found.strip():
            raise self.fail(where + key, found, "a text that is not empty")
        return found

    def texts(self, data: dict[str, Any], key: str) -> tuple[str, ...]:
        found = data.get(key, [])
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise self.fail(key, found, "a list of texts")
        return tuple(found)

    def number(self, data: dict[str, Any], key: str, where: str = "", *, zero: bool = False) -> float:
        found = data.get(key)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise self.fail(where + key, found, "a finite number")
        if found < 0 or (found == 0 and not zero):
            raise self.fail(where + key, found, "zero or more" if zero else "more than zero")
        return float(found)

    def whole(self, found: Any, key: str) -> int:
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise self.fail(key, found, "a whole number of at least 1")
        return found

    def figure(self, data: dict[str, Any], key: str, where: str = "") -> Figure:
        found = data.get(key)
        if not isinstance(found, dict):
            raise self.fail(where + key, found, "a table { value = number, source = text }")
        inner = f"{where}{key}."
        return Figure(self.number(found, "value", inner), self.text(found, "source", inner))

    def figures(self, data: dict[str, Any], key: str, names: tuple[str, ...] | None = None) -> dict[str, Figure]:
        table = self.table(data, key, needed=False)
        for name in table:
            if names is not None and name not in names:
                raise self.fail(f"a key of {key}", name, f"one of {', '.join(names)}")
        return {name: self.figure(table, name, f"{key}.") for name in table}

    def link(self, name: str, found: Any) -> Link:
        where = f"links.{name}."
        if not isinstance(found, dict):
            raise self.fail(where[:-1], found, "a table")
        return Link(
            name=name,
            latency_seconds=self.number(found, "latency_seconds", where, zero=True),
            bandwidth_bytes_per_s=self.number(found, "bandwidth_bytes_per_s", where),
            domain=self.whole(found.get("domain"), f"{where}domain"),
            source=self.text(found, "source", where),
        )

    def sample(self, index: int, found: Any) -> Sample:
        where = f"samples.rows[{index}]."
        if not isinstance(found, dict):
            raise self.fail(where[:-1], found, "a table")
        precision = self.text(found, "precision", where)
        if precision not in (*STAND_INS, ANY):
            raise self.fail(f"{where}precision", precision, f"one of {', '.join((*STAND_INS, ANY))}")
        size = found.get("size")
        if not isinstance(size, list) or not size:
            raise self.fail(f"{where}size", size, "a list of whole numbers")
        flops = found.get("flops", {})
        if not isinstance(flops, dict) or not set(flops) <= set(STAND_INS):
            raise self.fail(f"{where}flops", flops, f"a table of FLOPs by precision ({', '.join(STAND_INS)})")
        return Sample(
            curve=self.text(found, "curve", where),
            precision=precision,
            size=tuple(self.whole(item, f"{where}size") for item in size),
            flops={name: self.number(flops, name, f"{where}flops.", zero=True) for name in flops},
            bytes=self.number(found, "bytes", where, zero=True),
            seconds=self.number(found, "seconds", where),
            host_seconds=self.number(found, "host_seconds", where) if "host_seconds" in found else None,
            link_bytes=self.number(found, "link_bytes", where, zero=True) if "link_bytes" in found else 0.0,
        )


def parse(text: str, where: str) -> Machine:
    """The machine that a TOML text describes; `where` names the file in errors. Raises InvalidValue."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidValue(f"{where} is not valid TOML ({error}); mend it or run `rooflight probe`") from error
    read = _Reader(where)
    for key in data:
        if key not in KEYS:
            raise read.fail("a key", key, f"one of {', '.join(sorted(KEYS))}")
    kind = read.text(data, "kind")
    if kind not in KINDS:
        raise read.fail("kind", kind, f"one of {', '.join(KINDS)}")
    peaks = read.figures(data, "peaks", tuple(STAND_INS))
    # Every operation has some elementwise arithmetic, which is counted in fp32.
    if "fp32" not in peaks:
        raise read.fail("peaks.fp32", None, "given: elementwise arithmetic is counted in fp32")
    memory, launch = read.table(data, "memory"), read.table(data, "launch")
    links = {name: read.link(name, found) for name, found in read.table(data, "links", needed=False).items()}
    samples = read.table(data, "samples", needed=False)
    rows = samples.get("rows", [])
    if not isinstance(rows, list):
        raise read.fail("samples.rows", rows, "a list of tables")
    machine = Machine(
        name=read.text(data, "name"),
        title=read.text(data, "title"),
        kind=kind,
        peaks=peaks,
        memory_bandwidth=read.figure(memory, "bandwidth", "memory."),
        memory_bytes=read.figure(memory, "capacity", "memory."),
        launch_eager_seconds=read.figure(launch, "eager", "launch."),
        launch_graph_seconds=read.figure(launch, "graph", "launch."),
        caches=read.figures(data, "caches", CACHES),
        links=links,
        measured=read.figures(data, "measured"),
        samples=tuple(read.sample(index, found) for index, found in enumerate(rows)),
        samples_source=read.text(samples, "source", "samples.") if rows else "",
        power_watts=read.figure(data, "power_watts") if "power_watts" in data else None,
        price_per_hour=read.figure(data, "price_per_hour") if "price_per_hour" in data else None,
        aliases=read.texts(data, "aliases"),
        device_names=read.texts(data, "device_names"),
    )
    if any(sample.link_bytes for sample in machine.samples) and not links:
        raise read.fail("links", {}, "given where samples carry link_bytes")
    return machine
