"""`MemoryPlan`: what an engine will hold in memory, worked out before anything is loaded, and the KV blocks that fit.

Weights and cache follow from the config; activations from a walk of the largest step on fake tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.models.layers import Linear
from rooflight.models.transformer import Transformer
from rooflight.ops.batch import Batch
from rooflight.ops.cpu_matmul import packs
from rooflight.ops.sampling import sample, sample_plain
from rooflight.serve.sampling_logprobs import Logprobs
from rooflight.serve.step_program import Choose, StepSizes, check_dtypes, step_program
from rooflight.workload import memory, walk
from rooflight.workload.program import DTYPES, KV_DTYPES
from rooflight.workload.record import Recorder

GIB = 2**30
# Assumptions, stated as such in every plan: what the driver, its context, our kernels and cuBLAS take of a GPU, and
# what one captured graph takes beside the pool that all of them share.
CUDA_CONTEXT_BYTES = GIB // 2
GRAPH_BYTES = 4 * 2**20
# A CPU's cache when none is asked for: this part of what is free, and not more than that.
CPU_CACHE_SHARE, CPU_CACHE_MOST = 0.25, 4 * GIB
# No cache is made larger than this many times all requests at their full length: for a small model that would be
# gigabytes that nobody reads.
USEFUL_LENGTHS = 2
# Matrices are kept a second time, packed, where all weights then take no more of a CPU's free memory than this.
PACKED_SHARE = 0.5
# The runner's cache has a block that no request owns: tokens of padding rows are written there.
SPARE_BLOCKS = 1
_MOST_UTILIZATION = 0.95
_LENGTH, _CPU_CACHE = "--max-model-len", "--cpu-kv-cache-gib"


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be served, and on how much memory; all numbers known, none "auto".

    memory_bytes: of the GPU, whole; on a CPU what is free before anything is loaded. utilization: the part of a GPU's
    memory that may be used. cpu_kv_cache_gib: 0 takes CPU_CACHE_SHARE of what is left. num_blocks: 0 takes what fits.
    graph_sizes, graph_tokens: batch sizes of decode steps, and numbers of tokens of other steps, that are captured.
    """

    config: ModelConfig
    dtype: str
    kv_dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    memory_bytes: float
    cuda: bool
    utilization: float = 0.9
    cpu_kv_cache_gib: float = 0.0
    num_blocks: int = 0
    graph_sizes: tuple[int, ...] = ()
    graph_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by what holds them.

    weights: parameters · bytes each. packed: copies of the matrices in the order that a CPU's products want.
    activations: the most that a step holds beside weights and cache: its inputs, hidden states, logits and the
    sampler's workspace. graphs: the pool of captured steps, the outputs that each keeps, and GRAPH_BYTES each.
    context: CUDA_CONTEXT_BYTES on a GPU. budget: what all of it and the cache may take together. blocks: KV blocks
    that the scheduler may deal out; the cache has SPARE_BLOCKS more.
    """

    demand: Demand
    weights: int
    packed: int
    activations: int
    graphs: int
    context: int
    budget: int
    blocks: int

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in all layers: 2·L·K·E·bytes; MLA: L·(rank + rope)·bytes."""
        config, itemsize = self.demand.config, KV_DTYPES[self.demand.kv_dtype].itemsize
        return config.kv_elements_per_token_layer * len(config.layers) * itemsize

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block in all layers; a layer with a sliding window keeps all of it too."""
        return self.kv_token_bytes * self.demand.block_size

    @property
    def kv_cache(self) -> int:
        """Bytes of the whole cache, the spare block included."""
        return (self.blocks + SPARE_BLOCKS) * self.kv_block_bytes

    @property
    def fixed(self) -> int:
        """Bytes that stand whatever the cache's size."""
        return self.weights + self.packed + self.activations + self.graphs + self.context

    @property
    def total(self) -> int:
        return self.fixed + self.kv_cache

    @property
    def limit(self) -> int:
        """Bytes that `total` must not exceed: the budget of a GPU, all that is free on a CPU."""
        return self.budget if self.demand.cuda else int(self.demand.memory_bytes)

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.blocks * self.demand.block_size

    @property
    def longest(self) -> int:
        """The longest --max-model-len of which one request fits; 0 where no block does."""
        return min(self.tokens, self.demand.config.max_context)

    @property
    def full_requests(self) -> int:
        """Requests of max_model_len tokens that the cache holds at once."""
        return self.blocks // -(-self.demand.max_model_len // self.demand.block_size)

    def rows(self) -> list[tuple[str, int]]:
        """What to show: labels and bytes, that sum to the memory that there is; what is assumed says so."""
        rows = [("weights", self.weights)]
        if self.packed:
            rows.append(("weights packed for this CPU", self.packed))
        rows.append(("activations, at most", self.activations))
        if self.graphs:
            number = len(self.demand.graph_sizes) + len(self.demand.graph_tokens)
            rows.append((f"{number} CUDA graphs (partly assumed)", self.graphs))
        if self.context:
            rows.append(("CUDA context (assumed)", self.context))
        rows.append((f"KV cache, {self.blocks} blocks of {self.demand.block_size} tokens", self.kv_cache))
        return [*rows, ("left free", int(self.demand.memory_bytes) - self.total)]


