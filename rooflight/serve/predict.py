"""`StepPredictor`: what one engine step should take on a machine, and its roof.

The decoder is walked once, as the torch runner runs it, with symbolic sizes (`step_costs`); a step's sizes put in, its
operations are laid on the two lanes of `workload.roofline.time_walk`.
Legend: R sampled rows  V vocabulary
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflight.errors import InvalidValue
from rooflight.hardware.machine import Machine
from rooflight.models.config import ModelConfig
from rooflight.ops.batch import Batch
from rooflight.ops.sampling import greedy, sample, sample_plain
from rooflight.serve.params import SamplingParams
from rooflight.serve.step import Forecast, Step
from rooflight.serve.step_costs import StepCosts, step_costs
from rooflight.serve.step_program import LOGITS, StepSizes, check_dtypes
from rooflight.workload.record import FORWARD, Recorder
from rooflight.workload.roofline import Priced, between_seconds, launch_times, price

# The ways in which the sampler draws rows: the likeliest token; from all of the vocabulary; from the few likeliest;
# from what top-p or min-p leave of it, which a CPU sorts. Each is a phase of the walk.
GREEDY, PLAIN, FEW, SORTED = "greedy", "plain", "few", "sorted"
# As the sampler: up to this top_k the likeliest tokens are selected and not sorted.
_MOST_SELECTED = 1024
# Prices of one cost to remember: more steps than that are seldom of different sizes.
_REMEMBERED = 16384


def way_of(params: SamplingParams, vocab_size: int) -> str:
    """How the sampler draws a request's tokens."""
    if params.temperature == 0.0:
        return GREEDY
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    if 0 < top_k <= _MOST_SELECTED:
        return FEW
    return SORTED if top_k or params.top_p < 1.0 or params.min_p > 0.0 else PLAIN


def _every_way(logits_RV: Tensor, recorder: Recorder) -> None:
    """All ways of choosing, one after the other; a step is then priced with those that it takes."""
    rows = logits_RV.shape[0]
    temperature_R, top_p_R, min_p_R, uniform_R = (torch.empty((rows,), dtype=torch.float64) for _ in range(4))
    top_k_R = torch.empty((rows,), dtype=torch.int64)
    with recorder.phase(GREEDY):
        greedy(logits_RV)
    with recorder.phase(PLAIN):
        sample_plain(logits_RV, temperature_R, uniform_R)
    for way, most in ((FEW, _MOST_SELECTED), (SORTED, 0)):
        with recorder.phase(way):
            sample(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, uniform_R, most)


@dataclass(frozen=True, slots=True)
class Lanes:
    """What a stretch of operations does to the lanes of host and device, as they stand at (h, d) seconds.

    They go to h + host and max(d + device, h + late): `late` is the longest way that begins on the host and ends on the
    device. Such maps chain, so that equal layers need not be gone through one by one.
    """

    host: float
    device: float
    late: float

    def then(self, other: Lanes) -> Lanes:
        """This stretch and another after it."""
        late = max(self.late + other.device, self.host + other.late)
        return Lanes(self.host + other.host, self.device + other.device, late)

    def times(self, count: int) -> Lanes:
        """This stretch `count` times over: the longest way changes lanes in the first of them or in the last."""
        late = self.late + (count - 1) * max(self.host, self.device)
        return Lanes(count * self.host, count * self.device, late)


@dataclass(frozen=True, slots=True)
class _Course:
    """A phase's operations in order, as stretches of costs by number with how often each is repeated.

    counts: how often each cost stands in the whole.
    """

    stretches: list[tuple[tuple[int, ...], int]]
    counts: Counter[int]

    @staticmethod
    def of(found: StepCosts, phase: str) -> _Course:
        """The course through the records of one phase; layers alike that follow one another are one stretch."""
        parts: list[tuple[int | None, list[int]]] = []
        for step in found.walk.steps:
            if found.walk.trace.records[step.record].phase == phase:
                if not parts or parts[-1][0] != step.layer:
                    parts.append((step.layer, []))
                parts[-1][1].append(found.numbers[step.record])
        stretches: list[tuple[tuple[int, ...], int]] = []
        for numbers in (tuple(numbers) for _, numbers in parts):
            if stretches and stretches[-1][0] == numbers:
                stretches[-1] = (numbers, stretches[-1][1] + 1)
            else:
                stretches.append((numbers, 1))
        return _Course(stretches, Counter(number for _, numbers in parts for number in numbers))


