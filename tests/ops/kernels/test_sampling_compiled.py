"""What the sampling kernels compile to for an H100 or H200, without one: 16-byte loads, no spills, room for programs.

`python -m pytest tests/ops/kernels/test_sampling_compiled.py -s` prints the table.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.knobs
from torch import Tensor
from triton.runtime.jit import JITFunction

from rooflight.ops.kernels import sampling, sampling_ranked, sampling_search, sampling_survey
from rooflight.ops.sampling import sample, sample_plain

from . import test_ahead_of_time as ahead

COMPILES = (
    sampling._peak_kernel,
    sampling._draw_kernel,
    sampling_survey.survey_kernel,
    sampling_survey.bands_kernel,
    sampling_ranked._gather_kernel,
    sampling_search.choose_kernel,
)
VOCABULARY = 151_936
# Threads that a multiprocessor must hold: reading kernels by their bytes in flight; a search is one program a row.
THREADS = {
    "_peak_kernel": 2048,
    "_draw_kernel": 640,
    "survey_kernel": 1024,
    "bands_kernel": 256,
    "_gather_kernel": 768,
    "choose_kernel": 256,
}
# Bytes of scalars that are needed again only after all loops.
STACK = {"choose_kernel": 96, "survey_kernel": 8}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, tuple[ahead.Compiled, str]]]:
    """Kernels that a test launched, compiled and not run, with the machine's instructions."""
    found: dict[str, tuple[ahead.Compiled, str]] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = ahead.compile_launch(self, args, options, tmp_path)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / f"{kernel.name}.cubin"]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[kernel.name] = kernel, sass

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setitem(ahead.POINTERS, torch.float64, "*fp64")
    for module in (sampling, sampling_ranked):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    yield found
    for kernel, _ in found.values():
        print(f"\n{kernel} resident threads {kernel.resident_threads}", end="")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 256])
def test_compiles_for_hopper(rows: int, dtype: torch.dtype, compiled: dict[str, tuple[ahead.Compiled, str]]):
    logits_BV = meta(rows, VOCABULARY, dtype=dtype)
    real_B, top_k_B = meta(rows, dtype=torch.float64), meta(rows, dtype=torch.int64)
    sampling.greedy(logits_BV)
    sampling.sample_plain(logits_BV, real_B, real_B)
    sampling_ranked.sample(logits_BV, real_B, top_k_B, real_B, real_B, real_B)
    assert set(compiled) == set(THREADS)
    for name, (kernel, _) in compiled.items():
        assert kernel.stack <= STACK.get(name, 0), f"{kernel} spills"
        assert kernel.resident_threads >= THREADS[name], f"{kernel} leaves room for {kernel.resident_threads} threads"
        # The search reads from one of two addresses, whose alignment nobody knows.
        assert kernel.wide_loads > 0 or name == "choose_kernel", f"{kernel} loads less than 16 bytes a thread"


def test_a_weight_is_one_power_and_one_conversion(compiled: dict[str, tuple[ahead.Compiled, str]]):
    """No division and no case of a result's size: what makes the reference's bits at the speed of memory."""
    real_B = meta(256, dtype=torch.float64)
    sampling.sample_plain(meta(256, VOCABULARY, dtype=torch.bfloat16), real_B, real_B)
    sass = compiled["_draw_kernel"][1]
    weighing = sass[: sass.index("ATOM")]
    elements = sampling.MOST_TILES * sampling.TILE // (32 * sampling.WARPS)
    assert len(re.findall(r"MUFU\.EX2", weighing)) == len(re.findall(r"F2I\.S64", weighing)) == elements
    assert len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", weighing, re.M)) < 14 * elements


def test_the_counter_is_read_after_every_warps_stores(compiled: dict[str, tuple[ahead.Compiled, str]]):
    """In the machine's code: the chunk's store, barrier, atomic count, loads from L2."""
    real_B = meta(1, dtype=torch.float64)
    sampling.sample_plain(meta(1, VOCABULARY, dtype=torch.bfloat16), real_B, real_B)
    sass = compiled["_draw_kernel"][1]
    atomic = sass.index("ATOM")
    barrier = sass.rindex("BAR.SYNC", 0, atomic)
    assert "STG" in sass[:barrier] and "STG" not in sass[barrier:atomic]
    assert re.search(r"LDG\.E[\w.]*STRONG\.GPU", sass[atomic:])


def test_what_a_draw_is_said_to_hold_is_what_it_asks_for(
    compiled: dict[str, tuple[ahead.Compiled, str]], monkeypatch: pytest.MonkeyPatch
):
    """Of many rows, as a step's memory is planned."""
    asked: list[int] = []
    empty = torch.empty

    def counted(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        asked.append(tensor.nbytes)
        return tensor

    rows = 256
    logits_BV, real_B = meta(rows, VOCABULARY, dtype=torch.float32), meta(rows, dtype=torch.float64)
    top_k_B, out_B = meta(rows, dtype=torch.int64), meta(rows, dtype=torch.int64)
    calls: Any = (
        (sample_plain, (real_B, real_B), sampling.sample_plain),
        (sample, (real_B, top_k_B, real_B, real_B, real_B), sampling_ranked.sample),
    )
    for op, others, kernel in calls:
        monkeypatch.setattr(torch, "empty", counted)
        kernel(logits_BV, *others)
        monkeypatch.setattr(torch, "empty", empty)
        workspace = op.price(out_B, logits_BV, *others).workspace
        held = sum(asked) - out_B.nbytes
        # Plain draws are of few chunks here, and next to nothing.
        assert held <= workspace and (op is sample_plain or held > 0.95 * workspace)
        asked.clear()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "tiles"),
    [(1, 151_936, 1), (1, 262_144, 1), (32, 151_936, 4), (256, 151_936, 8), (512, 262_144, 8), (1, 2**20, 4)],
)
def test_chunks_fill_the_machine_and_can_be_summed_up(rows: int, vocabulary: int, tiles: int):
    assert sampling.tiles_of(rows, vocabulary, 132) == tiles
