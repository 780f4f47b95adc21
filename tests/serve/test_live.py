"""The live page's JSON against figures worked out by hand; what its routes answer and allow."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from rooflight.serve import live, metrics
from rooflight.serve.clock import VirtualClock
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.live import Live, percentiles, routes, watch
from rooflight.serve.scheduler import Scheduler, SchedulerConfig
from rooflight.serve.settings import EngineSettings
from rooflight.serve.step import Forecast, Step
from tests.serve.records import end, give_token, play, request, step_record


class NoRunner:
    def launch(self, step: Step):
        raise AssertionError("the page runs no step")

    def close(self) -> None:
        pass


class Watched:
    """An AsyncEngine as the page sees it, played by hand."""

    def __init__(self, name: str = "tiny"):
        self.clock = VirtualClock(100.0)
        scheduler = Scheduler(SchedulerConfig(8, 64, 128, 4, 50))
        self.engine = Engine(scheduler, NoRunner(), self.clock)
        self.settings, self.max_model_len = EngineSettings(model="tiny"), 128
        self.recent: deque[StepRecord] = deque(maxlen=512)
        self.draining = self.errored = False
        self._listeners: list[Callable[[StepRecord], None]] = []

    def add_listener(self, listener: Callable[[StepRecord], None]) -> None:
        self._listeners.append(listener)

    def tell(self, record: StepRecord) -> None:
        self.recent.append(record)
        for listener in self._listeners:
            listener(record)


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def shown(watched: Watched) -> Live:
    return Live(watched, watch(watched, "tiny"), "a machine")


def test_nothing_yet(shown: Live, watched: Watched):
    found = shown.snapshot()
    assert (found["model"], found["machine"], found["state"]) == ("tiny", "a machine", "serving")
    assert (found["running"], found["waiting"], found["max_num_seqs"]) == (0, 0, 8)
    assert found["blocks"] == {"used": 0, "total": 50, "tokens": 4}
    assert found["tokens_per_second"] == {"prefill": None, "generated": None}
    assert found["ttft_seconds"] == found["itl_seconds"] == {"count": 0, "p50": None, "p99": None}
    assert found["prefix_cache"]["hit_rate"] is None
    assert set(map(len, found["steps"].values())) == {0}
    assert found["against_prediction"] == {"steps": 0, "predicted_over_measured": None, "measured_over_roof": None}


def test_figures_by_hand(shown: Live, watched: Watched):
    first, second = request("a", 6, arrival=100.0), request("b", 4, arrival=100.5)
    give_token(first, 101.0)
    give_token(second, 101.0)
    watched.tell(
        step_record(
            1,
            100.5,
            101.0,
            Forecast(0.4, 0.2, "compute"),
            tokens=10,
            sequences=2,
            prefill_tokens=10,
            generated=2,
            queried_tokens=10,
            cached_tokens=4,
            first=(first, second),
        )
    )
    for one in (first, second):
        give_token(one, 101.25)
    decode = {"tokens": 2, "sequences": 2, "decodes": 2, "generated": 2}
    watched.tell(step_record(2, 101.0, 101.25, Forecast(0.2, 0.1, "memory"), **decode))
    give_token(first, 102.0)
    end(first, "length", 102.0)
    watched.tell(step_record(3, 101.25, 102.0, tokens=1, sequences=1, decodes=1, generated=1, finished=(first,)))
    watched.clock.move_to(104.0)
    found = shown.snapshot()
    assert (found["uptime_seconds"], found["window_seconds"]) == (4.0, 4.0)
    assert found["tokens_per_second"] == {"prefill": 2.5, "generated": 1.25}
    assert found["ttft_seconds"] == {"count": 2, "p50": 0.5, "p99": 1.0}
    assert found["itl_seconds"] == {"count": 3, "p50": 0.25, "p99": 0.75}
    assert found["prefix_cache"] == {"queried_tokens": 10, "hit_tokens": 4, "hit_rate": 0.4}
    assert found["requests_ended"] == 1
    assert found["steps"] == {
        "number": [1, 2, 3],
        "tokens": [10, 2, 1],
        "sequences": [2, 2, 1],
        "decodes": [0, 2, 1],
        "prefill_tokens": [10, 0, 0],
        "measured_seconds": [0.5, 0.25, 0.75],
        "predicted_seconds": [0.4, 0.2, None],
        "roof_seconds": [0.2, 0.1, None],
        "bound": ["compute", "memory", None],
    }
    assert found["against_prediction"] == {"steps": 2, "predicted_over_measured": 0.8, "measured_over_roof": 2.5}


def test_what_is_older_than_the_window_is_out(shown: Live, watched: Watched):
    watched.tell(step_record(1, 100.0, 101.0, generated=7))
    watched.tell(step_record(2, 101.0, 120.0, generated=30))
    watched.clock.move_to(140.0)
    found = shown.snapshot()
    assert found["window_seconds"] == live.WINDOW_SECONDS == 30.0
    assert found["tokens_per_second"]["generated"] == 1.0
    assert found["steps"]["number"] == [1, 2], "the last steps are shown whenever they were"


def test_rates_are_over_what_is_kept(shown: Live, watched: Watched):
    kept = metrics.MOMENTS_KEPT
    for number in range(kept + 10):
        watched.tell(step_record(number, 0.0, 100.0 + (number + 1) / 1024, generated=1))
    watched.clock.move_to(100.0 + (kept + 10) / 1024)
    found = shown.snapshot()
    assert found["window_seconds"] == pytest.approx((kept - 1) / 1024, rel=1e-5)
    assert found["tokens_per_second"]["generated"] == pytest.approx(1024)
    assert len(found["steps"]["number"]) == live.STEPS_SHOWN
    assert found["steps"]["number"][-1] == kept + 9


def test_how_it_stands_comes_from_the_scheduler(shown: Live, watched: Watched):
    scheduler = watched.engine.scheduler
    for index in range(10):
        watched.engine.add(request(str(index), 6, max_tokens=4))
    scheduler.schedule(101.0)
    found = shown.snapshot()
    assert (found["running"], found["waiting"]) == (8, 2)
    # Blocks of four tokens: all prompts share their first, and each has its last two in one of its own.
    assert found["blocks"]["used"] == 1 + 8
    for index in range(10):
        watched.engine.cancel(str(index))
    assert (shown.snapshot()["running"], shown.snapshot()["blocks"]["used"]) == (0, 0)


def test_percentiles_weigh():
    shares = (0.0, 0.2, 0.21, 0.5, 0.51, 0.99, 1.0)
    found = percentiles([(9.0, 5), (1.0, 2), (2.0, 3)], shares)
    assert found == [1.0, 1.0, 2.0, 2.0, 9.0, 9.0, 9.0]
    values = [1.0] * 2 + [2.0] * 3 + [9.0] * 5
    for share, value in zip(shares, found):
        assert value == min(one for one in values if sum(other <= one for other in values) >= share * 10)


def test_percentiles_of_nothing():
    assert percentiles([], (0.5, 0.9)) == [None, None]


@pytest.fixture
def client(watched: Watched):
    found = watch(watched, "org/a <model> & more")
    play(watched.tell, steps=60)
    with TestClient(Starlette(routes=routes(watched, found, "H200"))) as made:
        yield made


def test_metrics_route(client: TestClient):
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'vllm:num_requests_running{engine="0",model_name="org/a <model> & more"} 0.0' in answer.text
    assert 'num_gpu_blocks="50"' in answer.text
    asked = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text")
    assert asked.text.endswith("# EOF\n")
    assert client.post("/metrics").status_code == 405


def test_live_route(client: TestClient, watched: Watched):
    answer = client.get("/live")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["steps"]["number"] == [record.number for record in watched.recent]


def test_page_runs_its_own_script_and_nothing_else(client: TestClient):
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert len(inline) == 1
        assert policy[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()}'"
    # Nothing is fetched from elsewhere, and no attribute is needed that the policy forbids.
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text)
    assert not re.search(r"\s(style|on\w+)=", answer.text)
    assert "<model>" not in answer.text, "names come as data, never as markup"


def test_page_has_every_element_that_its_script_names():
    text = (Path(live.__file__).parent / "page" / "index.html").read_text()
    script = (Path(live.__file__).parent / "page" / "live.js").read_text()
    named = set(re.findall(r"""(?:byId|say|figure)\("([\w-]+)\"""", script))
    assert len(named) > 15
    assert named <= set(re.findall(r'id="([\w-]+)"', text))


