"""`rooflight explain`: where time and memory of a model go on a machine, and what would win most."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rooflight.cli.parser import one_of, positive
from rooflight.errors import InvalidValue

if TYPE_CHECKING:
    from rooflight.hardware.machine import Machine
    from rooflight.workload.explanation import Explanation
    from rooflight.workload.program import Setting

SUMMARY = "price a model on a machine, operation by operation; with --measure also run it here"
EXAMPLES = """examples:
  rooflight explain llama-3.1-8b --on h200 --phase decode --batch 64 --context 8192
  rooflight explain ./checkpoint --on b200 --phase train --batch 1 --context 4096 --recompute selective
  rooflight explain my_model.py:make --on a100-80gb --phase train -o html --out report.html
  rooflight explain demo --on here --measure          (after `rooflight probe`)"""

FORMATS = ("table", "json", "csv", "md", "html")
PHASES = ("prefill", "decode", "train")
DTYPES = ("fp32", "bf16", "fp16")
KV_DTYPES = ("fp32", "bf16", "fp16", "fp8")
OPTIMIZERS = ("adamw", "adamw-bf16", "adamw-master", "muon", "sgd", "none")
GROUPINGS = ("component", "layer", "op", "primitive")
DEFAULT_CONTEXT = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `rooflight explain`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a preset, a checkpoint directory or config.json, a hub id, or module:factory / file.py:factory "
        "(the factory takes nothing and returns (module, example_args))",
    )
    parser.add_argument("--list", action="store_true", help="list the presets and the machines, and stop")
    run = parser.add_argument_group("what is run")
    run.add_argument("--phase", type=one_of("--phase", PHASES), default="prefill", help="prefill, decode or train")
    run.add_argument("--batch", type=positive("--batch"), default=1, help="sequences (default 1)")
    run.add_argument(
        "--context", type=positive("--context"), help="tokens a sequence (default 2048, or the model's most)"
    )
    run.add_argument(
        "--dtype",
        type=one_of("--dtype", DTYPES),
        help="weights and activations (default bf16; your own module's stay as they are)",
    )
    run.add_argument(
        "--kv-cache-dtype", type=one_of("--kv-cache-dtype", KV_DTYPES), help="cached keys and values (default: --dtype)"
    )
    run.add_argument(
        "--attention",
        type=one_of("--attention", ("flash", "naive")),
        default="flash",
        help="flash, or naive with its scores in memory",
    )
    run.add_argument(
        "--recompute",
        type=one_of("--recompute", ("none", "selective", "full")),
        default="none",
        help="activations recomputed in training",
    )
    run.add_argument("--optimizer", type=one_of("--optimizer", OPTIMIZERS), default="adamw", help=", ".join(OPTIMIZERS))
    where = parser.add_argument_group("where")
    where.add_argument(
        "--on",
        metavar="MACHINE",
        help="a machine of the catalog, a machine file, or `here` (default h200; with --measure: here)",
    )
    where.add_argument(
        "--measure", action="store_true", help="run it wet on this machine too, and put measured beside predicted"
    )
    where.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="with --measure: run on this text, a byte a token",
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--by", type=one_of("--by", GROUPINGS), default="component", help="rows by component, layer, op or primitive"
    )
    out.add_argument("-o", "--output", type=one_of("-o", FORMATS), default="table", help=", ".join(FORMATS))
    out.add_argument("--out", metavar="FILE", type=Path, help="write the report to a file instead of printing it")


def run(options: argparse.Namespace) -> None:
    """Explain and print; raises RooflightError on what the user can mend."""
    if options.list:
        _list()
        return
    if options.model is None:
        raise InvalidValue(
            "no MODEL given; name a preset (see `rooflight explain --list`), a directory or module:factory"
        )
    _check_out(options.out)
    from rooflight.hardware import load

    machine = load(options.on or ("here" if options.measure else "h200"))
    _write(explain(options, machine), options)


def explain(options: argparse.Namespace, machine: Machine) -> Explanation:
    """The explanation that the options ask for."""
    from rooflight.workload.factory import is_factory

    if is_factory(options.model) and not Path(options.model).exists():
        return _explain_factory(options, machine)
    _check_for_phase(options)
    from rooflight.models.presets import resolve
    from rooflight.workload.explain import check_setting, explain_decoder

    name, config = resolve(options.model)
    setting = _setting(options, min(DEFAULT_CONTEXT, config.max_context), "bf16")
    if setting.text is not None and config.vocab_size < 256:
        raise InvalidValue(f"--text needs a vocabulary of 256 bytes or more, and {name} has {config.vocab_size} tokens")
    check_setting(config, setting)
    measured = None
    if options.measure:
        from rooflight.workload import measure as wet

        device = wet.device_here()
        wet.check_fits(config, setting, device)
        graph = setting.phase == "decode"
        measured = wet.measure(lambda: wet.wet_decoder(config, setting, device), device, graph=graph)
    result = explain_decoder(name, config, machine, setting, by=options.by, measured=measured)
    _say_where(result, machine, options)
    return result


def _explain_factory(options: argparse.Namespace, machine: Machine) -> Explanation:
    from rooflight.workload import factory, program
    from rooflight.workload.any_module import any_module
    from rooflight.workload.explain import explain_module

    if options.text is not None:
        raise InvalidValue("--text needs a decoder; a module of your own brings its example arguments")
    _check_for_module(options)
    _check_for_phase(options)
    make = factory.load_factory(options.model, program.DTYPES.get(options.dtype))
    setting = _setting(options, 1, "fp32")

    def dry() -> program.Program:
        return any_module(*factory.fake(make), setting)

    measured = None
    if options.measure:
        from rooflight.workload import measure as wet

        device = wet.device_here()
        measured = wet.measure(lambda: wet.wet_module(make, setting, device), device)
    result = explain_module(options.model, dry, machine, setting, by=options.by, measured=measured)
    _say_where(result, machine, options)
    return result


def _say_where(result: Explanation, machine: Machine, options: argparse.Namespace) -> None:
    """A wet run happens here, whatever machine the prediction is for."""
    if options.measure and machine.name in _shipped_machines():
        result.notes.append(
            f"measured on this machine, predicted for {machine.title}; to compare, `rooflight probe` and --on here"
        )


def _shipped_machines() -> list[str]:
    from rooflight.hardware import catalog

    return catalog()


def _check_for_phase(options: argparse.Namespace) -> None:
    """Raise InvalidValue for an option that the phase does not heed, rather than ignore it."""
    train = options.phase == "train"
    given = {
        "--recompute": (options.recompute, options.recompute == "none" or train, "train"),
        "--optimizer": (options.optimizer, options.optimizer == "adamw" or train, "train"),
        "--kv-cache-dtype": (options.kv_cache_dtype, options.kv_cache_dtype is None or not train, "prefill or decode"),
    }
    for option, (value, heeded, phases) in given.items():
        if not heeded:
            raise InvalidValue(f"{option} {value} does nothing in phase {options.phase}; it is for --phase {phases}")


def _check_for_module(options: argparse.Namespace) -> None:
    """Raise InvalidValue for an option that only a decoder of ours heeds, rather than ignore it."""
    given = {
        "--batch": options.batch if options.batch != 1 else None,
        "--context": options.context,
        "--kv-cache-dtype": options.kv_cache_dtype,
        "--attention": options.attention if options.attention != "flash" else None,
        "--recompute": options.recompute if options.recompute != "none" else None,
    }
    for option, value in given.items():
        if value is not None:
            raise InvalidValue(
                f"{option} {value} does not reach a module of your own; its factory decides, so change {options.model}"
            )


def _setting(options: argparse.Namespace, context: int, dtype: str) -> Setting:
    from rooflight.workload.program import Setting

    return Setting(
        phase=options.phase,
        batch=options.batch,
        context=options.context or context,
        dtype=options.dtype or dtype,
        kv_dtype=options.kv_cache_dtype,
        attention=options.attention,
        recompute=options.recompute,
        optimizer=options.optimizer,
        text=_text(options),
    )


def _text(options: argparse.Namespace) -> bytes | None:
    if options.text is None:
        return None
    if not options.measure:
        raise InvalidValue("--text is what a wet run reads; give --measure with it")
    if not options.text.is_file() or options.text.stat().st_size == 0:
        raise InvalidValue(f"--text {options.text}: there is no such file, or it is empty; give a text file")
    return options.text.read_bytes()


def _check_out(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise InvalidValue(f"--out {path}: there is no directory {path.parent}; make it first or name another")


def _write(explanation: Explanation, options: argparse.Namespace) -> None:
    from rooflight import report

    if options.output == "table":
        if options.out is None:
            report.render(explanation, report.console_for(sys.stdout))
        else:
            with options.out.open("w", encoding="utf-8") as stream:
                report.render(explanation, report.console_for(stream))
        return
    writers = {"json": report.to_json, "csv": report.to_csv, "md": report.to_markdown, "html": report.to_html}
    text = writers[options.output](explanation)
    if options.out is None:
        print(text)
        return
    options.out.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}", file=sys.stderr)


def _list() -> None:
    from rooflight.hardware import catalog
    from rooflight.models.presets import names

    print("presets:  " + " ".join(names()))
    print("machines: " + " ".join(catalog()) + " here")
