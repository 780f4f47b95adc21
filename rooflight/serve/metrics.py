"""`Metrics`: what an engine's steps and requests add up to, for Prometheus, under the names of vLLM's dashboards.

Names, labels and buckets are those of vLLM's V1 engine (docs.vllm.ai, Production Metrics), old names beside the new
ones where dashboards in use ask for them; what vLLM has no name for begins with `rooflight:`. Where a meaning differs,
its help says so. The engine's thread calls `observe` once a step, so values are plain numbers under one lock, copied
and put into words only when somebody asks for them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from rooflight.serve.request import Request
from rooflight.serve.series import (
    BATCH,
    COMPLETIONS,
    FIRST_TOKEN,
    LABELS,
    REQUEST,
    STEP,
    TOKEN,
    Counter,
    Histogram,
    one_two_five,
)

if TYPE_CHECKING:
    from rooflight.serve.engine import StepRecord

FINISH_REASONS = ("stop", "length", "abort", "error")
# Of these a request's latencies say how fast the engine is; one that was broken off says how patient its client was.
COMPLETED = ("stop", "length")
MOMENTS_KEPT = 16384


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How full an engine stands: requests that run and wait, KV blocks that requests use, and all blocks."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests use."""
        return self.used_blocks / self.total_blocks if self.total_blocks else 0.0


@dataclass(frozen=True, slots=True)
class Moment:
    """What one step adds to figures over the last seconds.

    token_gaps: seconds from a request's token before to this step's, and how many requests waited as long.
    """

    ended: float
    prefill_tokens: int
    generated: int
    queried_tokens: int
    cached_tokens: int
    finished: int
    first_token_seconds: tuple[float, ...]
    token_gaps: tuple[tuple[float, int], ...]