def plan(demand: Demand) -> MemoryPlan:
    """What the engine will hold; what does not fit shows in the numbers and is refused by `check`.

    Raises InvalidValue on types that no engine can be run in.
    """
    check_dtypes(demand.dtype, demand.kv_dtype)
    weights = parameter_counts(demand.config)["total"] * DTYPES[demand.dtype].itemsize
    rows = min(demand.max_num_seqs, demand.max_num_batched_tokens)
    activations = step_bytes(demand, demand.max_num_batched_tokens, rows, _draw)
    graphs = _graph_bytes(demand) if demand.cuda else 0
    context = CUDA_CONTEXT_BYTES if demand.cuda else 0
    packed = 0 if demand.cuda or not packs(DTYPES[demand.dtype]) else _matrix_bytes(demand)
    if weights + packed > demand.memory_bytes * PACKED_SHARE:
        # A large model must do with its weights once.
        packed = 0
    left = int(demand.memory_bytes) - weights - packed - activations
    if demand.cuda:
        budget = int(demand.memory_bytes * demand.utilization)
    else:
        asked = demand.cpu_kv_cache_gib * GIB
        budget = weights + packed + activations + int(asked or min(CPU_CACHE_SHARE * max(left, 0), CPU_CACHE_MOST))
    empty = MemoryPlan(demand, weights, packed, activations, graphs, context, budget, 0)
    fitting = (budget - empty.fixed) // empty.kv_block_bytes - SPARE_BLOCKS
    if not demand.cpu_kv_cache_gib:
        longest = -(-demand.max_model_len // demand.block_size)
        fitting = min(fitting, USEFUL_LENGTHS * demand.max_num_seqs * longest)
    return replace(empty, blocks=demand.num_blocks or max(fitting, 0))


def _matrix_bytes(demand: Demand) -> int:
    """Bytes of the matrices that every token is multiplied with: all but the table of tokens, and experts."""
    config = demand.config
    folded, times = config.folded()
    with torch.device("meta"):
        model = Transformer(folded)
    total = model.head.weight.numel()
    for layer, count in zip(model.layers, times, strict=True):
        total += count * sum(module.weight.numel() for module in layer.modules() if isinstance(module, Linear))
    return total * DTYPES[demand.dtype].itemsize


def step_bytes(demand: Demand, tokens: int, rows: int, choose: Choose) -> int:
    """Most bytes that a step of so many tokens holds beside weights and cache, with logits of `rows` of them."""
    sizes = StepSizes(tokens, rows, rows, tokens, -(-demand.max_model_len // demand.block_size))
    facts = Batch.uniform(rows, -(-tokens // rows), demand.max_model_len)
    walked = walk.dry(
        lambda: step_program(demand.config, demand.dtype, demand.kv_dtype, demand.block_size, sizes, facts, choose)
    )
    peak = memory.over_time(walked, float("inf"))
    return int(peak.total - peak.weights - peak.kv_cache)


def _draw(logits_RV: Tensor, recorder: Recorder) -> Any:
    """The way of choosing tokens that holds most: at random from edited logits, all with their log-probabilities."""
    edited_RV = logits_RV.to(torch.float32, copy=True)
    rows = logits_RV.shape[0]
    temperature_R, top_p_R, min_p_R, uniform_R = (torch.empty((rows,), dtype=torch.float32) for _ in range(4))
    top_k_R = torch.empty((rows,), dtype=torch.int64)
    tokens_R = sample(edited_RV, temperature_R, top_k_R, top_p_R, min_p_R, uniform_R)
    return Logprobs(logits_RV, tokens_R, [1] * rows).tensors


def _graph_bytes(demand: Demand) -> int:
    """The pool of captured steps, that of the largest; the outputs that each of the others keeps; what a graph takes.

    A decode step keeps its logits, any other the hidden state of each slot.
    """
    config, itemsize = demand.config, DTYPES[demand.dtype].itemsize
    sizes, tokens = demand.graph_sizes, demand.graph_tokens
    decode = step_bytes(demand, max(sizes), max(sizes), _draw_plainly) if sizes else 0
    # These end before the head; a single row is next to none.
    other = step_bytes(demand, max(tokens), 1, lambda logits_RV, recorder: logits_RV) if tokens else 0
    kept = (sum(sizes) * config.vocab_size + len(tokens) * demand.max_num_seqs * config.width) * itemsize
    held = max(sizes, default=0) * config.vocab_size * itemsize
    return max(decode + kept - held, other + kept) + (len(sizes) + len(tokens)) * GRAPH_BYTES


def _draw_plainly(logits_RV: Tensor, recorder: Recorder) -> Any:
    temperature_R, uniform_R = (torch.empty((logits_RV.shape[0],), dtype=torch.float64) for _ in range(2))
    return logits_RV, sample_plain(logits_RV, temperature_R, uniform_R)


def check(found: MemoryPlan) -> MemoryPlan:
    """The plan, if it fits: else raises InvalidValue with the numbers, and with the changes that would make it fit.

    Weights, activations and the rest must leave room for the cache that is planned, and the cache must hold one request
    of max_model_len tokens.
    """
    problem = _problem(found)
    if problem is None:
        return found
    raise InvalidValue(
        f"{found.demand.config.name or 'the model'} does not fit: {problem}; use {' or '.join(_offers(found))}"
    )


def _problem(found: MemoryPlan) -> str | None:
    demand = found.demand
    limit = found.limit
    share = f" ({demand.utilization:g} of the GPU's {_gib(demand.memory_bytes)})" if demand.cuda else " that are free"
    fixed = f"weights take {_gib(found.weights)}, activations {_gib(found.activations)}"
    if demand.cuda:
        fixed += f", CUDA and its graphs {_gib(found.graphs + found.context)}"
    if found.fixed + (1 + SPARE_BLOCKS) * found.kv_block_bytes > limit:
        return f"{fixed}, and nothing of {_gib(limit)}{share} is left for the KV cache"
    if found.total > limit:
        return f"{fixed}, and a KV cache of {_gib(found.kv_cache)} is more than is left of {_gib(limit)}{share}"
    if found.tokens < demand.max_model_len:
        needed = _gib(_one_request(found))
        return (
            f"one request of {demand.max_model_len} tokens needs {needed} of KV cache, which has "
            f"{_gib(found.kv_cache)}: {fixed}, of {_gib(limit)}{share}"
        )
    return None


def _one_request(found: MemoryPlan) -> int:
    """Bytes of a cache for one request of max_model_len tokens."""
    demand = found.demand
    return (-(-demand.max_model_len // demand.block_size) + SPARE_BLOCKS) * found.kv_block_bytes


def _offers(found: MemoryPlan) -> list[str]:
    """Changes under which the plan fits, each tried, alone or else with a shorter context; and the memory to have."""
    demand = found.demand
    alone: dict[str, str] = {}
    shorter: dict[str, str] = {}
    for flag, value, change in _changes(found):
        changed = plan(replace(demand, **change))
        length = changed.longest
        # Of each flag the mildest value that does.
        if _problem(changed) is None:
            alone.setdefault(flag, f"{flag} {value}")
        elif length and _problem(plan(replace(changed.demand, max_model_len=length))) is None:
            shorter.setdefault(flag, f"{flag} {value} with {_LENGTH} {length}")
    offers = list((alone or shorter).values())
    cache = max(_one_request(found), found.kv_cache if demand.num_blocks else 0)
    if demand.cuda:
        return [*offers, f"a GPU with {_ceil_gib((found.fixed + cache) / demand.utilization)} GiB of memory"]
    if _CPU_CACHE in alone:
        return offers
    asked = _ceil_gib(cache)
    return [*offers, f"{_CPU_CACHE} {asked} on a machine with {_ceil_gib(found.fixed + asked * GIB)} GiB free"]


def _changes(found: MemoryPlan) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Flags, values and what they change of the demand; of each flag the mildest first."""
    demand = found.demand
    if 0 < found.longest < demand.max_model_len:
        yield _LENGTH, found.longest, {"max_model_len": found.longest}
    if demand.num_blocks:
        yield "--num-blocks", 0, {"num_blocks": 0}
    if demand.dtype == "fp32":
        yield "--dtype", "bf16", {"dtype": "bf16", "kv_dtype": "bf16"}
    elif demand.kv_dtype == "fp32":
        yield "--kv-cache-dtype", demand.dtype, {"kv_dtype": demand.dtype}
    if demand.cuda and demand.utilization < _MOST_UTILIZATION:
        yield "--gpu-memory-utilization", _MOST_UTILIZATION, {"utilization": _MOST_UTILIZATION}
    for tokens in (2048, 512):
        if tokens < demand.max_num_batched_tokens:
            sizes = tuple(size for size in demand.graph_tokens if size <= tokens)
            yield "--max-num-batched-tokens", tokens, {"max_num_batched_tokens": tokens, "graph_tokens": sizes}
    for rows in (64, 8):
        if rows < demand.max_num_seqs:
            sizes = tuple(size for size in demand.graph_sizes if size <= rows)
            yield "--max-num-seqs", rows, {"max_num_seqs": rows, "graph_sizes": sizes}
    if not demand.cuda:
        gib = _ceil_gib(_one_request(found))
        yield _CPU_CACHE, gib, {"cpu_kv_cache_gib": gib}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _ceil_gib(size: float) -> float:
    """GiB to a tenth, rounded up, so that what is named suffices."""
    return math.ceil(10 * size / GIB) / 10