class StepPredictor:
    """Prices the engine steps of one decoder on one machine, each from its sizes alone, in less than a millisecond.

    dtype: of weights and products; kv_dtype: of cached keys and values. On a GPU, steps of at most `graph_up_to`
    sequences, each with one token that is sampled after, are one CUDA graph, which draws tokens in the plain way; of
    other steps the layers are one up to `graph_tokens_up_to` tokens. All else is launched operation by operation.
    Not priced: log-probabilities, penalties and masks of the sampler, a graph's padding, copies to and from the device.
    Raises InvalidValue on a type that is unknown.
    """

    def __init__(
        self,
        config: ModelConfig,
        machine: Machine,
        dtype: str,
        kv_dtype: str,
        block_size: int,
        *,
        graph_up_to: int = 0,
        graph_tokens_up_to: int = 0,
    ):
        check_dtypes(dtype, kv_dtype)
        self.config, self.machine, self.block_size = config, machine, block_size
        self._graph_sequences, self._graph_tokens = graph_up_to, graph_tokens_up_to
        found = step_costs(config, dtype, kv_dtype, block_size, _every_way)
        self._costs = found.costs
        self._layers, self._logits = _Course.of(found, FORWARD), _Course.of(found, LOGITS)
        self._ways = {way: _Course.of(found, way) for way in (GREEDY, PLAIN, FEW, SORTED)}
        self._launches, self._between = launch_times(machine), between_seconds(found.walk, machine)
        self._seen: list[dict[tuple[int, ...], Priced]] = [{} for _ in found.costs]
        self._last: tuple[Step, Forecast] | None = None

    def forecast(self, step: Step) -> Forecast:
        """What a step should take, its rows drawn in the ways that their requests ask for."""
        # The engine and a dry runner both ask, one after the other.
        if self._last is None or self._last[0] is not step:
            vocabulary = self.config.vocab_size
            draws = Counter(way_of(part.request.params, vocabulary) for part in step.parts if part.samples)
            counts, contexts = [part.count for part in step.parts], [part.context for part in step.parts]
            self._last = (step, self.forecast_sizes(counts, contexts, draws.total(), draws=draws))
        return self._last[1]

    def forecast_sizes(
        self,
        counts: Sequence[int],
        contexts: Sequence[int],
        samples: int,
        *,
        draws: Mapping[str, int] | None = None,
    ) -> Forecast:
        """What a step should take in which each sequence adds `counts` tokens and then holds `contexts` tokens.

        samples: rows of logits that tokens are chosen from; without any, the step ends with the layers. draws: how many
        of them in which way; None: all greedily.
        Raises InvalidValue where counts and contexts do not fit each other, or there are none.
        """
        if not counts or len(counts) != len(contexts):
            raise InvalidValue(f"{len(counts)} counts and {len(contexts)} contexts; give one of each for a sequence")
        facts, longest = Batch.of(counts, contexts), max(counts)
        sizes = StepSizes(sum(counts), len(counts), samples, longest, -(-max(contexts) // self.block_size))
        courses = self._courses_of(sizes, {} if not samples else draws or {GREEDY: samples})
        roofs: defaultdict[str, float] = defaultdict(float)
        lanes = Lanes(0.0, 0.0, float("-inf"))
        for course, its_sizes, graph in courses:
            priced = {number: self._priced(number, its_sizes, facts, graph) for number in course.counts}
            for number, count in course.counts.items():
                roofs[priced[number].bound] += count * priced[number].roof_seconds
            lanes = lanes.then(self._lanes(course, priced, graph))
        bound = max(roofs, key=lambda name: roofs[name])
        return Forecast(max(lanes.device, lanes.late), sum(roofs.values()), bound)

    def _courses_of(self, sizes: StepSizes, draws: Mapping[str, int]) -> list[tuple[_Course, StepSizes, bool]]:
        """What a step runs, in order, each with its sizes and whether it is in a graph."""
        gpu, groups = self.machine.kind != "cpu", drawn_together(draws)
        decode = sizes.longest == 1 and sizes.rows == sizes.sequences
        whole = gpu and decode and sizes.sequences <= self._graph_sequences
        courses = [(self._layers, sizes, whole or (gpu and sizes.tokens <= self._graph_tokens))]
        if groups:
            courses.append((self._logits, sizes, whole))
        if whole:
            courses.append((self._ways[PLAIN], sizes, True))
            if draws.keys() <= {GREEDY, PLAIN}:
                return courses
        return courses + [(self._ways[way], sizes._replace(rows=rows), False) for way, rows in groups]

    def _priced(self, number: int, sizes: StepSizes, facts: Batch, graph: bool) -> Priced:
        cost, seen = self._costs[number], self._seen[number]
        if cost.depends is None:
            return price(cost.record(sizes, facts), self.machine, self._launches, graph=graph)
        key = (graph, *(sizes[index] for index in cost.depends))
        found = seen.get(key)
        if found is None:
            if len(seen) >= _REMEMBERED:
                seen.clear()
            found = price(cost.record(sizes, facts), self.machine, self._launches, graph=graph)
            seen[key] = found
        return found

    def _lanes(self, course: _Course, priced: dict[int, Priced], graph: bool) -> Lanes:
        """A course on both lanes; on a CPU they are one, and Python between two operations is a part of it."""
        between = 0.0 if graph else self._between
        if self.machine.kind == "cpu":
            device = sum(count * (priced[number].kernel_seconds + between) for number, count in course.counts.items())
            return Lanes(0.0, device, float("-inf"))
        whole = Lanes(0.0, 0.0, float("-inf"))
        for numbers, count in course.stretches:
            host, device, late = 0.0, 0.0, float("-inf")
            for number in numbers:
                item = priced[number]
                host += item.host_seconds + between
                device += item.kernel_seconds
                late = max(late, host) + item.kernel_seconds
            whole = whole.then(Lanes(host, device, late).times(count))
        return whole


def drawn_together(draws: Mapping[str, int]) -> list[tuple[str, int]]:
    """Rows that are drawn together; greedy ones, which any way serves, go with the cheapest of the others."""
    groups = [(way, draws[way]) for way in (GREEDY, PLAIN, FEW, SORTED) if draws.get(way)]
    if len(groups) > 1 and groups[0][0] == GREEDY:
        (_, with_others), (way, rows), *rest = groups
        return [(way, rows + with_others), *rest]
    return groups
