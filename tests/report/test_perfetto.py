"""The trace of a profiled step: read back by a second, simple reader of the Trace Event format; and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rooflight.report.perfetto import MEASURED, PREDICTED, table, to_trace, trace_events, write
from rooflight.train.comparison import HeadroomRow, Held, Profile, Slice
from rooflight.train.kernel_trace import Kernel

US = 1e-6


def made(*, kernels: bool = False, machine: str = "a machine") -> Profile:
    """Two layers forward and back, with times by hand: operation i takes i + 1 µs and starts every 10 µs."""
    places = [
        ("embedding", "embedding", "forward", None),
        ("linear", "layers.0.ffn", "forward", 0),
        ("linear", "layers.1.ffn", "forward", 1),
        ("linear_weight_grad", "layers.1.ffn", "backward", 1),
        ("aten.add_", "", "backward", 1),
        ("linear_weight_grad", "layers.0.ffn", "backward", 0),
        ("adamw", "", "optimizer", None),
    ]
    host = [
        Slice(
            name, path, phase, layer, 10 * index * US, (index + 1) * US, 100.0 * index, 8.0, index * US,
            (index + 0.5) * US, "memory",
        )
        for index, (name, path, phase, layer) in enumerate(places)
    ]  # fmt: skip
    starts = [sum(index + 0.5 for index in range(at)) * US for at in range(len(host))]
    predicted = [replace(each, start=start, seconds=each.expected_seconds) for each, start in zip(host, starts)]
    ran = [Kernel("gemm", 50 * US, 7 * US, 7, 1), Kernel("fill", 58 * US, 1 * US, 7, None)] if kernels else []
    row = HeadroomRow("linear", "layers.*.ffn", "forward", 2, 5 * US, 4 * US, 3 * US, "memory")
    return Profile(
        step=12,
        device="cpu",
        machine=machine,
        seconds=70 * US,
        host=host,
        kernels=ran,
        measured=[each.seconds for each in host],
        predicted=predicted if machine else [],
        memory=[
            Held(0.0, {"weights": 100.0, "activations": 0.0}),
            Held(3 * US, {"weights": 100.0, "activations": 9.0}),
        ],
        rows=[row, replace(row, operation="adamw", path="", roof_seconds=None, expected_seconds=None)],
        notes=["a note"],
    )


class Reader:
    """What a viewer makes of a trace: named processes and tracks, slices as a forest by containment, counters."""

    def __init__(self, text: str):
        data = json.loads(text)
        self.processes: dict[int, str] = {}
        self.tracks: dict[tuple[int, int], str] = {}
        self.slices: dict[tuple[int, int], list[tuple[int, dict[str, Any]]]] = {}
        self.counters: list[dict[str, Any]] = []
        last = 0.0
        for event in data["traceEvents"]:
            assert event["ph"] in ("X", "M", "C")
            assert isinstance(event["pid"], int)
            if event["ph"] == "M":
                assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
                if event["name"] == "process_name":
                    self.processes[event["pid"]] = event["args"]["name"]
                if event["name"] == "thread_name":
                    self.tracks[event["pid"], event["tid"]] = event["args"]["name"]
                continue
            assert event["ts"] >= last, "events are in the order of time"
            last = event["ts"]
            if event["ph"] == "C":
                assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
                self.counters.append(event)
            else:
                assert event["dur"] >= 0
                self._nest(event)

    def _nest(self, event: dict[str, Any]) -> None:
        """Depth of a slice: how many that began before it on its track are not over yet; all of them must hold it."""
        track = self.slices.setdefault((event["pid"], event["tid"]), [])
        stop = event["ts"] + event["dur"]
        outer = [other for _, other in track if other["ts"] + other["dur"] > event["ts"] + 1e-9]
        for other in outer:
            assert stop <= other["ts"] + other["dur"] + 1e-9, f"{event['name']} reaches out of {other['name']}"
        track.append((len(outer), event))


@pytest.mark.parametrize("kernels", [False, True])
def test_the_trace_is_one_that_viewers_read(kernels: bool) -> None:
    found = Reader(to_trace(made(kernels=kernels)))
    assert found.processes == {MEASURED: "measured: cpu, step 12", PREDICTED: "predicted: a machine"}
    names = list(found.tracks.values())
    assert names.count("expected times end to end") == 1
    assert ("GPU stream 7" in names) == kernels
    assert set(found.slices) == set(found.tracks)


def test_operations_lie_in_layers_and_layers_in_phases() -> None:
    found = Reader(to_trace(made()))
    host = found.slices[MEASURED, 1]
    assert [(depth, event["name"]) for depth, event in host] == [
        (0, "forward"),
        (1, "embedding"),
        (1, "layer 0"),
        (2, "linear"),
        (1, "layer 1"),
        (2, "linear"),
        (0, "backward"),
        (1, "layer 1"),
        (2, "linear_weight_grad"),
        (2, "aten.add_"),
        (1, "layer 0"),
        (2, "linear_weight_grad"),
        (0, "optimizer"),
        (1, "adamw"),
    ]
    assert [event["ts"] for depth, event in host if event["cat"] not in ("phase", "layer")] == pytest.approx(
        [0, 10, 20, 30, 40, 50, 60]
    )


def test_slices_tell_their_prices() -> None:
    events = [event for event in trace_events(made()) if event["ph"] == "X" and event["name"] == "adamw"]
    assert {(event["pid"], event["tid"]) for event in events} == {(MEASURED, 1), (MEASURED, 2), (PREDICTED, 1)}
    for event in events:
        assert event["args"] == {
            "path": "", "phase": "optimizer", "FLOPs": 600.0, "bytes": 8.0, "roof µs": 6.0, "expected µs": 6.5,
            "bound": "memory",
        }  # fmt: skip
    assert {event["dur"] for event in events} == {7.0, 6.5}


def test_measured_operations_also_lie_end_to_end() -> None:
    joined = [
        event for _, event in Reader(to_trace(made())).slices[MEASURED, 2] if event["cat"] not in ("phase", "layer")
    ]
    assert [event["ts"] for event in joined] == pytest.approx([0, 1, 3, 6, 10, 15, 21])


def test_kernels_tell_who_launched_them() -> None:
    found = Reader(to_trace(made(kernels=True)))
    kernels = {event["name"]: event for _, event in found.slices[MEASURED, 10]}
    assert kernels["gemm"]["args"]["path"] == "layers.0.ffn"
    assert kernels["gemm"]["args"]["operation"] == "linear"
    assert (kernels["gemm"]["ts"], kernels["gemm"]["dur"]) == pytest.approx((50.0, 7.0))
    assert kernels["fill"]["args"] == {}


def test_memory_is_a_counter_by_category() -> None:
    counters = Reader(to_trace(made())).counters
    assert [event["args"] for event in counters] == [
        {"weights": 100, "activations": 0},
        {"weights": 100, "activations": 9},
    ]
    assert [event["ts"] for event in counters] == pytest.approx([0.0, 3.0])


def test_without_a_prediction_there_is_one_process() -> None:
    found = Reader(to_trace(made(machine="")))
    assert list(found.processes) == [MEASURED]
    assert found.counters == []


def test_rounding_never_pushes_a_slice_out_of_its_phase() -> None:
    profile = made()
    third = [
        replace(each, start=index / 3 * US, seconds=US / 3, layer=None, phase="forward")
        for index, each in enumerate(profile.host * 40)
    ]
    profile.host, profile.measured = third, [each.seconds for each in third]
    Reader(to_trace(profile))


def test_the_table_tells_the_headroom() -> None:
    text = table(made())
    lines = text.splitlines()
    assert lines[0].startswith("Step 12 on cpu against a machine: recorded in 70.0 µs, of which 28.0 µs")
    assert "predicted 24.5 µs" in lines[0] and "roof 21.0 µs" in lines[0]
    assert lines[3].split() == [
        "linear", "layers.*.ffn", "forward", "2", "5.00", "µs", "4.00", "µs", "3.00", "µs", "2.00", "µs", "1.67×",
        "18%", "memory",
    ]  # fmt: skip
    assert lines[4].split()[-3:] == ["–", "18%", "memory"]  # no roof: neither headroom nor ratio
    assert lines[-1] == "- a note"


def test_rows_beyond_the_table_are_counted() -> None:
    profile = made()
    profile.rows = profile.rows * 15
    assert "and 10 more, in step-12.json" in table(profile)


def test_three_files_are_written(tmp_path: Path) -> None:
    text = write(made(), tmp_path / "profile")
    folder = tmp_path / "profile"
    assert {path.name for path in folder.iterdir()} == {"step-12.trace.json", "step-12.txt", "step-12.json"}
    assert (folder / "step-12.txt").read_text(encoding="utf-8") == text
    figures = json.loads((folder / "step-12.json").read_text(encoding="utf-8"))
    assert figures["rows"][0]["headroom_seconds"] == pytest.approx(2 * US)
    Reader((folder / "step-12.trace.json").read_text(encoding="utf-8"))
