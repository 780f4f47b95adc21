"""The benchmarks from their settings to their results: `serve`, `throughput`, `latency`; wet, dry, or both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from rooflight.errors import InvalidValue
from rooflight.hardware.host import find_machine
from rooflight.serve.bench.datasets import Encoder, Vocabulary, load_traffic
from rooflight.serve.bench.drive import Sampling, drive
from rooflight.serve.bench.latency import batch, iterate, latency_rows
from rooflight.serve.bench.play import EngineSender, play
from rooflight.serve.bench.result import Result, Run, failures, run_rows
from rooflight.serve.bench.roof import roof_of_run
from rooflight.serve.bench.settings import (
    EndpointSettings,
    LatencySettings,
    ServeBenchSettings,
    TrafficSettings,
)
from rooflight.serve.bench.stand import Stand, dry_stand, reader, twin, wet_stand
from rooflight.serve.bench.statistics import Outcome, statistics
from rooflight.serve.bench.traffic import Traffic, spread, warmups
from rooflight.serve.load import device_of
from rooflight.serve.scheduler import Output
from rooflight.serve.settings import EngineSettings

WET, DRY, COMPARE = "wet", "dry", "compare"
Say = Callable[[str], None]
_SECONDS_BETWEEN_NEWS = 5.0


def serve(
    settings: ServeBenchSettings, engine: EngineSettings, endpoint: EndpointSettings, mode: str, say: Say
) -> Result:
    """Requests as they arrive, to a server or to an engine here; raises InvalidValue on what cannot be run."""
    if endpoint.url:
        # Imported here: the client needs aiohttp, which an engine does without.
        from rooflight.serve.bench.remote import remote

        if mode == DRY:
            raise InvalidValue(f"--dry sends nothing to {endpoint.url}; leave it out, or use --compare --on MACHINE")
        return remote(settings, engine, endpoint, mode == COMPARE, say)
    first = _stand(engine, mode, say)
    traffic = traffic_for(settings, engine, first)
    result = Result("serve", first.source.name, [*load_facts(settings, traffic), *first.facts], [], list(traffic.notes))
    if mode != DRY:
        result.runs.append(asyncio.run(_play_here(settings, engine, first, traffic, say)))
    if mode != WET:
        stand = first if mode == DRY else twin(first)
        result.runs.append(dry_run(settings, stand, traffic, settings.max_concurrency))
        result.notes += dry_notes(settings)
    return _noted(result, first)


def throughput(settings: TrafficSettings, engine: EngineSettings, mode: str, say: Say) -> Result:
    """All requests at once, through the engine in this thread, as `LLM.generate` runs them."""
    first = _stand(engine, mode, say)
    traffic = traffic_for(settings, engine, first)
    if traffic.timed:
        traffic = replace(traffic, arrivals=tuple(replace(each, at=0.0) for each in traffic.arrivals))
    facts = [f"{len(traffic.arrivals):,} requests at once", traffic.title, _sampling_fact(settings)]
    result = Result("throughput", first.source.name, [*facts, *first.facts], [], list(traffic.notes))
    if mode != DRY:
        sampling = _sampling(settings, first)
        drive(first.engine, first.clock, warmups(traffic.arrivals, settings.num_warmups), sampling=sampling)
        first.records.clear()
        told = Progress(len(traffic.arrivals), say)
        began = first.clock.now()
        outcomes = drive(first.engine, first.clock, traffic.arrivals, 0, sampling, told.listen(reader(first)))
        result.runs.append(_run(WET, first, settings, outcomes, first.clock.now() - began, None))
    if mode != WET:
        stand = first if mode == DRY else twin(first)
        result.runs.append(dry_run(settings, stand, traffic, 0))
        result.notes += dry_notes(settings)
    return _noted(result, first)


def latency(settings: LatencySettings, engine: EngineSettings, mode: str, say: Say) -> Result:
    """One batch of equal requests, over and over."""
    first = _stand(engine, mode, say)
    if settings.input_len + settings.output_len > first.source.max_model_len:
        raise InvalidValue(
            f"--input-len {settings.input_len} and --output-len {settings.output_len} exceed the longest context of "
            f"{first.source.max_model_len}; shorten one of them"
        )
    arrivals = batch(settings, first.vocabulary.size, engine.seed)
    facts = [
        f"{settings.batch_size} requests at once",
        f"{settings.input_len} in, {settings.output_len} out",
        f"temperature {settings.temperature:g}",
    ]
    result = Result("latency", first.source.name, [*facts, *first.facts], [])
    stands = [(WET, first)] if mode != DRY else [(DRY, first)]
    stands += [(DRY, twin(first))] if mode == COMPARE else []
    for name, stand in stands:
        # Nothing warms up on a virtual clock, and each iteration takes what the others take.
        own = replace(settings, num_iters_warmup=0, num_iters=1) if name == DRY else settings
        told = Progress(own.num_iters_warmup + own.num_iters, say, "iterations")
        began = time.perf_counter()
        iterations = iterate(stand.engine, stand.clock, stand.records, own, arrivals, told.one_more)
        took = time.perf_counter() - began if name == DRY else None
        result.runs.append(Run(name, stand.machine, latency_rows(iterations, own), took=took))
    result.notes.append("time to first token: until every request of the batch has its first token")
    return _noted(result, first)


def _stand(engine: EngineSettings, mode: str, say: Say) -> Stand:
    if mode == DRY:
        return dry_stand(engine)
    # Before the model is loaded, which may take minutes.
    if mode == COMPARE and find_machine(engine.on, device_of(engine)) is None:
        raise InvalidValue("--compare needs this machine's figures; run `rooflight probe` first, or name one by --on")
    return wet_stand(engine, say)


def traffic_for(settings: TrafficSettings, engine: EngineSettings, stand: Stand) -> Traffic:
    """The requests that the settings ask for, with their arrival times; an engine here takes token ids alone."""
    traffic = timed_traffic(settings, engine.seed, stand.vocabulary, stand.source.tokenizer)
    if not all(arrival.prompt for arrival in traffic.arrivals):
        raise InvalidValue(
            f"the prompts of {settings.dataset_name} are text and {stand.source.name} has no tokenizer; name one by "
            "--tokenizer"
        )
    return traffic


def timed_traffic(settings: TrafficSettings, seed: int, vocabulary: Vocabulary, encoder: Encoder | None) -> Traffic:
    """Traffic of a vocabulary and a tokenizer; a rate is refused for a dataset that says itself when requests come."""
    traffic = load_traffic(settings, seed, vocabulary, encoder)
    if not isinstance(settings, ServeBenchSettings):
        return traffic
    if traffic.timed and settings.request_rate != "inf":
        raise InvalidValue(
            f"--request-rate {settings.request_rate}: the lines of {settings.dataset_name} say themselves when they "
            "come; leave the rate out, or the arrivals in the file"
        )
    return spread(traffic, settings.rate, settings.burstiness, seed)


async def _play_here(
    settings: ServeBenchSettings, engine: EngineSettings, stand: Stand, traffic: Traffic, say: Say
) -> Run:
    """The traffic through an `AsyncEngine`: the engine in a thread of its own, its clients in this one."""
    from rooflight.serve.async_engine import AsyncEngine

    if stand.built is None:
        raise InvalidValue("a dry engine serves nobody")
    count = len(traffic.arrivals)
    server = AsyncEngine(stand.built, engine, max_queue=max(count, settings.num_warmups))
    server.add_listener(stand.records.append)
    await server.start()
    try:
        sender = EngineSender(server, _sampling(settings, stand))
        await play(sender, warmups(traffic.arrivals, settings.num_warmups), settings.max_concurrency)
        stand.records.clear()
        outcomes, seconds = await play(
            sender, traffic.arrivals, settings.max_concurrency, Progress(count, say).one_more
        )
    finally:
        await server.stop()
    return _run(WET, stand, settings, outcomes, seconds, None)


def dry_run(settings: TrafficSettings, stand: Stand, traffic: Traffic, max_concurrency: int) -> Run:
    """The traffic through the same engine and scheduler, on the virtual clock."""
    began = time.perf_counter()
    start = stand.clock.now()
    # No end of text comes up in a dry run, so that each request goes on to its output length.
    sampling = Sampling(settings.temperature, ignore_eos=True)
    outcomes = drive(stand.engine, stand.clock, traffic.arrivals, max_concurrency, sampling)
    seconds = stand.clock.now() - start
    return _run(DRY, stand, settings, outcomes, seconds, time.perf_counter() - began)


def _run(
    name: str, stand: Stand, settings: TrafficSettings, outcomes: list[Outcome], seconds: float, took: float | None
) -> Run:
    roof = roof_of_run(stand.records, outcomes, stand.predictor, stand.budget)
    if all(outcome.error for outcome in outcomes):
        raise InvalidValue(f"{name}: all {len(outcomes)} requests failed; {outcomes[0].error}")
    if isinstance(settings, ServeBenchSettings):
        found = statistics(outcomes, seconds, settings.metrics, settings.percentiles, settings.limits)
        return Run(name, stand.machine, run_rows(found, roof), outcomes, took)
    return Run(name, stand.machine, run_rows(statistics(outcomes, seconds), roof, rates_alone=True), outcomes, took)


def _sampling(settings: TrafficSettings, stand: Stand) -> Sampling:
    return Sampling(settings.temperature, settings.ignore_eos, stand.source.eos_ids)


def load_facts(settings: ServeBenchSettings, traffic: Traffic) -> list[str]:
    """What the report's head tells of the traffic and its load."""
    facts = [f"{len(traffic.arrivals):,} requests", traffic.title]
    if traffic.timed:
        facts.append(f"over {traffic.arrivals[-1].at:.4g} s")
    elif settings.request_rate == "inf":
        facts.append("all at once")
    else:
        kind = "Poisson" if settings.burstiness == 1.0 else f"burstiness {settings.burstiness:g}"
        facts.append(f"{settings.rate:g} a second ({kind})")
    if settings.max_concurrency:
        facts.append(f"at most {settings.max_concurrency} under way")
    if settings.goodput:
        facts.append(f"goodput within {' '.join(settings.goodput)} ms")
    return [*facts, _sampling_fact(settings)]


