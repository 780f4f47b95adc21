"""`make demo`: probe this machine, price an 8B model on an H200, train a small decoder here, serve it, compare the two.

Everything that it prints comes from the `rooflight` command; reports, machine file and run go to demo-report/.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path
from typing import Any

REPORT = Path("demo-report")
TRAIN_SECONDS = 60
BATCH, CONTEXT = 8, 256


def run(*arguments: str) -> None:
    """One rooflight command, shown as a user would type it; the demo stops where it fails."""
    print(f"\n$ rooflight {' '.join(arguments)}", flush=True)
    # A process each, as from a shell: what one leaves in memory must not slow the next one's measurement.
    if code := subprocess.run([sys.executable, "-m", "rooflight", *arguments], check=False).returncode:
        sys.exit(code)


def price() -> None:
    """An 8B model on a machine that is not here, and what training one would take."""
    prices = ("explain", "llama-3.1-8b", "--on", "h200", "--phase", "decode", "--batch", "64", "--context", "4096")
    run(*prices)
    run(*prices, "-o", "html", "--out", str(REPORT / "llama-3.1-8b-on-h200.html"))
    sizes = ("--batch-size", "8", "--context", "4096", "--tokens", "1T")
    run("train", "--model", "llama-3.1-8b", *sizes, "--dry", "--on", "h200")


def train(here: Path) -> Path:
    """A small decoder on Python's own library sources, for about a minute; its Hugging Face directory."""
    library = Path(sysconfig.get_paths()["stdlib"])
    data = [str(library / name) for name in ("*.py", "json", "email", "http", "asyncio", "xml")]
    model = ("--model", "train-demo", "--batch-size", str(BATCH), "--context", str(CONTEXT), "--optimizer", "muon")
    dry = REPORT / "train-dry.json"
    run("train", *model, "--steps", "1", "--dry", "--on", str(here), "-o", "json", "--report", str(dry))
    step = json.loads(dry.read_text())["totals"]["expected_seconds"]
    steps = min(max(round(TRAIN_SECONDS / step), 40), 2000)
    print(f"\nA step should take {step * 1e3:.0f} ms here: {steps} steps make about a minute.")
    out, export = REPORT / "run", REPORT / "model"
    options = ("--lr", "3e-3", "--warmup", "20", "--log-every", str(max(steps // 10, 1)), "--profile", str(steps // 2))
    sample = ("--sample-every", str(max(steps // 3, 1)), "--sample-prompt", "def __init__(self")
    places = ("--out", str(out), "--on", str(here), "--export", str(export))
    run("train", "--data", *data, *model, *options, *sample, *places, "--steps", str(steps))
    return export


def compare(model: Path, here: Path) -> None:
    """What was trained, run on this machine again, predicted against measured."""
    outcomes = []
    for phase, batch, context in (("prefill", 4, 256), ("decode", 8, 512), ("train", BATCH, CONTEXT)):
        sizes = ("--phase", phase, "--batch", str(batch), "--context", str(context))
        dtype = ("--dtype", "fp32") if phase == "train" else ()
        wet = ("explain", str(model), "--on", str(here), "--measure", *sizes, *dtype)
        if phase != "prefill":
            run(*wet, "-o", "html", "--out", str(REPORT / f"{phase}-here.html"))
        report = REPORT / f"{phase}.json"
        run(*wet, "-o", "json", "--out", str(report))
        outcomes.append((phase, json.loads(report.read_text())["totals"]))
    print("\nThe model that was just trained, on this machine, predicted against measured:")
    for phase, totals in outcomes:
        roof, expected, measured = (totals[f"{name}_seconds"] * 1e3 for name in ("roof", "expected", "measured"))
        print(
            f"  {phase:8} roof {roof:8.2f} ms   expected {expected:8.2f} ms   measured {measured:8.2f} ms"
            f"   prediction off by {expected / measured - 1:+.0%}"
        )


def ask(url: str, path: str, **body: Any) -> Any:
    """A request to the server: its JSON answer."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def serve(model: Path, here: Path) -> None:
    """The model that was just trained, behind the OpenAI API: completions over HTTP, then a load, wet beside dry."""
    arguments = ("serve", str(model), "--port", "0", "--on", str(here))
    print(f"\n$ rooflight {' '.join(arguments)} &", flush=True)
    command = [sys.executable, "-m", "rooflight", *arguments, "--disable-log-requests"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        url = ""
        for line in server.stderr or ():
            print(line, end="", flush=True)
            if " at http" in line:
                url = line.rsplit(" at ", 1)[1].strip().removesuffix("/v1")
                break
        if not url:
            sys.exit(server.wait() or 1)
        for prompt in ("def __init__(self", "import os\n", "class Error(Exception):"):
            body = {"model": str(model), "prompt": prompt, "max_tokens": 48, "temperature": 0.7, "seed": 1}
            print(f"\n$ curl {url}/v1/completions -d '{json.dumps(body)}'")
            answer = ask(url, "/v1/completions", **body)
            print(prompt + answer["choices"][0]["text"])
        load = (
            "--num-prompts",
            "48",
            "--max-concurrency",
            "16",
            "--random-input-len",
            "128",
            "--random-output-len",
            "64",
        )
        target = ("--base-url", url, "--model", str(model), "--on", str(here))
        run("bench", "serve", *target, *load, "--ignore-eos", "--compare")
        server.send_signal(signal.SIGTERM)
        for line in server.stderr or ():
            print(line, end="", flush=True)
    traffic = ("--num-prompts", "1000", "--random-input-len", "100:1024", "--random-output-len", "100:1024")
    dummy = ("--model", "llama-3.1-8b", "--load-format", "dummy", "--max-model-len", "4096")
    run("bench", "throughput", *dummy, *traffic, "--dry", "--on", "h200")


def main_demo() -> None:
    """The demo's commands in order."""
    # A demo starts anew each time; a run of one's own would be gone on with by --resume.
    shutil.rmtree(REPORT, ignore_errors=True)
    REPORT.mkdir()
    here = REPORT / "here.toml"
    run("probe", "--device", "cpu", "--budget", "90", "--out", str(here))
    price()
    model = train(here)
    compare(model, here)
    serve(model, here)
    print(f"\nThe reports lie in {REPORT}/: open llama-3.1-8b-on-h200.html and train-here.html in a browser, and")
    print("run/profile/*.trace.json in ui.perfetto.dev. The model in model/ is a Hugging Face directory.")


if __name__ == "__main__":
    main_demo()