class Metrics(Collector):
    """Counts an engine's steps and requests; `render` puts them into Prometheus' words. Safe across threads.

    max_model_len: upper end of the histograms of tokens. cache_config: labels of vllm:cache_config_info.
    occupancy: how the engine stands now; without it, as the last step left it, which goes stale when requests are
    cancelled and no step follows. A registry of its own also carries the process' CPU time and memory.
    """

    def __init__(
        self,
        model_name: str,
        registry: CollectorRegistry | None = None,
        *,
        max_model_len: int = 131_072,
        cache_config: Mapping[str, object] | None = None,
        occupancy: Callable[[], Occupancy] | None = None,
        engine: str = "0",
    ):
        self.model_name, self.engine = model_name, engine
        self._recent: deque[Moment] = deque(maxlen=MOMENTS_KEPT)
        self._cache_config = dict(cache_config or {})
        self._source, self._last = occupancy, Occupancy()
        self._lock = threading.Lock()
        # When each request that has begun to give tokens gave its last one.
        self._talking: dict[Request, float] = {}
        self._ended: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self._counters: list[Counter] = []
        self._histograms: list[Histogram] = []
        self._make_counters()
        self._make_histograms(one_two_five(max_model_len))
        self._registry = registry if registry is not None else CollectorRegistry()
        if registry is None:
            ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def _make_counters(self) -> None:
        add = self._counter
        self._preemptions = add("vllm:num_preemptions", "Requests that lost their KV blocks and were computed again.")
        self._prompts = add("vllm:prompt_tokens", "Prompt tokens of requests that came to their first token.")
        self._generated = add("vllm:generation_tokens", "Tokens generated.")
        self._queried = add("vllm:prefix_cache_queries", "Tokens of admitted requests looked up in the prefix cache.")
        self._cached = add("vllm:prefix_cache_hits", "Tokens of admitted requests found in the prefix cache.")
        self._prefilled = add("rooflight:prefill_tokens", "Tokens computed in parts of more than one token.")
        self._measured = add("rooflight:step_measured_seconds", "Measured seconds of the steps that have a prediction.")
        self._predicted = add("rooflight:step_predicted_seconds", "Seconds that these steps should have taken.")
        self._roof = add("rooflight:step_roof_seconds", "Seconds that physics allows for these steps.")

    def _make_histograms(self, lengths: Sequence[int]) -> None:
        add = self._histogram
        self._step_tokens = add("vllm:iteration_tokens_total", "Tokens a step.", BATCH)
        self._step_seconds = add("rooflight:step_seconds", "Measured seconds a step.", STEP)
        self._ttft = add("vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN)
        self._itl = add("vllm:inter_token_latency_seconds", "From one token of a request to its next.", TOKEN)
        self._old_itl = add("vllm:time_per_output_token_seconds", "Old name of inter_token_latency_seconds.", TOKEN)
        self._tpot = add(
            "vllm:request_time_per_output_token_seconds",
            "Mean over a request's tokens after its first; requests of one token are left out.",
            TOKEN,
        )
        self._e2e = add("vllm:e2e_request_latency_seconds", "From arrival to the end; of completed requests.", REQUEST)
        self._queue = add("vllm:request_queue_time_seconds", "From arrival to the first step.", REQUEST)
        self._prefill = add("vllm:request_prefill_time_seconds", "From the first step to the first token.", REQUEST)
        self._decode = add("vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST)
        self._inference = add("vllm:request_inference_time_seconds", "From the first step to the last token.", REQUEST)
        self._prompt_lengths = add("vllm:request_prompt_tokens", "Prompt tokens a request.", lengths)
        self._output_lengths = add("vllm:request_generation_tokens", "Tokens generated a request.", lengths)
        self._max_tokens = add("vllm:request_params_max_tokens", "The max_tokens that a request asked for.", lengths)
        self._n = add("vllm:request_params_n", "The n of a request, once for each of its completions.", COMPLETIONS)

    def _counter(self, name: str, help: str) -> Counter:
        self._counters.append(Counter(name, help))
        return self._counters[-1]

    def _histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:
        self._histograms.append(Histogram(name, help, bounds, [0] * (len(bounds) + 1)))
        return self._histograms[-1]

    def observe(self, record: StepRecord) -> None:
        """Take in one settled step; called in the order of steps, on the thread that settles them."""
        with self._lock:
            self._observe_step(record)
            gaps = self._token_gaps()
            for seconds, times in gaps:
                self._itl.add(seconds, times)
                self._old_itl.add(seconds, times)
            waits = tuple(self._observe_first(request) for request in record.first)
            for request in record.finished:
                self._observe_finished(request)
            self._recent.append(
                Moment(
                    ended=record.ended,
                    prefill_tokens=record.prefill_tokens,
                    generated=record.generated,
                    queried_tokens=record.queried_tokens,
                    cached_tokens=record.cached_tokens,
                    finished=len(record.finished),
                    first_token_seconds=waits,
                    token_gaps=gaps,
                )
            )

    def _observe_step(self, record: StepRecord) -> None:
        self._last = Occupancy(record.running, record.waiting, record.used_blocks, record.total_blocks)
        self._preemptions.value += record.preempted
        self._generated.value += record.generated
        self._queried.value += record.queried_tokens
        self._cached.value += record.cached_tokens
        self._prefilled.value += record.prefill_tokens
        self._step_tokens.add(record.tokens)
        self._step_seconds.add(record.seconds)
        if record.forecast is not None:
            self._measured.value += record.seconds
            self._predicted.value += record.forecast.seconds
            self._roof.value += record.forecast.roof_seconds

    def _token_gaps(self) -> tuple[tuple[float, int], ...]:
        """Times since the token before, of the requests that gave a token in this step; mostly one time for all."""
        gaps: dict[float, int] = {}
        talking = self._talking
        for request, before in talking.items():
            last = request.times.last_token
            if last is not None and last != before:
                talking[request] = last
                gaps[last - before] = gaps.get(last - before, 0) + 1
        return tuple(gaps.items())

    def _observe_first(self, request: Request) -> float:
        times = request.times
        first = times.arrival if times.first_token is None else times.first_token
        self._talking[request] = first
        self._ttft.add(first - times.arrival)
        self._prompts.value += len(request.prompt)
        return first - times.arrival

    def _observe_finished(self, request: Request) -> None:
        self._talking.pop(request, None)
        reason = request.finish_reason or "error"
        self._ended[reason] = self._ended.get(reason, 0) + 1
        if request.embed:
            self._prompts.value += len(request.prompt)
        if reason not in COMPLETED:
            return
        times, outputs = request.times, request.outputs
        self._prompt_lengths.add(len(request.prompt))
        self._output_lengths.add(outputs)
        self._n.add(request.params.n)
        if request.params.max_tokens is not None:
            self._max_tokens.add(request.params.max_tokens)
        if times.finished is not None:
            self._e2e.add(times.finished - times.arrival)
        if times.scheduled is not None:
            self._queue.add(times.scheduled - times.arrival)
        if times.scheduled is not None and times.first_token is not None and times.last_token is not None:
            decode = times.last_token - times.first_token
            self._prefill.add(times.first_token - times.scheduled)
            self._decode.add(decode)
            self._inference.add(times.last_token - times.scheduled)
            if outputs > 1:
                self._tpot.add(decode / (outputs - 1))

    def moments(self, since: float) -> tuple[list[Moment], float]:
        """The steps that ended after `since`, and from when on they are all there: `since`, or later."""
        with self._lock:
            kept = list(self._recent)
        if len(kept) == MOMENTS_KEPT:
            since = max(since, kept[0].ended)
        return [moment for moment in kept if moment.ended > since], since

    def occupancy(self) -> Occupancy:
        """How the engine stands now."""
        return self._source() if self._source is not None else self._last

    def collect(self) -> Iterator[Metric]:
        """The metric families, as prometheus_client asks for them."""
        with self._lock:
            series = [entry.copy() for entry in (*self._counters, *self._histograms)]
            ended = dict(self._ended)
        labels, stands = (self.model_name, self.engine), self.occupancy()
        gauges = (
            ("vllm:num_requests_running", "Requests that run.", stands.running),
            ("vllm:num_requests_waiting", "Requests that wait for their first step, or again.", stands.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", stands.kv_usage),
            ("vllm:gpu_cache_usage_perc", "Old name of kv_cache_usage_perc.", stands.kv_usage),
        )
        for name, help, value in gauges:
            gauge = GaugeMetricFamily(name, help, labels=LABELS)
            gauge.add_metric(labels, value)
            yield gauge
        if self._cache_config:
            config = {**self._cache_config, "engine": self.engine}
            info = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is set up.", labels=list(config))
            info.add_metric([str(value) for value in config.values()], 1)
            yield info
        why = (*LABELS, "finished_reason")
        success = CounterMetricFamily("vllm:request_success", "Requests ended, by why.", labels=why)
        for reason, count in ended.items():
            success.add_metric((*labels, reason), count)
        yield success
        for entry in series:
            yield entry.family(labels)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body of GET /metrics and its content type: OpenMetrics where `accept` asks for it, else plain text."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