def _sampling_fact(settings: TrafficSettings) -> str:
    return f"temperature {settings.temperature:g}{', EOS ignored' if settings.ignore_eos else ''}"


def dry_notes(settings: TrafficSettings) -> list[str]:
    """What is to be said of a dry run."""
    told = []
    if not settings.ignore_eos:
        told.append("dry, every request goes on to its output length; give --ignore-eos for the same wet")
    return told


def _noted(result: Result, stand: Stand) -> Result:
    """The result with what else there is to say."""
    for run in result.runs:
        result.notes += failures(run.outcomes)
        if run.took is not None:
            result.notes.append(f"dry: predicted for {run.machine} in {run.took:.3g} s of this computer's time")
    result.notes += roof_notes(result, stand)
    return result


def roof_notes(result: Result, stand: Stand) -> list[str]:
    """What "of the roof" means in the table, or why it is not there."""
    if stand.predictor is None:
        return [
            "no share of the roof: this machine's figures are not known; run `rooflight probe`, or name one by --on"
        ]
    machine = stand.predictor.machine.title or stand.predictor.machine.name
    told = f"of the roof of {machine}: of all the steps that ran"
    if result.command == "serve":
        told += (
            "; for TTFT of one mean prompt's prefill alone, for TPOT and ITL of a decode step of as many sequences as "
            "a request saw"
        )
    return [told]


@dataclass(slots=True)
class Progress:
    """Says how far a run is, every five seconds."""

    total: int
    say: Say
    what: str = "requests"
    done: int = 0
    said: float = 0.0

    def one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if not self.said:
            self.said = now
        if now - self.said > _SECONDS_BETWEEN_NEWS and self.done < self.total:
            self.said = now
            self.say(f"{self.done:,} of {self.total:,} {self.what}")

    def listen(self, also: Callable[[Output], None]) -> Callable[[Output], None]:
        """A listener to outputs that counts the last of each request, and hands every one on."""

        def on_output(output: Output) -> None:
            also(output)
            if output.finish_reason is not None:
                self.one_more()

        return on_output
