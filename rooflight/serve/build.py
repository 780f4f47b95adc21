"""An engine from its settings: the model is found, its memory planned, its weights loaded, its runner made."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from rooflight.errors import InvalidValue
from rooflight.hardware.host import find_machine, keep_freed_memory
from rooflight.hardware.machine import Machine
from rooflight.models.layout import KVCache
from rooflight.serve.clock import RealClock
from rooflight.serve.engine import Engine
from rooflight.serve.graphs import batch_sizes, token_sizes
from rooflight.serve.load import Source, find, weights, with_length
from rooflight.serve.memory_plan import SPARE_BLOCKS, Demand, MemoryPlan, check, plan
from rooflight.serve.params import SamplingParams
from rooflight.serve.predict import StepPredictor
from rooflight.serve.scheduler import Scheduler, SchedulerConfig
from rooflight.serve.settings import EngineSettings
from rooflight.serve.structured import Grammars
from rooflight.serve.torch_runner import TorchRunner
from rooflight.workload.measure import memory_available
from rooflight.workload.program import KV_DTYPES

Say = Callable[[str], None]
# Steps of more sequences than this are not captured: their kernels run longer than their launches take.
LARGEST_GRAPH = 512


@dataclass(slots=True)
class Built:
    """An engine and what it stands on; `predictor` is None where the machine is not known."""

    engine: Engine
    source: Source
    plan: MemoryPlan
    predictor: StepPredictor | None
    machine: Machine | None
    grammars: Grammars | None


def resolved(settings: EngineSettings, cuda: bool) -> EngineSettings:
    """Settings in which nothing is 0 or auto that stands for a default of the device."""
    return replace(
        settings,
        max_num_seqs=settings.max_num_seqs or (256 if cuda else 64),
        max_num_batched_tokens=settings.max_num_batched_tokens or (8192 if cuda else 512),
    )


def demand_of(settings: EngineSettings, source: Source, memory: float, cuda: bool) -> Demand:
    """What the memory plan asks; settings as `resolved` gives them."""
    kv_dtype = source.dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    graphs = cuda and not settings.enforce_eager
    return Demand(
        config=source.config,
        dtype=source.dtype,
        kv_dtype=kv_dtype,
        block_size=settings.block_size,
        max_model_len=source.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        memory_bytes=memory,
        cuda=cuda,
        utilization=settings.gpu_memory_utilization,
        cpu_kv_cache_gib=settings.cpu_kv_cache_gib,
        num_blocks=settings.num_blocks,
        graph_sizes=batch_sizes(min(settings.max_num_seqs, LARGEST_GRAPH)) if graphs else (),
        graph_tokens=token_sizes(source.config, settings.max_num_batched_tokens) if graphs else (),
    )


def plan_for(
    settings: EngineSettings, source: Source, memory: float, cuda: bool
) -> tuple[EngineSettings, Source, MemoryPlan]:
    """The memory plan, and the settings and the source with what it decides; raises InvalidValue when nothing fits.

    A longest context that nobody asked for is cut to what the cache holds.
    """
    settings = resolved(settings, cuda)
    planned = plan(demand_of(settings, source, memory, cuda))
    if not settings.max_model_len and 0 < planned.longest < source.max_model_len:
        source = with_length(source, planned.longest)
        planned = plan(demand_of(settings, source, memory, cuda))
    check(planned)
    return replace(settings, max_model_len=source.max_model_len), source, planned


def predictor_for(demand: Demand, machine: Machine) -> StepPredictor:
    """What a step of this engine should take on a machine, captured steps as captured ones."""
    return StepPredictor(
        demand.config,
        machine,
        demand.dtype,
        demand.kv_dtype,
        demand.block_size,
        graph_up_to=max(demand.graph_sizes, default=0),
        graph_tokens_up_to=max(demand.graph_tokens, default=0),
    )


def scheduler_config(settings: EngineSettings, blocks: int) -> SchedulerConfig:
    """The scheduler's sizes from settings in which everything is decided."""
    if not settings.enable_chunked_prefill and settings.max_num_batched_tokens < settings.max_model_len:
        raise InvalidValue(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens} is below the longest context of "
            f"{settings.max_model_len} without chunked prefill; raise it, or lower --max-model-len"
        )
    return SchedulerConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        block_size=settings.block_size,
        num_blocks=blocks,
        enable_prefix_caching=settings.enable_prefix_caching,
        chunked_prefill=settings.enable_chunked_prefill,
        by_priority=settings.scheduling_policy == "priority",
    )