def test_script_reads_only_what_the_snapshot_has(shown: Live):
    script = (Path(live.__file__).parent / "page" / "live.js").read_text()
    found = shown.snapshot()
    assert set(re.findall(r"\bnow\.(\w+)", script)) <= set(found)
    assert set(re.findall(r"""(?:\bsteps\.|\bof\(")(\w+)""", script)) <= set(found["steps"])


def test_events(watched: Watched, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "EVENT_SECONDS", 0.02)
    shown = Live(watched, watch(watched, "tiny"))

    async def read() -> list[dict]:
        found = []
        async for event in shown.events():
            assert event.endswith(b"\n\n") and event.count(b"\n") == 2
            if not event.startswith(b"data: "):
                continue
            found.append(json.loads(event.removeprefix(b"data: ")))
            watched.tell(step_record(len(found), 0.0, 101.0))
            watched.draining = len(found) == 3
        return found

    found = asyncio.run(asyncio.wait_for(read(), 20))
    assert [len(event["steps"]["number"]) for event in found] == [0, 1, 2]


def test_events_say_what_state_the_engine_is_in(watched: Watched, client: TestClient):
    watched.draining = True
    answer = client.get("/live/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    states = [json.loads(line[6:])["state"] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert states == ["draining"]
    watched.errored = True
    assert Live(watched, watch(watched, "tiny")).snapshot()["state"] == "stopped"
