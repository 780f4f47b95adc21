"""`Stand`: an engine set up for a benchmark, wet or dry, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rooflight.errors import InvalidValue
from rooflight.hardware import load as load_machine
from rooflight.serve.bench.datasets import Vocabulary
from rooflight.serve.build import Built, build, plan_for, predictor_for, scheduler_config
from rooflight.serve.clock import Clock, VirtualClock
from rooflight.serve.dry_runner import DryRunner
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.load import Source, find
from rooflight.serve.outputs import Completion
from rooflight.serve.predict import StepPredictor
from rooflight.serve.scheduler import Output, Scheduler, SchedulerConfig
from rooflight.serve.settings import EngineSettings

# What a dry run is for when nobody says.
DEFAULT_MACHINE = "h200"


@dataclass(slots=True)
class Stand:
    """machine: in words. records: the engine's steps, as they are settled. built: None of a dry engine."""

    engine: Engine
    clock: Clock
    source: Source
    machine: str
    predictor: StepPredictor | None
    built: Built | None = None
    records: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine.on_step = self.records.append

    @property
    def vocabulary(self) -> Vocabulary:
        """Token ids for random prompts: those that the tokenizer knows, else all of the model's."""
        tokenizer = self.source.tokenizer
        size = self.source.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        return Vocabulary(size, self.source.eos_ids)

    @property
    def budget(self) -> int:
        """Most tokens of a step."""
        return self.engine.scheduler.config.max_num_batched_tokens

    @property
    def facts(self) -> list[str]:
        """The engine in words, for a report's head."""
        config = self.engine.scheduler.config
        return [
            self.source.dtype,
            f"{config.max_num_seqs} sequences and {config.max_num_batched_tokens:,} tokens a step at most",
            f"{config.num_blocks:,} KV blocks of {config.block_size}",
            f"prefix cache {'on' if config.enable_prefix_caching else 'off'}",
        ]


def wet_stand(settings: EngineSettings, say: Callable[[str], None]) -> Stand:
    """The model loaded on this machine."""
    built = build(settings, say)
    engine, source = built.engine, built.source
    return Stand(engine, engine.clock, source, _device(source.device), built.predictor, built)


def dry_stand(settings: EngineSettings) -> Stand:
    """An engine for the machine of --on; no weights are read, so that any model's config will do.

    Its settings and its KV blocks are those that a wet engine would have there. Raises InvalidValue where the model
    does not fit.
    """
    machine = load_machine(settings.on or DEFAULT_MACHINE)
    gpu = machine.kind != "cpu"
    if not settings.model:
        raise InvalidValue("no model given; name a preset, a config.json, a directory or a hub id by --model")
    if not Path(settings.model).is_dir():
        settings = replace(settings, load_format="dummy")
    source = find(settings, torch.device("cpu"))
    settings, source, planned = plan_for(settings, source, machine.memory_bytes.value, gpu)
    predictor = predictor_for(planned.demand, machine)
    ahead = settings.async_scheduling == "on" or (settings.async_scheduling == "auto" and gpu)
    return _dry(scheduler_config(settings, planned.blocks), source, predictor, int(ahead))


def twin(stand: Stand) -> Stand:
    """A dry engine with the same scheduler's sizes as a wet one, for the machine that its steps are predicted for."""
    if stand.predictor is None:
        raise InvalidValue("this machine's figures are not known; run `rooflight probe` first, or name one by --on")
    return _dry(stand.engine.scheduler.config, stand.source, stand.predictor, stand.engine.ahead)


def _dry(config: SchedulerConfig, source: Source, predictor: StepPredictor, ahead: int) -> Stand:
    clock = VirtualClock()
    runner = DryRunner(predictor, clock, vocab_size=source.config.vocab_size, width=source.config.width)
    engine = Engine(Scheduler(config), runner, clock, predictor, ahead)
    return Stand(engine, clock, source, predictor.machine.title or predictor.machine.name, predictor)


def reader(stand: Stand) -> Callable[[Output], None]:
    """A listener that makes each request's text from its tokens, as `LLM.generate` does."""
    open_: dict[str, Completion] = {}

    def read(output: Output) -> None:
        name = output.request.id
        if name not in open_:
            open_[name] = Completion(0, output.request, stand.source.tokenizer)
        open_[name].news(output)
        if output.finish_reason is not None:
            del open_[name]

    return read


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
