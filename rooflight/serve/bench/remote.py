"""`bench serve` against a server: its traffic, the roof where model and machine are known, and a dry run beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from rooflight.errors import InvalidValue, RooflightError
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.bench.client import Client
from rooflight.serve.bench.datasets import Vocabulary
from rooflight.serve.bench.play import play
from rooflight.serve.bench.result import Result, Run, failures, run_rows
from rooflight.serve.bench.roof import roof_of_run
from rooflight.serve.bench.run import WET, Progress, dry_notes, dry_run, load_facts, timed_traffic
from rooflight.serve.bench.settings import EndpointSettings, ServeBenchSettings
from rooflight.serve.bench.stand import Stand, dry_stand
from rooflight.serve.bench.statistics import Outcome, statistics
from rooflight.serve.bench.traffic import Traffic, warmups
from rooflight.serve.settings import EngineSettings

Say = Callable[[str], None]


def remote(
    settings: ServeBenchSettings, engine: EngineSettings, endpoint: EndpointSettings, compare: bool, say: Say
) -> Result:
    """Measure a server, of which only its answers are known.

    --model is the name that the server knows; where it is also a model here, and --on names the server's machine, the
    roof stands beside the figures. Raises InvalidValue where no request succeeds.
    """
    stand, reason = _known(engine)
    if compare and stand is None:
        raise InvalidValue(f"--compare against {endpoint.url}: {reason}")
    tokenizer = _tokenizer(engine, stand)
    size = stand.vocabulary.size if stand is not None else tokenizer.vocab_size if tokenizer is not None else 0
    if settings.dataset_name == "random" and not size:
        size = _vocabulary_of(engine)
    special = (tokenizer.eos_id,) if tokenizer is not None else ()
    traffic = timed_traffic(settings, engine.seed, Vocabulary(size, special), tokenizer)
    if endpoint.endpoint != "/v1/completions" and not all(each.text for each in traffic.arrivals):
        raise InvalidValue(
            f"--endpoint {endpoint.endpoint} takes text, not token ids; use sharegpt or a file of prompts"
        )
    if compare and not all(each.prompt for each in traffic.arrivals):
        raise InvalidValue("--compare runs token ids, and the prompts are text; name a tokenizer by --tokenizer")
    model, outcomes, seconds = asyncio.run(_measure(settings, engine, endpoint, traffic, say))
    found = statistics(outcomes, seconds, settings.metrics, settings.percentiles, settings.limits)
    if not found.completed:
        raise InvalidValue(f"{endpoint.url}: all {found.failed} requests failed; {found.errors[0]}")
    roof = roof_of_run([], outcomes, stand.predictor if stand else None, stand.budget if stand else 1)
    result = Result(
        "serve",
        model,
        load_facts(settings, traffic),
        [Run(WET, f"{endpoint.url}{endpoint.endpoint}", run_rows(found, roof), outcomes)],
        [*traffic.notes, *failures(outcomes)],
    )
    if stand is None:
        result.notes.append(f"no share of the roof: {reason}")
    else:
        result.notes.append(
            f"of the roof of {stand.machine}: of one mean prompt's prefill alone for TTFT, of a decode step of as many "
            "sequences as a request saw for TPOT and ITL; the server's own steps are not known, so the run has none"
        )
    if compare and stand is not None:
        result.runs.append(dry_run(settings, stand, traffic, settings.max_concurrency))
        result.notes += [
            *dry_notes(settings),
            "dry: scheduled with this command's engine settings, which the server may not share",
        ]
    return result


async def _measure(
    settings: ServeBenchSettings, engine: EngineSettings, endpoint: EndpointSettings, traffic: Traffic, say: Say
) -> tuple[str, list[Outcome], float]:
    async with Client(endpoint, engine.model, settings.temperature, settings.ignore_eos) as client:
        model = await client.find_model()
        ready, _ = await play(client, warmups(traffic.arrivals, settings.num_warmups), settings.max_concurrency)
        failed = next((outcome.error for outcome in ready if outcome.error), "")
        if failed:
            raise InvalidValue(f"{endpoint.url}: the first request failed: {failed}")
        say(f"sending {len(traffic.arrivals):,} requests to {endpoint.url} for {model}")
        told = Progress(len(traffic.arrivals), say)
        outcomes, seconds = await play(client, traffic.arrivals, settings.max_concurrency, told.one_more)
        return model, outcomes, seconds


def _known(engine: EngineSettings) -> tuple[Stand | None, str]:
    """The server's model on its machine, or why it is not known."""
    if not engine.on:
        return None, "the server's machine is not known; name it by --on, with --model as a directory or a preset"
    if not engine.model:
        return None, "the server's model is not known here; name it by --model as a directory or a preset"
    try:
        return dry_stand(engine), ""
    except RooflightError as error:
        return None, str(error)


def _tokenizer(engine: EngineSettings, stand: Stand | None) -> Tokenizer | None:
    if engine.tokenizer:
        return Tokenizer.load(engine.tokenizer)
    if stand is not None:
        return stand.source.tokenizer
    return Tokenizer.load(engine.model) if (Path(engine.model) / "tokenizer.json").is_file() else None


def _vocabulary_of(engine: EngineSettings) -> int:
    """The vocabulary of the model's config, where the name says which that is; 0 else."""
    from rooflight.models.presets import resolve

    try:
        return resolve(engine.model)[1].vocab_size if engine.model else 0
    except RooflightError:
        return 0
