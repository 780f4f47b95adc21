"""`rooflight serve`: a checkpoint behind the OpenAI API, until it is told to end."""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import field, fields, make_dataclass
from typing import Any, TypeVar

from rooflight.cli.parser import settings_options
from rooflight.serve.settings import ENVIRONMENT, EngineSettings, ServerSettings, from_environment

SUMMARY = "serve a model over the OpenAI API, with its memory planned before and every step predicted beside measured"
EXAMPLES = f"""examples:
  rooflight serve ./checkpoint
  rooflight serve Qwen/Qwen3-0.6B --port 8080 --max-model-len 8192
  rooflight serve llama-3.1-8b --load-format dummy --max-num-seqs 128
  {ENVIRONMENT}API_KEY=secret rooflight serve ./checkpoint --host 0.0.0.0

Each option has an environment variable, {ENVIRONMENT}PORT for --port and so on ({ENVIRONMENT}MODEL for MODEL), which
holds where the option is not given. SIGTERM drains: running requests end, new ones are refused, and the exit is 0."""

_Settings = TypeVar("_Settings", EngineSettings, ServerSettings)
# The model is named without a flag.
_EngineFlags = make_dataclass(
    "_EngineFlags",
    [
        (entry.name, entry.type, field(default=entry.default, metadata=entry.metadata))
        for entry in fields(EngineSettings)
        if entry.name != "model"
    ],
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model, and an option for each setting of the engine and of the server."""
    entry = next(entry for entry in fields(EngineSettings) if entry.name == "model")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=entry.metadata["help"])
    settings_options(parser, _EngineFlags)
    settings_options(parser, ServerSettings)


def settings_of(options: argparse.Namespace) -> tuple[EngineSettings, ServerSettings]:
    """Options over environment variables over defaults; raises InvalidValue on what is out of range."""
    return _settings(EngineSettings, options).check(), _settings(ServerSettings, options).check()


def _settings(kind: type[_Settings], options: argparse.Namespace) -> _Settings:
    given: dict[str, Any] = from_environment(kind)
    for entry in fields(kind):
        value = getattr(options, entry.name, None)
        if value is not None:
            given[entry.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; raises RooflightError on what the user can mend."""
    engine_settings, settings = settings_of(options)

    from rooflight.serve.api.server import listen, serve
    from rooflight.serve.async_engine import AsyncEngine
    from rooflight.serve.live import routes, watch

    # First the port: one that is taken should not be found out after minutes of loading.
    with listen(settings) as bound:
        engine = AsyncEngine.from_settings(engine_settings, _say, settings.max_queue)
        # The command line starts without the collector; a server wants it back.
        gc.enable()
        name = (settings.served_model_name or (engine_settings.model,))[0]
        machine = engine.predictor.machine.name if engine.predictor is not None else ""
        serve(engine, settings, routes(engine, watch(engine, name), machine), bound, _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
