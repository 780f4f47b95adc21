"""Predicted against measured on this machine: a table of whole runs, each wet and dry in one process.

    python benchmarks/predicted_vs_measured.py --on here --out docs/measured    (after `rooflight probe`)

Each case is one `rooflight explain --measure`; its full table goes to the folder as Markdown. The last column is the
error of the prediction; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from rooflight.cli import main

GPU_CASES = (
    ("llama-3.1-8b", "prefill", 1, 4096),
    ("llama-3.1-8b", "decode", 1, 4096),
    ("llama-3.1-8b", "decode", 64, 4096),
    ("train-1.2b", "train", 8, 2048),
    ("qwen3-0.6b", "decode", 32, 256),
    ("gpt-2", "train", 8, 1024),
)
CPU_CASES = (
    ("demo", "prefill", 4, 256),
    ("demo", "decode", 8, 512),
    ("demo", "train", 4, 256),
    ("gpt-2", "prefill", 1, 512),
    ("gpt-2", "decode", 1, 512),
    ("gpt-2", "train", 1, 256),
    ("qwen3-0.6b", "prefill", 1, 256),
    ("qwen3-0.6b", "decode", 4, 256),
)


def run(on: str, case: tuple[str, str, int, int], folder: Path | None) -> dict[str, float]:
    """One case: totals in seconds."""
    model, phase, batch, context = case
    sizes = ["--phase", phase, "--batch", str(batch), "--context", str(context), "--by", "op"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        if code := main(["explain", model, "--on", on, "--measure", *sizes, "-o", "json", "--out", str(report)]):
            sys.exit(code)
        found = json.loads(report.read_text(encoding="utf-8"))
    if folder is not None:
        lines = [f"# {model}, {phase}, batch {batch}, context {context}, on {found['machine_facts']['title']}", ""]
        lines += ["| operation | phase | calls | roof | expected | measured | expected ÷ measured | bound | source |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---|---|"]
        for row in sorted(found["rows"], key=lambda row: -(row["measured_seconds"] or 0)):
            roof, expected, measured = (row[f"{name}_seconds"] * 1e3 for name in ("roof", "expected", "measured"))
            ratio = f"{expected / measured:.2f}" if measured else ""
            times = f"{roof:.3f} ms | {expected:.3f} ms | {measured:.3f} ms | {ratio}"
            lines.append(
                f"| {row['op']} | {row['phase']} | {row['count']:,} | {times} | {row['bound']} | {row['provenance']} |"
            )
        lines += ["", *(f"- {note}" for note in found["notes"]), ""]
        name = f"{model}-{phase}-{batch}x{context}.md"
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return found["totals"]


def main_benchmark() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on", default="here", help="machine file of this machine")
    parser.add_argument("--out", type=Path, help="folder for each case's table")
    options = parser.parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    lines = ["| model | phase | batch × context | roof | expected | measured | prediction |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for case in cases:
        totals = run(options.on, case, options.out)
        roof, expected, measured = (totals[f"{name}_seconds"] * 1e3 for name in ("roof", "expected", "measured"))
        lines.append(
            f"| {case[0]} | {case[1]} | {case[2]} × {case[3]} | {roof:.2f} ms | {expected:.2f} ms | {measured:.2f} ms"
            f" | {expected / measured - 1:+.1%} |"
        )
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.out is not None:
        (options.out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main_benchmark()
