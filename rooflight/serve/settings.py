"""`EngineSettings` and `ServerSettings`: every setting of the engine and of its server, once; flags are derived."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.settings import check_values, option, parse_value

ENVIRONMENT = "ROOFLIGHT_"
_M, _K, _S, _R, _A, _L = "model", "memory", "scheduler", "runner", "server", "limits"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings of an engine; names are vLLM's where it has them. 0 and "auto" mean: chosen for the machine."""

    model: str = option("", _M, "a checkpoint directory, a hub id, or with --load-format dummy a preset or config.json")
    tokenizer: str = option("", _M, "a tokenizer.json or a directory with one (default: the model's)")
    dtype: str = option(
        "auto", _M, "weights and products (auto: the checkpoint's)", choices=("auto", "fp32", "bf16", "fp16")
    )
    load_format: str = option(
        "auto", _M, "dummy: random weights of the named sizes, for measuring", choices=("auto", "dummy")
    )
    max_model_len: int = option(
        0, _M, "longest prompt and output together (0: the model's, as far as it fits)", least=0
    )
    seed: int = option(0, _M, "of dummy weights, and of requests without a seed of their own", least=0)
    device: str = option("auto", _M, "where to run", choices=("auto", "cpu", "cuda"))

    gpu_memory_utilization: float = option(
        0.9, _K, "share of the GPU's memory for weights, cache and activations together", more_than=0.0, most=1.0
    )
    cpu_kv_cache_gib: float = option(
        0.0, _K, "KV cache on a CPU, in GiB (0: a quarter of what is free, at most 4)", least=0.0
    )
    block_size: int = option(16, _K, "tokens a KV block", choices=(8, 16, 32, 64, 128))
    num_blocks: int = option(0, _K, "KV blocks (0: as many as the memory allows)", least=0)
    kv_cache_dtype: str = option(
        "auto", _K, "what keys and values are kept in (auto: as the weights)", choices=("auto", "fp32", "bf16", "fp16")
    )
    enable_prefix_caching: bool = option(True, _K, "keep computed blocks for prompts that begin alike")

    max_num_seqs: int = option(0, _S, "requests that run at once (0: 256 on a GPU, 64 on a CPU)", least=0)
    max_num_batched_tokens: int = option(0, _S, "tokens a step (0: 8192 on a GPU, 512 on a CPU)", least=0)
    enable_chunked_prefill: bool = option(True, _S, "cut long prompts to the step's tokens, beside running requests")
    scheduling_policy: str = option(
        "fcfs", _S, "who is admitted first: by arrival, or by priority and then arrival", choices=("fcfs", "priority")
    )

    enforce_eager: bool = option(False, _R, "no CUDA graphs")
    async_scheduling: str = option(
        "auto", _R, "schedule one step ahead of the GPU (auto: on a GPU)", choices=("auto", "on", "off")
    )
    on: str = option("", _R, "machine to predict steps for (default: here as probed, else this GPU's of the catalog)")

    def check(self) -> EngineSettings:
        """Raise InvalidValue on a value out of range, and on settings that contradict each other."""
        check_values(self)
        if not self.model:
            raise InvalidValue("no model given; name a checkpoint directory or a hub id")
        if not self.enable_chunked_prefill and 0 < self.max_num_batched_tokens < self.max_model_len:
            raise InvalidValue(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-model-len {self.max_model_len} "
                "without chunked prefill; raise it, or leave --no-enable-chunked-prefill out"
            )
        return self


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The settings of the HTTP server in front of an engine."""

    host: str = option("127.0.0.1", _A, "address to listen on; 0.0.0.0 for every one")
    port: int = option(8000, _A, "port to listen on (0: any that is free)", least=0, most=65535)
    api_key: str = option("", _A, "requests must carry this as their bearer token")
    served_model_name: tuple[str, ...] = option((), _A, "names that the API knows the model by", metavar="NAME")
    chat_template: str = option("", _A, "a Jinja file instead of the model's chat template", metavar="FILE")
    drain_seconds: float = option(30.0, _A, "after SIGTERM, time for running requests to end", least=0.0)
    disable_log_requests: bool = option(False, _A, "do not print a line a request")

    max_body_mib: float = option(16.0, _L, "largest request body", more_than=0.0)
    max_prompts: int = option(256, _L, "prompts a request", least=1)
    max_n: int = option(64, _L, "completions a prompt", least=1)
    max_stops: int = option(16, _L, "stop texts a request", least=0)
    max_logprobs: int = option(20, _L, "logprobs a token", least=0, most=20)
    max_grammar_kib: float = option(64.0, _L, "largest JSON schema, regex or grammar", more_than=0.0)
    max_queue: int = option(4096, _L, "requests waiting; more are refused with 429", least=1)

    def check(self) -> ServerSettings:
        """Raise InvalidValue on a value out of range."""
        check_values(self)
        return self


def from_environment(settings: type, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Values of ROOFLIGHT_<NAME> variables for the fields of a settings class, as a flag would give them."""
    found: dict[str, Any] = {}
    for entry in fields(settings):
        name = ENVIRONMENT + entry.name.upper()
        if name not in environment:
            continue
        text = environment[name]
        if isinstance(entry.default, bool):
            if text.lower() not in ("1", "0", "true", "false"):
                raise InvalidValue(f"{name} {text!r} is unknown; use 1 or 0")
            found[entry.name] = text.lower() in ("1", "true")
        elif isinstance(entry.default, tuple):
            found[entry.name] = tuple(part.strip() for part in text.split(",") if part.strip())
        else:
            try:
                found[entry.name] = parse_value(entry.name, text, entry.default)
            except InvalidValue as error:
                raise InvalidValue(f"{name}: {error}") from None
    return found
