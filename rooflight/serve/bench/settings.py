"""The settings of the benchmarks, once; names and meanings are those of `vllm bench`, and flags are derived."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rooflight.errors import InvalidValue
from rooflight.settings import check_values, option

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT = ("ttft", "tpot", "e2el")
_D, _L, _S, _F, _E = "traffic", "load", "sampling", "figures", "endpoint"


@dataclass(frozen=True, slots=True)
class Span:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int


def span_of(flag: str, text: str, ratio: float = 0.0, least: int = 1) -> Span:
    """`1024` or `100:1024` as a span; a ratio r widens one number L to ⌊L·(1−r)⌋ … ⌈L·(1+r)⌉, as vLLM does."""
    parts = text.split(":")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise InvalidValue(f"{flag} {text!r} is no length; use a number such as 1024, or a range such as 100:1024")
    low, high = int(parts[0]), int(parts[-1])
    if low > high:
        raise InvalidValue(f"{flag} {text} runs backwards; use {high}:{low}")
    if high < least:
        raise InvalidValue(f"{flag} {text} is out of range; it must be at least {least}")
    if len(parts) == 2 and ratio:
        raise InvalidValue(f"{flag} {text} is a range already; leave --random-range-ratio {ratio} out")
    return Span(max(least, math.floor(low * (1 - ratio))), max(least, math.ceil(high * (1 + ratio))))


@dataclass(frozen=True, slots=True)
class TrafficSettings:
    """What is asked: prompts, output lengths, and how tokens are chosen."""

    dataset_name: str = option("random", _D, "random, sharegpt, or a JSONL file of prompts or a trace", metavar="NAME")
    dataset_path: str = option("", _D, "the JSON file of sharegpt", metavar="FILE")
    num_prompts: int = option(1000, _D, "requests", least=1)
    random_input_len: str = option("1024", _D, "prompt tokens: one length, or a range such as 100:1024", metavar="LEN")
    random_output_len: str = option("128", _D, "output tokens: one length, or a range", metavar="LEN")
    random_range_ratio: float = option(0.0, _D, "r draws lengths from L·(1−r) to L·(1+r)", least=0.0, less_than=1.0)
    random_prefix_len: int = option(0, _D, "tokens that all random prompts begin with", least=0)
    input_len: str = option("", _D, "the same as --random-input-len", metavar="LEN")
    output_len: str = option("", _D, "output tokens whatever the dataset says: one length, or a range", metavar="LEN")
    temperature: float = option(1.0, _S, "0 is greedy", least=0.0)
    ignore_eos: bool = option(True, _S, "go on to the output length, whatever is sampled")
    num_warmups: int = option(1, _F, "requests before the run that do not count", least=0)

    @property
    def inputs(self) -> Span:
        """Lengths of random prompts, without their common prefix."""
        flag = "--input-len" if self.input_len else "--random-input-len"
        # A prefix alone is a prompt too.
        least = 0 if self.random_prefix_len else 1
        return span_of(flag, self.input_len or self.random_input_len, self.random_range_ratio, least)

    @property
    def outputs(self) -> Span:
        """Output lengths of random traffic."""
        flag = "--output-len" if self.output_len else "--random-output-len"
        return span_of(flag, self.output_len or self.random_output_len, self.random_range_ratio)

    def check(self) -> TrafficSettings:
        """Raise InvalidValue on a value out of range, and on settings that contradict each other."""
        check_values(self)
        if self.dataset_name == "random":
            _ = self.inputs, self.outputs
        elif self.output_len:
            span_of("--output-len", self.output_len)
        if self.dataset_name == "sharegpt" and not self.dataset_path:
            raise InvalidValue("--dataset-name sharegpt needs --dataset-path FILE, the JSON file of its conversations")
        if self.dataset_name != "sharegpt" and self.dataset_path:
            raise InvalidValue(
                f"--dataset-path {self.dataset_path} is for --dataset-name sharegpt; name a JSONL file by "
                f"--dataset-name {self.dataset_path}"
            )
        return self


@dataclass(frozen=True, slots=True)
class ServeBenchSettings(TrafficSettings):
    """Traffic with arrival times, and what is told of it."""

    temperature: float = option(0.0, _S, "0 is greedy", least=0.0)
    ignore_eos: bool = option(False, _S, "go on to the output length, whatever is sampled")
    request_rate: str = option("inf", _L, "requests a second, Poisson arrivals; inf sends all at once", metavar="RATE")
    burstiness: float = option(
        1.0, _L, "shape of gamma-distributed intervals: 1 is Poisson, less is burstier", more_than=0.0
    )
    max_concurrency: int = option(0, _L, "requests under way at once; others wait unsent (0: any number)", least=0)
    percentile_metrics: str = option(",".join(METRICS), _F, "metrics to tell, of " + ", ".join(METRICS), metavar="LIST")
    metric_percentiles: str = option("99", _F, "percentiles to tell, such as 50,90,99", metavar="LIST")
    goodput: tuple[str, ...] = option(
        (), _F, "limits in ms, such as ttft:200 tpot:50; counts requests that keep them all", metavar="METRIC:MS"
    )

    @property
    def rate(self) -> float:
        """Requests a second; infinite when all come at once."""
        try:
            rate = float(self.request_rate)
        except ValueError:
            rate = 0.0
        if not rate > 0.0:
            raise InvalidValue(f"--request-rate {self.request_rate!r} is no rate; use a number above 0, or inf")
        return rate

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to tell, in the order of `METRICS`."""
        wanted = [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]
        for name in wanted:
            if name not in METRICS:
                raise InvalidValue(f"--percentile-metrics {name!r} is unknown; use some of {', '.join(METRICS)}")
        return tuple(name for name in METRICS if name in wanted)

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The percentiles to tell, rising."""
        found = []
        for text in self.metric_percentiles.split(","):
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if not 0.0 <= value <= 100.0:
                raise InvalidValue(f"--metric-percentiles {text!r} is no percentile; use numbers from 0 to 100")
            found.append(value)
        return tuple(sorted(set(found)))

    @property
    def limits(self) -> dict[str, float]:
        """Goodput's limits in seconds by metric."""
        found: dict[str, float] = {}
        for text in self.goodput:
            name, colon, limit = text.partition(":")
            if not colon or name not in GOODPUT:
                raise InvalidValue(f"--goodput {text!r} is unknown; use METRIC:MS with one of {', '.join(GOODPUT)}")
            try:
                milliseconds = float(limit)
            except ValueError:
                milliseconds = math.nan
            if not 0.0 < milliseconds < math.inf:
                raise InvalidValue(f"--goodput {text!r} has no limit; give milliseconds above 0, such as {name}:200")
            found[name] = milliseconds / 1e3
        return found

    def check(self) -> ServeBenchSettings:
        """Raise InvalidValue on a value out of range, and on settings that contradict each other."""
        TrafficSettings.check(self)
        _ = self.rate, self.metrics, self.percentiles, self.limits
        return self


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """The server to send to; without one the engine runs in this process."""

    base_url: str = option("", _E, "an OpenAI server, such as http://127.0.0.1:8000; without one: in process")
    host: str = option("", _E, "of the server, instead of --base-url")
    port: int = option(0, _E, "of the server, instead of --base-url (default 8000)", least=0, most=65535)
    endpoint: str = option(
        "/v1/completions",
        _E,
        "where requests go",
        choices=("/v1/completions", "/v1/chat/completions"),
    )
    api_key: str = option("", _E, "sent as bearer token (default: $OPENAI_API_KEY)")
    ready_check_timeout_sec: int = option(600, _E, "wait this long for the server to answer (0: do not wait)", least=0)

    @property
    def url(self) -> str:
        """The server's address without a trailing slash; empty where none is given."""
        if self.base_url:
            return self.base_url.rstrip("/").removesuffix("/v1")
        if self.host or self.port:
            return f"http://{self.host or '127.0.0.1'}:{self.port or 8000}"
        return ""

    def check(self) -> EndpointSettings:
        """Raise InvalidValue on a value out of range."""
        check_values(self)
        if self.base_url and (self.host or self.port):
            raise InvalidValue(f"--base-url {self.base_url} names the server already; leave --host and --port out")
        if self.base_url and not self.base_url.startswith(("http://", "https://")):
            raise InvalidValue(f"--base-url {self.base_url!r} is no URL; use one such as http://127.0.0.1:8000")
        return self


@dataclass(frozen=True, slots=True)
class LatencySettings:
    """One batch of equal requests, over and over."""

    batch_size: int = option(8, _D, "requests at once", least=1)
    input_len: int = option(32, _D, "prompt tokens of each", least=1)
    output_len: int = option(128, _D, "output tokens of each", least=1)
    num_iters: int = option(30, _D, "iterations that count", least=1)
    num_iters_warmup: int = option(10, _D, "iterations before them that do not", least=0)
    temperature: float = option(1.0, _S, "0 is greedy", least=0.0)

    def check(self) -> LatencySettings:
        """Raise InvalidValue on a value out of range."""
        check_values(self)
        return self