def usable_memory(settings: EngineSettings, device: torch.device) -> float:
    """Bytes to plan with: a GPU's own, less what others take beyond the share that is not ours; a CPU's free memory."""
    if device.type != "cuda":
        return memory_available("cpu")
    free, total = torch.cuda.mem_get_info(device)
    return min(float(total), free / settings.gpu_memory_utilization)


def build(settings: EngineSettings, say: Say) -> Built:
    """The engine of a model on this machine; `say` is told the plan and what takes long.

    Raises InvalidValue, before anything is loaded, on a model that cannot be found or does not fit.
    """
    source = find(settings)
    cuda = source.device.type == "cuda"
    settings, source, planned = plan_for(settings, source, usable_memory(settings, source.device), cuda)
    # Before what takes minutes, for it may be a name that is not known.
    machine = find_machine(settings.on, source.device)
    for line in described(planned):
        say(line)
    scheduler = Scheduler(scheduler_config(settings, planned.blocks), say)
    grammars = None
    if source.tokenizer is not None:
        grammars = Grammars(source.tokenizer, source.config.vocab_size, source.eos_ids)
    if not cuda:
        keep_freed_memory()
    try:
        model = weights(source, settings, say, packed=planned.packed > 0)
        demand = planned.demand
        kv_dtype = KV_DTYPES[demand.kv_dtype]
        blocks = planned.blocks + SPARE_BLOCKS
        cache = KVCache.allocate(source.config, blocks, settings.block_size, kv_dtype, source.device)
        # Slots that nobody wrote are masked, but a mask times NaN is NaN.
        for tensor in (*cache.keys, *cache.values):
            if tensor is not None:
                tensor.zero_()
        runner = TorchRunner(
            model,
            cache,
            grammars,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
            seed=settings.seed,
            graph_batches=demand.graph_sizes,
            graph_tokens=demand.graph_tokens,
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InvalidValue(
            f"the memory of this {source.device.type} is used up by others after all; free it, or lower "
            "--gpu-memory-utilization or --cpu-kv-cache-gib"
        ) from error
    predictor = predictor_for(demand, machine) if machine is not None else None
    ahead = settings.async_scheduling == "on" or (settings.async_scheduling == "auto" and cuda)
    # The model is here to stay: a collector that looks through it in the middle of a step only costs time.
    gc.collect()
    gc.freeze()
    return Built(
        Engine(scheduler, runner, RealClock(), predictor, ahead=int(ahead)),
        source,
        planned,
        predictor,
        machine,
        grammars,
    )


def check_structured(grammars: Grammars | None, params: SamplingParams) -> None:
    """Raise InvalidValue on structured output that cannot be followed; what is compiled here is kept for its use."""
    if params.structured is not None:
        if grammars is None:
            raise InvalidValue("structured output needs a tokenizer, and the model has none; name one")
        grammars.matcher(params.structured)


def described(planned: MemoryPlan) -> list[str]:
    """The memory plan as lines of text."""
    lines = [f"memory plan for {planned.demand.config.name or 'the model'}, {planned.demand.dtype}:"]
    lines += [f"  {label:<44} {size / 2**30:9.2f} GiB" for label, size in planned.rows()]
    demand = planned.demand
    return [
        *lines,
        f"  {planned.tokens:,} tokens of cache: {planned.full_requests:,} requests of {demand.max_model_len:,} tokens "
        f"at once, {demand.max_num_seqs} at most",
    ]
