"""Whole benchmarks of a tiny model: wet and dry on the same traffic, and against a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rooflight.errors import InvalidValue
from rooflight.serve.bench.result import Result
from rooflight.serve.bench.run import COMPARE, DRY, WET, latency, serve, throughput
from rooflight.serve.bench.settings import EndpointSettings, LatencySettings, ServeBenchSettings, TrafficSettings
from rooflight.serve.settings import EngineSettings
from tests.serve.bench.test_client import CHAT, Server, plain

# Small caches: a tiny model's blocks would be millions, and are counted again each time an engine is idle.
TINY = EngineSettings(model="tiny", load_format="dummy", device="cpu", num_blocks=256, on="cloud-cpu", dtype="fp32")
H200 = EngineSettings(model="tiny", on="h200", num_blocks=1024)
QUIET = TrafficSettings(num_prompts=12, random_input_len="5:20", random_output_len="4:9")
NOWHERE = EndpointSettings()


def silent(text: str) -> None: ...


def figures(result: Result, name: str) -> dict[str, float | None]:
    run = next(run for run in result.runs if run.name == name)
    return {row.key: row.value for row in run.rows}


def test_throughput_wet_beside_dry() -> None:
    result = throughput(QUIET, TINY, COMPARE, silent)
    wet, dry = figures(result, WET), figures(result, DRY)
    assert [run.name for run in result.runs] == [WET, DRY]
    for found, run in zip((wet, dry), result.runs, strict=True):
        assert (found["completed"], found["failed"]) == (12, 0)
        # Ends of text are ignored: the lengths are the traffic's.
        assert found["total_output_tokens"] == sum(outcome.output_tokens for outcome in run.outcomes)
        assert found["output_throughput"] == pytest.approx(found["total_output_tokens"] / found["duration"])  # type: ignore[operator]
    assert wet["total_output_tokens"] == dry["total_output_tokens"]
    assert wet["total_input_tokens"] == dry["total_input_tokens"]
    assert [a.output_tokens for a in result.runs[0].outcomes] == [b.output_tokens for b in result.runs[1].outcomes]
    # The same steps ran wet and dry, so the same was predicted for them.
    assert wet["predicted_step_seconds"] == pytest.approx(dry["predicted_step_seconds"])
    assert dry["step_seconds"] == pytest.approx(dry["predicted_step_seconds"])
    assert dry["duration"] == pytest.approx(dry["step_seconds"])
    assert result.ratios["total_output_tokens"] == 1.0


def test_serve_in_this_process_beside_dry() -> None:
    settings = ServeBenchSettings(
        num_prompts=12, random_input_len="8", random_output_len="6", request_rate="100", ignore_eos=True,
        max_concurrency=4, goodput=("e2el:60000",),
    ).check()  # fmt: skip
    result = serve(settings, TINY, NOWHERE, COMPARE, silent)
    for run in result.runs:
        found = figures(result, run.name)
        assert (found["completed"], found["failed"], found["total_output_tokens"]) == (12, 0, 72)
        assert 1 <= (found["max_concurrent_requests"] or 0) <= 4
        assert found["duration"] == pytest.approx(max(outcome.end for outcome in run.outcomes), rel=0.5)
        # The last request comes after 12/100 s.
        assert (found["duration"] or 0) >= 0.12
        assert found["request_goodput"] == pytest.approx(12 / (found["duration"] or 0))
        assert all(row.of_roof for row in run.rows if row.key in ("mean_ttft_ms", "mean_tpot_ms", "duration"))
    assert any("cloud" in note.lower() for note in result.notes)


def test_a_dry_run_repeats_itself_and_heeds_its_seed() -> None:
    settings = ServeBenchSettings(
        num_prompts=40, random_input_len="10:200", random_output_len="3:30", request_rate="50"
    )
    engines = [replace(H200, seed=seed) for seed in (1, 1, 2)]
    found = [serve(settings, engine, NOWHERE, DRY, silent) for engine in engines]
    first, again, other = (figures(result, DRY) for result in found)
    assert first == again != other
    assert "H200" in found[0].runs[0].machine
    assert any("--ignore-eos" in note for note in found[0].notes)


def test_latency_wet_beside_dry() -> None:
    settings = LatencySettings(batch_size=3, input_len=7, output_len=5, num_iters=2, num_iters_warmup=1).check()
    result = latency(settings, TINY, COMPARE, silent)
    wet, dry = figures(result, WET), figures(result, DRY)
    assert (wet["num_iters"], dry["num_iters"]) == (2, 1)
    for found in (wet, dry):
        assert found["output_throughput"] == pytest.approx(15 / (found["mean_latency_ms"] or 0) * 1e3)
        assert found["mean_latency_ms"] == pytest.approx(
            (found["mean_ttft_ms"] or 0) + 4 * (found["mean_tpot_ms"] or 0)
        )
    assert result.ratios["num_iters"] is None


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    too_long = TrafficSettings(num_prompts=2, random_input_len="250", random_output_len="20").check()
    with pytest.raises(InvalidValue, match="all 2 requests failed"):
        throughput(too_long, H200, DRY, silent)
    with pytest.raises(InvalidValue, match="--input-len 250"):
        latency(LatencySettings(input_len=250), H200, DRY, silent)
    with pytest.raises(InvalidValue, match="no model given"):
        throughput(QUIET, EngineSettings(on="h200"), DRY, silent)
    with pytest.raises(InvalidValue, match="--dry sends nothing"):
        serve(ServeBenchSettings(), TINY, EndpointSettings(base_url="http://127.0.0.1:9"), DRY, silent)
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_len": 4, "output_len": 2, "arrival": 0.5}\n')
    with pytest.raises(InvalidValue, match="say themselves"):
        rated = ServeBenchSettings(dataset_name=str(trace), request_rate="3").check()
        serve(rated, H200, NOWHERE, DRY, silent)


def test_a_trace_is_replayed_on_the_virtual_clock(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f'{{"input_len": 4, "output_len": 2, "arrival": {at}}}\n' for at in (0.5, 100, 3600)))
    settings = ServeBenchSettings(dataset_name=str(trace)).check()
    result = serve(settings, H200, NOWHERE, DRY, silent)
    assert [outcome.start for outcome in result.runs[0].outcomes] == [0.5, 100.0, 3600.0]
    assert 3600 < (figures(result, DRY)["duration"] or 0) < 3601
    assert (result.runs[0].took or 0) < 60
    # Offline, all of it comes at once.
    offline = throughput(TrafficSettings(dataset_name=str(trace)), H200, DRY, silent)
    assert (figures(offline, DRY)["duration"] or 0) < 1


@pytest.fixture
def server() -> Iterator[tuple[str, Server]]:
    """A scripted server that listens in a thread."""
    script, ready = Server(plain), threading.Event()
    loop, where = asyncio.new_event_loop(), []

    async def begin() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", script.models)
        app.router.add_post("/v1/completions", script.complete)
        app.router.add_post(CHAT, script.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        where.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()
        return runner

    runner = loop.run_until_complete(begin())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    ready.wait()
    yield where[0], script
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def remotely(url: str, engine: EngineSettings, mode: str = WET, **given: Any) -> Result:
    settings = ServeBenchSettings(num_prompts=6, random_input_len="9", random_output_len="5", **given).check()
    return serve(settings, engine, EndpointSettings(base_url=url), mode, silent)


def test_a_server_of_which_nothing_is_known_has_no_roof(server: tuple[str, Server]) -> None:
    url, script = server
    result = remotely(url, EngineSettings(model="tiny"), ignore_eos=True)
    found = figures(result, WET)
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (6, 54, 30)
    assert all(row.of_roof is None for row in result.runs[0].rows)
    assert any("no share of the roof" in note and "--on" in note for note in result.notes)
    # One more than the run's, to see that the server works.
    assert len(script.bodies) == 7
    assert all(body["model"] == "tiny" and body["ignore_eos"] for body in script.bodies)


def test_a_server_whose_machine_is_named_has_a_roof_and_a_dry_run(server: tuple[str, Server]) -> None:
    result = remotely(server[0], H200, COMPARE)
    shares = {row.key: row.of_roof for row in result.runs[0].rows}
    assert shares["mean_ttft_ms"] and shares["mean_tpot_ms"] and shares["duration"] is None
    assert figures(result, DRY)["total_output_tokens"] == 30
    assert any("H200" in note for note in result.notes)


def test_text_for_a_model_without_tokenizer(server: tuple[str, Server], tmp_path: Path) -> None:
    """A server has a tokenizer of its own; an engine here, wet or dry, takes token ids alone."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "once", "output_len": 2}\n')
    settings, engine = ServeBenchSettings(dataset_name=str(path)).check(), replace(H200, model="qwen3-0.6b")
    endpoint = EndpointSettings(base_url=server[0])
    found = figures(serve(settings, engine, endpoint, WET, silent), WET)
    assert (found["completed"], found["total_output_tokens"]) == (1, 2)
    with pytest.raises(InvalidValue, match="--compare runs token ids"):
        serve(settings, engine, endpoint, COMPARE, silent)
    with pytest.raises(InvalidValue, match="has no tokenizer"):
        serve(settings, engine, NOWHERE, DRY, silent)


def test_a_server_that_refuses(server: tuple[str, Server]) -> None:
    url, script = server
    with pytest.raises(InvalidValue, match="--tokenizer"):
        remotely(url, EngineSettings(model="unheard-of"))
    with pytest.raises(InvalidValue, match="--compare against"):
        remotely(url, EngineSettings(model="tiny"), COMPARE)
    with pytest.raises(InvalidValue, match="takes text"):
        serve(ServeBenchSettings(), TINY, EndpointSettings(base_url=url, endpoint=CHAT), WET, silent)
    script.status, script.body = 429, '{"error": {"message": "too many"}}'
    with pytest.raises(InvalidValue, match="first request failed: HTTP 429: too many"):
        remotely(url, EngineSettings(model="tiny"))
    with pytest.raises(InvalidValue, match="all 6 requests failed; HTTP 429"):
        remotely(url, EngineSettings(model="tiny"), num_warmups=0)
