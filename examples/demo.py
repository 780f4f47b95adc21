"""`make demo`: probe this machine, price an 8B model on an H200, run a small decoder here, compare the two.

Everything that it prints comes from the `rooflight` command; the reports and the machine file go to demo-report/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

REPORT = Path("demo-report")


def run(*arguments: str) -> None:
    """One rooflight command, shown as a user would type it; the demo stops where it fails."""
    print(f"\n$ rooflight {' '.join(arguments)}", flush=True)
    # A process each, as from a shell: what one leaves in memory must not slow the next one's measurement.
    if code := subprocess.run([sys.executable, "-m", "rooflight", *arguments], check=False).returncode:
        sys.exit(code)


def real_text(path: Path, size: int = 200_000) -> Path:
    """Real text that every machine has: Python's own library sources, one after another."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)
    path.write_bytes(text[:size])
    return path


def main_demo() -> None:
    """The demo's commands in order, then predicted against measured."""
    REPORT.mkdir(exist_ok=True)
    here, text = REPORT / "here.toml", real_text(REPORT / "text.txt")
    run("probe", "--device", "cpu", "--budget", "90", "--out", str(here))
    prices = ("explain", "llama-3.1-8b", "--on", "h200", "--phase", "decode", "--batch", "64", "--context", "4096")
    run(*prices)
    run(*prices, "-o", "html", "--out", str(REPORT / "llama-3.1-8b-on-h200.html"))
    outcomes = []
    for phase, batch, context in (("prefill", 4, 256), ("decode", 8, 512), ("train", 4, 256)):
        sizes = ("--phase", phase, "--batch", str(batch), "--context", str(context))
        wet = ("explain", "demo", "--on", str(here), "--measure", "--text", str(text), *sizes)
        report = REPORT / f"demo-{phase}.json"
        if phase == "prefill":
            run(*wet, "--by", "op")
            run(*wet, "-o", "html", "--out", str(REPORT / "demo-here.html"))
        run(*wet, "-o", "json", "--out", str(report))
        outcomes.append((phase, json.loads(report.read_text())["totals"]))
    print("\nThe demo model on this machine, run on real text, predicted against measured:")
    for phase, totals in outcomes:
        roof, expected, measured = (totals[f"{name}_seconds"] * 1e3 for name in ("roof", "expected", "measured"))
        print(
            f"  {phase:8} roof {roof:8.2f} ms   expected {expected:8.2f} ms   measured {measured:8.2f} ms"
            f"   prediction off by {expected / measured - 1:+.0%}"
        )
    print(f"\nThe reports lie in {REPORT}/: open {REPORT / 'llama-3.1-8b-on-h200.html'} in a browser.")


if __name__ == "__main__":
    main_demo()
