"""The server's own page: GET / shows what the engine does, from GET /live and its events; GET /metrics beside them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.metrics import Metrics, Moment, Occupancy
from rooflight.serve.settings import EngineSettings

WINDOW_SECONDS = 30.0
STEPS_SHOWN = 240
EVENT_SECONDS = 1.0
_PAGE = Path(__file__).parent / "page"
_STEP_COLUMNS = ("number", "tokens", "sequences", "decodes", "prefill_tokens")


class Watched(Protocol):
    """What the page reads of an AsyncEngine."""

    engine: Engine
    recent: deque[StepRecord]
    settings: EngineSettings
    max_model_len: int

    @property
    def draining(self) -> bool: ...
    @property
    def errored(self) -> bool: ...
    def add_listener(self, listener: Callable[[StepRecord], None]) -> None: ...


def watch(engine: Watched, model_name: str) -> Metrics:
    """Metrics that hear of every step of an engine from now on."""
    scheduler, settings = engine.engine.scheduler, engine.settings
    pool = scheduler.pool
    metrics = Metrics(
        model_name,
        max_model_len=engine.max_model_len,
        cache_config={
            "block_size": scheduler.config.block_size,
            "cache_dtype": settings.kv_cache_dtype,
            "enable_prefix_caching": scheduler.config.enable_prefix_caching,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "num_gpu_blocks": pool.total,
        },
        # Read from the server's thread while the engine's works: each figure is true, though not all of one moment.
        occupancy=lambda: Occupancy(len(scheduler.running), scheduler.waiting, pool.used, pool.total),
    )
    engine.add_listener(metrics.observe)
    return metrics


def routes(engine: Watched, metrics: Metrics, machine: str = "") -> list[Route]:
    """GET /metrics, / (the page), /live (JSON) and /live/events (the same once a second). machine: what it runs on."""
    live = Live(engine, metrics, machine)

    def show_metrics(request: HttpRequest) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    async def show_page(request: HttpRequest) -> Response:
        body, policy = page()
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(body, media_type="text/html", headers=headers)

    async def show_live(request: HttpRequest) -> Response:
        return Response(live.body(), media_type="application/json", headers={"Cache-Control": "no-store"})

    async def show_events(request: HttpRequest) -> Response:
        # Proxies that buffer would hold each event back until many have gathered.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(live.events(), media_type="text/event-stream", headers=headers)

    return [
        Route("/metrics", show_metrics),
        Route("/", show_page),
        Route("/live", show_live),
        Route("/live/events", show_events),
    ]


class Live:
    """What the page shows, worked out from an engine's last steps."""

    def __init__(self, engine: Watched, metrics: Metrics, machine: str = ""):
        self._engine, self._metrics, self._machine = engine, metrics, machine
        self._clock = engine.engine.clock
        self._began = self._clock.now()
        self._body, self._made = b"", float("-inf")

    def snapshot(self) -> dict[str, Any]:
        """Plain data: seconds are seconds, rates are over the last `window_seconds`, what is unknown is null."""
        engine, scheduler, now = self._engine, self._engine.engine.scheduler, self._clock.now()
        stands = self._metrics.occupancy()
        moments, since = self._metrics.moments(max(now - WINDOW_SECONDS, self._began))
        window = now - since
        # list() of a deque is one step of the interpreter, so the engine's thread cannot append within it.
        steps = list(engine.recent)[-STEPS_SHOWN:]
        return {
            "model": self._metrics.model_name,
            "machine": self._machine,
            "uptime_seconds": _short(now - self._began),
            "state": "stopped" if engine.errored else "draining" if engine.draining else "serving",
            "running": stands.running,
            "waiting": stands.waiting,
            "max_num_seqs": scheduler.config.max_num_seqs,
            "blocks": {"used": stands.used_blocks, "total": stands.total_blocks, "tokens": scheduler.config.block_size},
            "window_seconds": _short(window),
            "tokens_per_second": {
                "prefill": _ratio(sum(moment.prefill_tokens for moment in moments), window),
                "generated": _ratio(sum(moment.generated for moment in moments), window),
            },
            "requests_ended": sum(moment.finished for moment in moments),
            "ttft_seconds": _spread((wait, 1) for moment in moments for wait in moment.first_token_seconds),
            "itl_seconds": _spread(gap for moment in moments for gap in moment.token_gaps),
            "prefix_cache": _prefix_cache(moments),
            "steps": _steps(steps),
            "against_prediction": _against_prediction(steps),
        }

    def body(self) -> bytes:
        """The snapshot as JSON; one is made for all who ask within half an event."""
        if time.monotonic() - self._made > EVENT_SECONDS / 2:
            self._body = json.dumps(self.snapshot(), allow_nan=False, separators=(",", ":")).encode()
            self._made = time.monotonic()
        return self._body

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, one snapshot a second; ends when the server drains, so as not to hold it up."""
        yield b"retry: 2000\n\n"
        while True:
            yield b"data: " + self.body() + b"\n\n"
            if self._engine.draining:
                return
            await asyncio.sleep(EVENT_SECONDS)


@cache
def page() -> tuple[bytes, str]:
    """The page with its style and script in it, and a policy that lets the browser run these two and nothing else."""
    style, script = (_PAGE / "live.css").read_text(encoding="utf-8"), (_PAGE / "live.js").read_text(encoding="utf-8")
    text = (_PAGE / "index.html").read_text(encoding="utf-8")
    text = text.replace("/* live.css */", style).replace("/* live.js */", script)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def percentiles(weighed: Iterable[tuple[float, int]], shares: Iterable[float]) -> list[float | None]:
    """For each share, the smallest value that at least so much of the weight does not exceed (nearest rank).

    None for each when there is no value.
    """
    ordered = sorted(weighed)
    passed = list(accumulate(weight for _, weight in ordered))
    return [ordered[bisect_left(passed, share * passed[-1])][0] if ordered else None for share in shares]


def _spread(weighed: Iterable[tuple[float, int]]) -> dict[str, Any]:
    values = list(weighed)
    p50, p99 = percentiles(values, (0.5, 0.99))
    return {"count": sum(weight for _, weight in values), "p50": _short(p50), "p99": _short(p99)}


def _prefix_cache(moments: list[Moment]) -> dict[str, Any]:
    queried, hits = (sum(getattr(moment, name) for moment in moments) for name in ("queried_tokens", "cached_tokens"))
    return {"queried_tokens": queried, "hit_tokens": hits, "hit_rate": _ratio(hits, queried)}


def _steps(steps: list[StepRecord]) -> dict[str, list[Any]]:
    """The steps by column, oldest first; seconds of a step without a prediction are null."""
    columns: dict[str, list[Any]] = {name: [getattr(step, name) for step in steps] for name in _STEP_COLUMNS}
    columns["measured_seconds"] = [_short(step.seconds) for step in steps]
    columns["predicted_seconds"] = [_short(step.forecast.seconds) if step.forecast else None for step in steps]
    columns["roof_seconds"] = [_short(step.forecast.roof_seconds) if step.forecast else None for step in steps]
    columns["bound"] = [step.forecast.bound if step.forecast else None for step in steps]
    return columns


def _against_prediction(steps: list[StepRecord]) -> dict[str, Any]:
    """Sums over the shown steps that have a prediction, and their ratios."""
    pairs = [(step.seconds, step.forecast) for step in steps if step.forecast is not None]
    measured = sum(seconds for seconds, _ in pairs)
    predicted = sum(forecast.seconds for _, forecast in pairs)
    roof = sum(forecast.roof_seconds for _, forecast in pairs)
    return {
        "steps": len(pairs),
        "predicted_over_measured": _ratio(predicted, measured),
        "measured_over_roof": _ratio(measured, roof),
    }


def _ratio(above: float, below: float) -> float | None:
    return _short(above / below) if below > 0 else None


def _short(value: float | None) -> float | None:
    """Six digits: more would only lengthen the message."""
    return None if value is None else float(f"{value:.6g}")
