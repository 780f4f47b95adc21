"""Machine files: reading and checking TOML, writing it, and finding a machine by name, by path or as `here`."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

from rooflight.errors import InvalidValue
from rooflight.hardware.figures import Figure, Sample
from rooflight.hardware.machine import Machine
from rooflight.hardware.schema import parse

HERE = "here"
# The machines whose measured efficiency stands in for a machine that carries no samples.
REFERENCES = {"gpu": "h200", "tpu": "h200", "cpu": "cloud-cpu"}


def here_path() -> Path:
    """The file of `rooflight probe` and `--on here`: rooflight/here.toml in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "rooflight" / "here.toml"


@cache
def _shipped() -> dict[str, str]:
    """Text of every shipped machine file by machine name."""
    folder = resources.files("rooflight.hardware") / "catalog"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8") for entry in files}


@cache
def _names() -> dict[str, str]:
    """Machine name by every name and alias that it answers to, in lower case."""
    names = {name: name for name in _shipped()}
    for name, text in _shipped().items():
        for alias in tomllib.loads(text).get("aliases", []):
            names.setdefault(alias.lower(), name)
    return names


def catalog() -> list[str]:
    """Names of the machines that ship with Rooflight."""
    return list(_shipped())


@cache
def _load_shipped(name: str) -> Machine:
    return _with_reference(parse(_shipped()[name], f"machine {name!r} of the catalog"))


def _with_reference(machine: Machine) -> Machine:
    """Attach the machine that lends its efficiency, unless it is this one."""
    name = REFERENCES[machine.kind]
    if machine.name == name or name not in _shipped():
        return machine
    return replace(machine, reference=_load_shipped(name))


def load(name_or_path: str | Path) -> Machine:
    """A machine by catalog name or alias (any case), by the path of a machine file, or `here` as probed.

    Raises InvalidValue: an unknown name (close matches are named), a file that is missing or holds a bad value.
    """
    text = str(name_or_path)
    if text.lower() == HERE:
        path = here_path()
        if not path.is_file():
            raise InvalidValue(f"machine 'here' has not been measured yet: no file {path}; run `rooflight probe` first")
        return _load_file(path)
    if text.lower() in _names():
        return _load_shipped(_names()[text.lower()])
    path = Path(text).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.suffix == ".toml" or os.sep in text:
        raise InvalidValue(
            f"no machine file {text!r}; give an existing .toml file or one of {', '.join(catalog())}, here"
        )
    close = difflib.get_close_matches(text.lower(), [*_names(), HERE], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise InvalidValue(
        f"unknown machine {text!r}; {hint}use one of {', '.join(catalog())}, here (after `rooflight probe`), "
        "or the path of a machine file"
    )


def _load_file(path: Path) -> Machine:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"machine file {path} cannot be read ({error}); give a readable UTF-8 TOML file") from error
    return _with_reference(parse(text, f"machine file {path}"))


def match_device(device_name: str) -> Machine | None:
    """The catalog machine of a GPU by the name that its driver reports; the longest match wins, None without one."""
    best: tuple[int, str] | None = None
    for name, text in _shipped().items():
        for pattern in tomllib.loads(text).get("device_names", []):
            if pattern.lower() in device_name.lower() and (best is None or len(pattern) > best[0]):
                best = len(pattern), name
    return _load_shipped(best[1]) if best else None


def _quote(text: str) -> str:
    # A JSON string is a TOML basic string, once DEL and the escapes that JSON leaves alone are kept as they are.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else repr(float(f"{value:.6g}"))


def _exact(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _figure(figure: Figure) -> str:
    return f"{{ value = {_exact(figure.value)}, source = {_quote(figure.source)} }}"


def _table(title: str, figures: Mapping[str, Figure]) -> Iterator[str]:
    if figures:
        yield f"\n[{title}]"
        for key, figure in figures.items():
            yield f"{_quote(key)} = {_figure(figure)}"


def _row(sample: Sample) -> str:
    flops = ", ".join(f"{precision} = {_exact(count)}" for precision, count in sample.flops.items())
    cells = [
        f"curve = {_quote(sample.curve)}",
        f"precision = {_quote(sample.precision)}",
        f"size = {list(sample.size)}",
        f"flops = {{ {flops} }}" if flops else "flops = {}",
        f"bytes = {_exact(sample.bytes)}",
        f"seconds = {_number(sample.seconds)}",
    ]
    if sample.host_seconds is not None:
        cells.append(f"host_seconds = {_number(sample.host_seconds)}")
    if sample.link_bytes:
        cells.append(f"link_bytes = {_exact(sample.link_bytes)}")
    return f"  {{ {', '.join(cells)} }},"


def dumps(machine: Machine) -> str:
    """A machine as the TOML text that `load` reads; measured seconds keep six digits."""
    lines = [f"{key} = {_quote(getattr(machine, key))}" for key in ("name", "title", "kind")]
    for key in ("aliases", "device_names"):
        if getattr(machine, key):
            lines.append(f"{key} = [{', '.join(_quote(text) for text in getattr(machine, key))}]")
    for key in ("power_watts", "price_per_hour"):
        if getattr(machine, key) is not None:
            lines.append(f"{key} = {_figure(getattr(machine, key))}")
    lines.extend(_table("peaks", machine.peaks))
    lines.extend(_table("memory", {"bandwidth": machine.memory_bandwidth, "capacity": machine.memory_bytes}))
    lines.extend(_table("caches", machine.caches))
    lines.extend(_table("launch", {"eager": machine.launch_eager_seconds, "graph": machine.launch_graph_seconds}))
    lines.extend(_table("measured", machine.measured))
    for link in machine.links.values():
        lines.append(f"\n[links.{_quote(link.name)}]")
        lines.append(f"latency_seconds = {_exact(link.latency_seconds)}")
        lines.append(f"bandwidth_bytes_per_s = {_exact(link.bandwidth_bytes_per_s)}")
        lines.append(f"domain = {link.domain}")
        lines.append(f"source = {_quote(link.source)}")
    if machine.samples:
        lines.append(f"\n[samples]\nsource = {_quote(machine.samples_source)}\nrows = [")
        lines.extend(_row(sample) for sample in machine.samples)
        lines.append("]")
    return "\n".join(lines) + "\n"


def save(machine: Machine, path: Path | None = None) -> Path:
    """Write a machine file (default: the one that `here` reads) whole or not at all, and return its path."""
    path = here_path() if path is None else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(path.suffix + ".draft")
        draft.write_text(dumps(machine), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise InvalidValue(
            f"machine file {path} cannot be written ({error}); give a path that you may write"
        ) from error
    return path
