"""The report of `bench ops`: what is wrong has no time, columns go where there is no room, nothing breaks Markdown."""

from __future__ import annotations

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console

from rooflight.cli.bench_ops import PEERS
from rooflight.report import op_bench as report
from rooflight.workload.op_bench import BACKWARD, FORWARD, Measured, Result, Row
from rooflight.workload.op_bench.result import Verdict

RIGHT, OFF = Verdict(1e-3, 4e-3), Verdict(0.5, 4e-3)
PEER = Measured("cudnn", 3e-3, 0.01, True, RIGHT)
EVIL = "<b>|*evil*\n[x]\x1b[31m"


def row(name: str, ours: Measured, *peers: Measured, which: str = FORWARD, bound: str = "compute") -> Row:
    return Row(name, "4×8", which, ours, peers, {"bf16": 2e9, "fp32": 1e6}, 3e6, 1e-3, bound, 1.5e-3)


FAST = row("attention", Measured("ours", 2e-3, 0.01, True, RIGHT), Measured("eager", 4e-3, verdict=RIGHT), PEER)
SLOW = row("rms_norm", Measured("ours", 4e-3, verdict=RIGHT), PEER, which=BACKWARD, bound="memory")
BAD = row("softmax", Measured("ours", 2e-3, verdict=OFF), Measured("eager", 1e-3, verdict=OFF), PEER)
BROKEN = row("linear", Measured("ours", failure="RuntimeError: x"), Measured("liger", failure="OSError: y"))
UNSURE = row("greedy", Measured("ours", 2e-3), Measured("zebra", 4e-3, verdict=RIGHT))
RESULT = Result("a GPU", "NVIDIA H200", "bf16", ("bf16", "torch"), (FAST, SLOW, BAD, BROKEN, UNSURE), ("a note",))


def rendered(result: Result, width: int) -> list[str]:
    out = io.StringIO()
    report.render(result, Console(file=out, width=width))
    return out.getvalue().splitlines()


def cells(result: Result) -> dict[str, list[str]]:
    return {column.title: [cell.text for cell in column.cells] for column in report.columns(result)}


def test_columns() -> None:
    found = cells(RESULT)
    assert list(found) == [
        *("operation", "pass", "time", "rate", "of the roof", "of measured", "bound", "against the best peer"),
        *("eager", "cudnn", "liger", "zebra", "error"),
    ]
    assert found["pass"] == ["fwd", "bwd", "fwd", "fwd", "fwd"]
    assert found["time"] == ["2.00 ms", "4.00 ms", "WRONG", "failed", "2.00 ms?"]
    assert found["rate"] == ["1.00 TFLOP/s", "750 MB/s", "–", "–", "1.00 TFLOP/s"]
    assert found["of the roof"] == ["50%", "25%", "–", "–", "50%"]
    assert found["of measured"] == ["75%", "38%", "–", "–", "75%"]
    assert found["against the best peer"] == ["1.50× cudnn", "0.75× cudnn", "", "", "2.00× zebra"]
    assert found["eager"] == ["4.00 ms", "", "WRONG", "", ""]
    assert found["liger"] == ["", "", "", "failed", ""]
    assert found["error"] == ["1.0e-03", "1.0e-03", "5.0e-01", "–", "–"]


def test_no_roof_and_no_peers_no_columns() -> None:
    bare = Row("greedy", "4×8", FORWARD, Measured("ours", 2e-3, verdict=RIGHT), (), {}, 3e6)
    assert list(cells(Result("a CPU", "", "fp32", (), (bare,)))) == ["operation", "pass", "time", "rate", "error"]


@pytest.mark.parametrize("width", [200, 100, 72])
def test_table_fits(width: int) -> None:
    lines = rendered(RESULT, width)
    assert all(cell_len(line) <= width and line == line.rstrip() for line in lines)
    text = "\n".join(lines)
    assert "bench ops: a GPU, against the roof of NVIDIA H200" in text
    assert "a note" in text and "WRONG" in text and "50%" in text
    assert ("not shown at this width" in text) == (width < 200)


def test_json_is_strict_and_whole() -> None:
    endless = row("softmax", Measured("ours", 2e-3, verdict=Verdict(float("inf"), 0.1)))
    found = json.loads(report.to_json(Result("d", "m", "bf16", (), (FAST, BROKEN, endless))))
    fast, broken, wrong = found["rows"]
    assert (fast["operation"], fast["shape"], fast["pass"], fast["state"]) == ("attention", "4×8", "forward", "right")
    assert fast["flop_per_s"] == pytest.approx(1e12) and fast["bytes_per_s"] == pytest.approx(1.5e9)
    assert fast["share_of_roof"] == pytest.approx(0.5) and fast["share_of_measured_ceiling"] == pytest.approx(0.75)
    assert (fast["best_peer"], fast["speed_up"]) == ("cudnn", pytest.approx(1.5))
    assert fast["peers"]["eager"]["seconds"] == 4e-3 and fast["captured"] is True
    assert broken["seconds"] is broken["share_of_roof"] is None and broken["failure"] == "RuntimeError: x"
    assert broken["peers"]["liger"]["failure"] == "OSError: y"
    assert (wrong["state"], wrong["error"], wrong["allowed_error"]) == ("wrong", None, 0.1)


def test_markdown() -> None:
    lines = report.to_markdown(Result(EVIL, "", "bf16", (EVIL,), (FAST, BAD), (EVIL,))).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and len({line.count(" | ") for line in table}) == 1
    assert "| attention 4×8 | fwd | 2.00 ms | 1.00 TFLOP/s |" in table[2] and "WRONG" in table[3]
    assert "<b>" not in "\n".join(lines) and lines[0].startswith("# bench ops: ")


def test_every_peer_has_its_place() -> None:
    assert report._PEERS == PEERS
