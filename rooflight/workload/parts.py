"""Names for the parts of somebody else's module: which of its submodules a report shows as components."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from rooflight.workload.record import BACKWARD, OPTIMIZER, Record

MOST = 12  # rows of a table that is still read at a glance
# A part with more of the work than this says too little in one row; a short table has room for more.
_HEAVY, _HEAVY_OF_FEW, _FEW = 0.5, 0.25, 4
_WRAPPER = 0.7
_REST = "others"
_NESTED = re.compile(r"\*\.(?:.*\.)?\*")
_NUMBER = re.compile(r"\d+")


def name_parts(records: Iterable[Record], module: nn.Module) -> None:
    """Give every record without a component the name of the submodule that it belongs to, equal layers under one name.

    The names are the module's own: first its children, then in place of a child with more than half of all work (FLOPs
    and bytes alike, whatever the machine) that child's children, as long as there are at most MOST names.
    """
    unnamed = [record for record in records if not record.component and not _outside(record)]
    general = general_paths(module)
    work = _work(unnamed, general)
    if len(_children("", work)) > MOST:
        # Many numbered siblings (block0 … block59) are layers too, though nobody put them in a list.
        general = {path: _NUMBER.sub("*", name) for path, name in general.items()}
        work = _work(unnamed, general)
    shown, opened = _choose(work)
    wrapper = _wrapper(work)
    names = _short({name: _written(path, name, module, wrapper) for path, name in general.items()})
    for record in unnamed:
        path = general.get(record.path, record.path)
        inside = next((prefix for prefix in _prefixes(path) if prefix in shown), None)
        around = next(prefix for prefix in _prefixes(path) if prefix in opened)
        if inside is not None:
            record.component = names[inside]
        elif around == "" and path:
            record.component = _REST
        elif around == "":
            record.component = f"{names['']} itself" if shown else names[""]
        else:
            record.component = f"{names[around]} itself"


def _outside(record: Record) -> bool:
    """Whether a record is of no module: the gradient that the backward starts from."""
    return not record.path and record.phase == BACKWARD and record.name == "aten.ones_like"


def general_paths(module: nn.Module) -> dict[str, str]:
    """Each module path with the index replaced by a star wherever a container holds several of one class."""
    modules = dict(module.named_modules(remove_duplicate=False))
    general = {"": ""}
    for path in modules:
        if not path:
            continue
        parent, _, name = path.rpartition(".")
        if name.isdigit() and _holds_layers(modules[parent]):
            name = "*"
        general[path] = f"{general[parent]}.{name}".lstrip(".")
    return general


def _holds_layers(container: nn.Module) -> bool:
    """Whether a container's numbered children are one layer many times over, and not the steps of a pipeline."""
    kinds = [type(child) for name, child in container.named_children() if name.isdigit()]
    return len(kinds) > 1 and len(set(kinds)) == 1


def _work(records: list[Record], general: Mapping[str, str]) -> dict[str, float]:
    """Each general path's own part of all FLOPs and of all bytes, averaged.

    The optimizer's belongs to no part, and an operation that has parts of its own (scores, context) needs none.
    """
    sums: dict[str, tuple[float, float]] = {}
    for record in records:
        if record.phase != OPTIMIZER and not record.cost.parts:
            path = general.get(record.path, record.path)
            flops, size = sums.get(path, (0.0, 0.0))
            sums[path] = (flops + float(record.cost.total_flops), size + float(record.cost.total_bytes))
    all_flops = sum(flops for flops, _ in sums.values()) or 1.0
    all_bytes = sum(size for _, size in sums.values()) or 1.0
    return {path: (flops / all_flops + size / all_bytes) / 2 for path, (flops, size) in sums.items()}


def _prefixes(path: str) -> Iterable[str]:
    """A path and all that it stands in, the longest first, the module itself last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _children(parent: str, work: Mapping[str, float]) -> dict[str, float]:
    """The parts one level below a path, each with all the work in it."""
    found: dict[str, float] = {}
    depth = parent.count(".") + 1 if parent else 0
    for path, share in work.items():
        if path and (not parent or path.startswith(f"{parent}.")):
            child = ".".join(path.split(".")[: depth + 1])
            found[child] = found.get(child, 0.0) + share
    return found


def _choose(work: Mapping[str, float]) -> tuple[set[str], set[str]]:
    """(shown, opened): paths that are a component each, and those that gave way to their children."""
    shown, opened = _children("", work), {""}
    if len(shown) > MOST:
        heaviest = sorted(shown, key=lambda path: -shown[path])[: MOST - 1]
        return set(heaviest), opened
    while True:
        enough = _HEAVY if len(shown) >= _FEW else _HEAVY_OF_FEW
        heavy = [path for path in sorted(shown, key=lambda path: -shown[path]) if shown[path] > enough]
        inner = {path: _children(path, work) for path in heavy}
        path = next((path for path in heavy if inner[path] and len(shown) + len(inner[path]) <= MOST), None)
        if path is None:
            return set(shown), opened
        del shown[path]
        shown |= inner[path]
        opened.add(path)


def _short(names: dict[str, str]) -> dict[str, str]:
    """Names with layers in layers written as `stages.**.conv`, where that still tells them apart."""
    short = {path: _NESTED.sub("**", name) for path, name in names.items()}
    seen = Counter(short.values())
    return {path: name if seen[name] == 1 else names[path] for path, name in short.items()}


def _wrapper(work: Mapping[str, float]) -> str:
    """The child in which nearly everything happens, `model` beside `lm_head` say: its name tells nothing apart."""
    shares = _children("", work)
    most = max(shares, key=lambda path: shares[path], default="")
    inner = {path.rpartition(".")[2] for path in _children(most, work)} if most else set()
    alone = shares.get(most, 0.0) > _WRAPPER * sum(shares.values())
    return most if alone and inner and not any(name == "*" or name.isdigit() for name in inner | {most}) else ""


def _written(path: str, name: str, module: nn.Module, wrapper: str) -> str:
    """A general path as a report shows it: without the wrapper, and with its class where there is only an index."""
    if not path:
        return type(module).__name__
    short = name.removeprefix(f"{wrapper}.") if wrapper else name
    if short.rpartition(".")[2].isdigit() or short == "*":
        return f"{short} {type(module.get_submodule(path)).__name__}"
    return short
