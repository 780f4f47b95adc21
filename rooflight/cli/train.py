"""`rooflight train`: train or continue a decoder, or run the same step dry and say what it would take."""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rooflight.cli.parser import one_of, settings_options
from rooflight.errors import InvalidValue
from rooflight.train.settings import TrainSettings, from_toml, to_toml

if TYPE_CHECKING:
    from rooflight.train.job import Job
    from rooflight.train.loop import Trainer

SUMMARY = "train a decoder and account for every step; with --dry predict time, memory and cost on any machine"
EXAMPLES = """examples:
  rooflight train --data 'src/**/*.py' --model demo --vocab-size 4096 --out run --steps 300
  rooflight train --config run.toml --resume
  rooflight train --model llama-3.1-8b --batch-size 8 --micro-batch-size 2 --context 4096 --tokens 1T --dry --on h200
  rooflight train --model train-152m --print-config > run.toml"""

RUN_FILE = "train.toml"
# What a resumed run may change; all else decides what the weights become, or how they are stored.
FREE = {
    "steps", "tokens", "data_cache", "device", "out", "skip_nonfinite", "checkpoint_every", "keep", "async_checkpoint",
    "export", "log_every", "eval_every", "eval_rows", "sample_every", "sample_tokens", "sample_prompt", "tensorboard",
    "profile", "on", "document_length", "recompute", "activation_gib",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `rooflight train`, one for each setting, and those that are no settings of a run."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings from a TOML file; flags come first")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force as TOML, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out")
    dry = parser.add_argument_group("dry")
    dry.add_argument(
        "--dry", action="store_true", help="run one step on fake tensors: time, memory, cost; no data needed"
    )
    dry.add_argument("--usd-per-hour", type=float, help="price of the machine, for the cost of the token budget")
    dry.add_argument("-o", "--output", type=one_of("-o", ("table", "json", "html")), default="table", help="of --dry")
    dry.add_argument("--report", metavar="FILE", type=Path, help="write the dry report here instead of printing it")
    settings_options(parser, TrainSettings)


def run(options: argparse.Namespace) -> None:
    """Train, or predict, or print the settings; raises RooflightError on what the user can mend."""
    settings = settings_of(options)
    if options.print_config:
        print(to_toml(settings), end="")
        return
    if options.dry:
        _dry(options, settings)
        return
    for name in ("usd_per_hour", "report"):
        if getattr(options, name) is not None:
            raise InvalidValue(f"--{name.replace('_', '-')} is for --dry; a wet run does not heed it")
    # The command line starts without the collector; training wants it back, but not over what is imported.
    gc.freeze()
    gc.enable()
    train(settings, resume=options.resume)


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """Flags over the TOML file over, on a resume, the run's own settings over the defaults."""
    given = from_toml(options.config) if options.config else {}
    given |= {
        entry.name: tuple(value) if isinstance(value, list) else value
        for entry in fields(TrainSettings)
        if (value := getattr(options, entry.name, None)) is not None
    }
    kept = Path(given.get("out", "")) / RUN_FILE
    if not options.resume or "out" not in given or not kept.is_file():
        return TrainSettings(**given).check()
    before = from_toml(kept)
    defaults = TrainSettings()
    for name, value in given.items():
        was = before.get(name, getattr(defaults, name))
        if name not in FREE and value != was:
            raise InvalidValue(
                f"--{name.replace('_', '-')} {value} differs from the {was} that the run in {given['out']} was started "
                "with; leave it out to resume, or start a new run in another --out"
            )
    if "tokens" in given or "steps" in given:
        before.pop("steps", None)
        before.pop("tokens", None)
    return TrainSettings(**(before | given)).check()


def _dry(options: argparse.Namespace, settings: TrainSettings) -> None:
    from rooflight.hardware import load
    from rooflight.report import training as report
    from rooflight.report.terminal import console_for
    from rooflight.train.dry import dry_run
    from rooflight.train.job import resolve_model

    machine = load(settings.on or "h200")
    settings, name, config = resolve_model(settings, machine.kind != "cpu")
    result = dry_run(name, config, settings, machine, usd_per_hour=options.usd_per_hour)
    if options.output == "table" and options.report is None:
        report.render(result, console_for(sys.stdout))
        return
    writers = {"table": report.to_text, "json": report.to_json, "html": report.to_html}
    text = writers[options.output](result)
    if options.report is None:
        print(text)
        return
    options.report.write_text(text, encoding="utf-8")
    print(f"wrote {options.report}", file=sys.stderr)


def train(settings: TrainSettings, *, resume: bool) -> None:
    """A wet run from its settings to its last checkpoint and export."""
    from rooflight.hardware.host import keep_freed_memory
    from rooflight.train.checkpoint import Checkpoints, run_lock
    from rooflight.train.export import check_target
    from rooflight.train.job import prepare

    if not settings.out:
        raise InvalidValue("no --out given; name the directory that the run writes to")
    if settings.export:
        check_target(Path(settings.export))
    keep_freed_memory()
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with run_lock(out):
        if not resume and any((out / "checkpoints").glob("step-*")):
            raise InvalidValue(f"--out {out} holds a run with checkpoints; add --resume, or name another directory")
        if not (resume and (out / RUN_FILE).is_file()):
            (out / RUN_FILE).write_text(to_toml(settings), encoding="utf-8")
        job = prepare(settings, lambda text: print(text, flush=True), resume)
        with Checkpoints(out / "checkpoints", settings.keep, settings.async_checkpoint) as checkpoints:
            _run(job, checkpoints, resume)


def _within_memory(trainer: Trainer) -> None:
    """Run; a device that is full after all is one line, and the checkpoints stay."""
    import torch

    try:
        trainer.run()
    except (torch.OutOfMemoryError, MemoryError) as error:
        predicted = trainer.prediction.peak_bytes / 2**30
        raise InvalidValue(
            f"step {trainer.step + 1} ran out of memory on {trainer.job.device.type} ({predicted:.1f} GiB predicted); "
            "free what else is on the device, or resume with --recompute full, or start with a smaller "
            "--micro-batch-size"
        ) from error


def _run(job: Job, checkpoints: Any, resume: bool) -> None:
    from rooflight.report import perfetto
    from rooflight.train.export import export
    from rooflight.train.log import Log
    from rooflight.train.loop import Trainer

    settings = job.settings
    log = Log(job.out, settings.steps, settings.tensorboard)
    trainer = Trainer(job, checkpoints, log, lambda profile: perfetto.write(profile, job.out / "profile"))
    try:
        if resume and not trainer.resume():
            log.say(f"no whole checkpoint in {checkpoints.directory}; starting from step 0")
        log.say(trainer.describe())
        _within_memory(trainer)
        if settings.export and trainer.step >= settings.steps:
            export(job.trainee.model, settings.export, job.tokenizer)
            log.say(f"exported to {settings.export}")
    finally:
        log.close()
